"""The adaptive timestep sampler: a policy that draws the times which lower the variational bound most.

Kim, Ki, Kim, Woo, Park, Shin, Kim 2025, "Adaptive non-uniform timestep sampling for accelerating diffusion model
training", arXiv 2411.09998 (CVPR). A network maps every clean example to a Beta law of its time. Once in `period`
steps the sampler takes a look: how much did this step of the optimiser lower the bound's terms at a few times S?
That drop is the reward of one policy-gradient step (REINFORCE). S are the times whose drops explain the total drop
best, over a queue of sweeps of one example through all times.

Dropped into a training loop of one's own (`x` is a batch, `model(x_t, t)` predicts the noise):

    chain = DiffusionChain(1000, betas="linear")
    sampler = AdaptiveTimesteps(chain)
    def objective(model, x, t, key):
        eps = jr.normal(key, x.shape)
        return jnp.mean((model(chain.perturb(x, eps, t), t) - eps) ** 2)
    @eqx.filter_jit
    def step(model, opt_state, state, x, key):
        keys = jr.split(key, 3)
        draw = sampler.sample(state, len(x), x=x, key=keys[0])
        def loss(model):
            losses = jax.vmap(partial(objective, model))(x, draw.t, jr.split(keys[1], len(x)))
            return jnp.mean(draw.weight * losses), losses
        grads, losses = eqx.filter_grad(loss, has_aux=True)(model)
        updates, opt_state = optimizer.update(grads, opt_state)
        new = eqx.apply_updates(model, updates)
        state = sampler.update(
            state, draw, losses, before=model, after=new, x=x, objective=objective, key=keys[2]
        )
        return new, opt_state, state

with `state = sampler.init(x[0], key=key)` before the first step. EDM, flow matching and MeanFlow take
`ContinuousTimes` or `FlowIntervals` and, since their loss is no term of a bound, an explicit `reward`.

| paper                 | here               |                                                                |
|-----------------------|--------------------|----------------------------------------------------------------|
| pi_phi(t given x_0)   | `state.policy`     | Beta law(s) of u, t = the time that u stands for (Eq. 11)      |
| Delta_k^t             | reward             | drop of the bound by step k (Eq. 12, 14)                       |
| f_S                   | `look_every`       | steps from one look to the next                                |
| S                     | `state.subset`     | times at which the drop is measured                            |
| Q                     | `state.queue`      | drops at all times, one example in each look (Algorithm 2)     |
| c_t                   | `reward`           | weight that makes the error a term of the bound (Eq. 7)        |

There is no importance weight 1 / p_t: the law is meant to change the objective (paper, section 5).

What differs between the presets, each a field. [P] the paper, [C] the released code, [I] ours, inferred, [T] ours,
tested in a prototype (eps-MLP on 8x8 digits, T = 100):

| field           | `paper`      | default     | why                                                             |
|-----------------|--------------|-------------|-----------------------------------------------------------------|
| `common_noise`  | an option    | True        | [T] fresh noise [C] hides a drop of 1e-4: pi walks at random    |
| `deterministic` | False [C]    | True        | [I] dropout is noise in the reward too                          |
| `uniform_share` | 0            | 0.3         | [T] without it pi can collapse on the cosine schedule           |
| `reward`        | c_t          | min(c_t, 1) | [T] c = 500 in the last step of the cosine schedule is most of  |
|                 |              |             | the reward, and noise; that step gets its draws from the share  |
| `ranking`       | "f" [C]      | "r2"        | [I] F = 1 / 0 for a perfectly correlated column                 |
| `min_rows`      | 2 [C]        | 3           | [C] two rows have no degree of freedom: the last times win      |
| `reduction`     | "sum" [C]    | "mean" [P]  | a factor |S|, which matters against the entropy alone           |
| `entropy`       | 0.01 [C]     | 0.01 / 3    | [I] the same strength after the mean over three                 |
| `entropy_mode`  | "code" [C]   | "code" [C]  | see the field                                                   |
| `shape_range`   | None [C]     | (0.05, 50)  | [I] where draws and densities are safe in float32               |

Where the released code fails or wastes work, no preset follows it: its selector returns a tuple that its own loop
rejects, its single-process path raises, and each KL term takes two forward passes where one gives the same number.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal, Self, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.scipy.special import betainc
from jaxtyping import Array, Float, Int, Key, PyTree

from eqgen.networks.timestep_policies import (
    ImagePolicy,
    OfFirst,
    SharedPolicy,
    TrajectoryPolicy,
    VectorPolicy,
)
from eqgen.timesteps.base import AbstractTimestepSampler, Draw, Objective, look_or_keep, required
from eqgen.timesteps.beta import beta_entropy, beta_log_prob, bounded
from eqgen.timesteps.heuristics import swept_cells
from eqgen.timesteps.selection import select_columns
from eqgen.timesteps.times import AbstractTimes, DiffusionChain
from eqgen.timesteps.weightings import AbstractWeighting, BoundWeight, Constant
from eqgen.types import Metrics


SMALLEST = 1e-6
"""Draws of u keep this distance from 0 and 1, which Beta draws in float32 do hit."""


class AdaptiveState(eqx.Module):
    """What the sampler has learnt; plain arrays but for the policy's activation functions, and no keys."""

    policy: PyTree
    opt_state: PyTree
    queue: Float[Array, "rows swept"]
    pointer: Int[Array, ""]
    size: Int[Array, ""]
    subset: Int[Array, " subset"]
    """Positions in the sweep, not cells."""
    step: Int[Array, ""]
    metrics: Metrics
    """Of the last look."""


class AdaptiveTimesteps(AbstractTimestepSampler):
    """The adaptive sampler; the defaults are the `robust` preset, `AdaptiveTimesteps.paper(times)` the other.

    **Arguments:**

    - `times`: what is drawn from.
    - `weighting`: of the training loss [P: none].
    - `reward`: what makes the objective a term of the bound. None: `BoundWeight(clip=1.0)`, for a chain and a
      network that predicts eps. Pass `BoundWeight(clip=1.0, prediction="v")` for another prediction, and a
      weighting of one's own for flow matching and the like.
    - `policy`: the network of `init`: "shared" (one law for all examples), "vector", "image", "image_flat" (the
      released code's), "trajectory", or "auto", by the rank of an example: 1 vector, 2 trajectory, 3 image.
    - `look_every`: f_S; 40 [C].
    - `subset_size`: |S|; 3 [P].
    - `queue_length`: rows of Q; 20 [C].
    - `sweep`: how many times a sweep visits, evenly spread; None [P] visits all. The main lever on cost [I].
    - `reward_batch`: how many examples of the batch the policy learns from in a look; None [P] takes all [I].
    - `learning_rate`, `max_grad_norm`: of the policy's Adam; 1e-2 and 1 [C].
    - `entropy`: lambda, the strength of the entropy term.
    - `entropy_mode`: "code" [C]: lambda H inside the reward, with its gradient, whose expectation is
      -lambda H grad H (a push to uniform that vanishes there); "standard": lambda grad H.
    - `reduction`: of the drops over S, "sum" or "mean".
    - `common_noise`: whether the drop is measured with the same noise before and after the step.
    - `deterministic`: whether the model is put in inference mode to measure the reward.
    - `uniform_share`: with this probability u is uniform; the policy gradient is that of the mixture.
      Steps whose c_t the reward's `clip` cuts are c_t / clip times as dense in it: what pi is not told of, it need
      not learn to draw [T].
    - `ranking`: how S is chosen: "r2", the squared correlation of a time's drops with their sum over all
      times; "f", the F statistic of the same.
    - `min_rows`: rows that the queue must have before S is chosen; until then S is the first times.
    - `shape_range`: bounds on the Beta laws' parameters, or None.
    - `sweep_block`: how many times of a sweep are evaluated at once, a matter of memory.
    """

    times: AbstractTimes
    weighting: AbstractWeighting = Constant()
    reward: AbstractWeighting | None = None
    policy: Literal["auto", "shared", "vector", "image", "image_flat", "trajectory"] = "auto"
    look_every: int = 40
    subset_size: int = 3
    queue_length: int = 20
    sweep: int | None = None
    reward_batch: int | None = None
    learning_rate: float = 1e-2
    max_grad_norm: float = 1.0
    entropy: float = 1e-2 / 3
    entropy_mode: Literal["code", "standard"] = "code"
    reduction: Literal["sum", "mean"] = "mean"
    common_noise: bool = True
    deterministic: bool = True
    uniform_share: float = 0.3
    ranking: Literal["r2", "f"] = "r2"
    min_rows: int = 3
    shape_range: tuple[float, float] | None = (0.05, 50.0)
    sweep_block: int = 128

    def __check_init__(self):
        choices = {
            "policy": ("auto", "shared", "vector", "image", "image_flat", "trajectory"),
            "entropy_mode": ("code", "standard"),
            "reduction": ("sum", "mean"),
            "ranking": ("r2", "f"),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r} is not supported; choose one of {allowed}.")
        if self.reward is None and not isinstance(self.times, DiffusionChain):
            raise ValueError(
                f"{type(self.times).__name__} needs an explicit `reward`, the weight of the loss in what training "
                "is to lower: BoundWeight(prediction=...) for the bound, Constant() for the loss itself."
            )
        if not 0 <= self.uniform_share < 1:
            raise ValueError(f"uniform_share={self.uniform_share}: it must lie in [0, 1).")
        if not 2 <= self.min_rows <= self.queue_length:
            raise ValueError(
                f"min_rows={self.min_rows}: it must lie in [2, queue_length={self.queue_length}]."
            )
        if not 1 <= self.subset_size <= (swept := len(self.swept)):
            raise ValueError(
                f"subset_size={self.subset_size}: it must lie in [1, {swept}], the times of a sweep."
            )

    @classmethod
    def paper(cls, times: AbstractTimes, *, fresh_noise: bool = False, **fields) -> Self:
        """The constants of the released code.

        **Arguments:**

        - `fresh_noise`: its noise too, drawn anew before and after the step [C].
        - `fields`: whatever else is to differ; `policy="image_flat"` is its network for 3x32x32 images [C].
        """
        constants: dict[str, Any] = dict(
            common_noise=not fresh_noise,
            deterministic=False,
            uniform_share=0.0,
            ranking="f",
            min_rows=2,
            reduction="sum",
            entropy=1e-2,
            shape_range=None,
        )
        if isinstance(times, DiffusionChain):
            constants["reward"] = BoundWeight()
        return cls(times, **(constants | fields))

    @property
    def period(self) -> int:
        return self.look_every

    @property
    def swept(self) -> Int[np.ndarray, " swept"]:
        """The cells that a sweep visits."""
        return swept_cells(self.times, self.sweep)

    def relative_cost(self, n: int) -> float:
        """The forward passes of the looks over those of training on batches of `n` (a backward pass counts as two).

        2 (T' + |S| m) / (3 n f_S) for T' swept times and m examples in the reward; without the policy's own cost.
        """
        rewarded = n if self.reward_batch is None else min(self.reward_batch, n)
        return 2 * (len(self.swept) + self.subset_size * rewarded) / (3 * n * self.look_every)

    # --- The protocol ---

    def init(self, example: PyTree = None, *, key: Key[Array, ""]) -> AdaptiveState:
        """The state with the built-in network that fits one example `x`, see the field `policy`.

        **Raises:** `ValueError` where the network and the example do not fit.
        """
        outputs = 2 * len(self.times.cells)
        if self.policy == "shared":
            return self.from_network(SharedPolicy(outputs))
        if isinstance(example, tuple):
            return self.from_network(OfFirst(self.init(example[0], key=key).policy))
        if not eqx.is_array_like(example):
            raise ValueError(
                f'policy="{self.policy}" is sized by one example: pass init(x[0], key=key), an array or a tuple '
                'that begins with one. For anything else use policy="shared" or from_network.'
            )
        ranks = {"vector": None, "trajectory": 2, "image": 3, "image_flat": 3}
        by_rank = {0: "vector", 1: "vector", 2: "trajectory", 3: "image"}
        shape = jnp.shape(example)
        kind = by_rank.get(len(shape)) if self.policy == "auto" else self.policy
        if kind is None or ranks[kind] not in (None, len(shape)):
            raise ValueError(f'policy="{self.policy}" has no network for examples of shape {shape}.')
        match kind:
            case "vector":
                network = VectorPolicy(math.prod(shape), outputs, key=key)
            case "trajectory":
                network = TrajectoryPolicy(shape[1], outputs, key=key)
            case _:
                pool = "flatten" if kind == "image_flat" else "mean"
                network = ImagePolicy(cast(tuple[int, int, int], shape), outputs, pool=pool, key=key)
        return self.from_network(network)

    def from_network(self, network: PyTree) -> AdaptiveState:
        """The state with a network of one's own: one `x` (any PyTree) to two numbers for each coordinate.

        For a conditional model `x` may be a tuple of data and condition, which the network is given as it is; the
        built-in ones look at the data.
        """
        swept = len(self.swept)
        # Distinct arrays throughout, so that the state can be donated.
        zero = lambda: jnp.zeros((), jnp.int32)
        return AdaptiveState(
            policy=network,
            opt_state=self._optimizer.init(eqx.filter(network, eqx.is_inexact_array)),
            queue=jnp.zeros((self.queue_length, swept)),
            pointer=zero(),
            size=zero(),
            subset=jnp.arange(self.subset_size, dtype=jnp.int32),
            step=zero(),
            metrics={name: jnp.zeros(()) for name in self._metric_names()},
        )

    def sample(self, state: AdaptiveState, n: int, *, x: PyTree = None, key: Key[Array, ""]) -> Draw:
        """Times for a batch; `aux` is u. `x` may be left out where one law serves all examples."""
        # Beta draws are differentiable in a and b, which REINFORCE must not see.
        a, b = jax.lax.stop_gradient(self._shapes_of_batch(state.policy, x, n))
        beta_key, uniform_key, mix_key = jr.split(key, 3)
        u = jr.beta(beta_key, a, b)
        if self.uniform_share > 0:
            mixed = jr.bernoulli(mix_key, self.uniform_share, (n, 1))
            u = jnp.where(mixed, self._shared_points(n, uniform_key), u)
        u = jnp.clip(u, SMALLEST, 1 - SMALLEST)
        t = self.times.from_unit(u)
        return Draw(t, self.weighting(t, self.times), u)

    def update(
        self,
        state: AdaptiveState,
        draw: Draw,
        losses: Float[Array, " n"] | None = None,
        *,
        before: PyTree = None,
        after: PyTree = None,
        x: PyTree = None,
        objective: Objective | None = None,
        key: Key[Array, ""] | None = None,
        look: bool | None = None,
    ) -> AdaptiveState:
        if look is not False:
            required(before=before, after=after, x=x, objective=objective, key=key)
            looking = partial(self._look, objective=objective)
            state = look_or_keep(look, state.step, self.period, looking, state, draw, before, after, x, key)
        return dataclasses.replace(state, step=state.step + 1)

    def metrics(self, state: AdaptiveState) -> Metrics:
        return state.metrics

    def probabilities(self, state: AdaptiveState, x: PyTree = None) -> Float[Array, " cells"]:
        n = 1 if x is None else jax.tree.leaves(x)[0].shape[0]
        a, b = self._shapes_of_batch(state.policy, x, n)
        edges = self.times.edges()
        cdfs = tuple(betainc(a[:, d, None], b[:, d, None], edge[None, :]) for d, edge in enumerate(edges))
        uniform = self.times.masses(edges)
        if (excess := self._excess) is not None:
            uniform = uniform * excess
        learned = jnp.mean(self.times.masses(cdfs), axis=0)
        return (1 - self.uniform_share) * learned + self.uniform_share * uniform

    # --- The policy ---

    def shapes(self, policy: PyTree, x: PyTree) -> tuple[Float[Array, " dims"], Float[Array, " dims"]]:
        """The parameters (a, b) of the Beta law of every coordinate of u, for one example."""
        shapes: Array = jax.nn.softplus(policy(x)) + 1e-5
        if self.shape_range is not None:
            shapes = bounded(shapes, *self.shape_range)
        a, b = shapes.reshape(-1, 2).T
        return a, b

    def log_prob(
        self, a: Float[Array, " dims"], b: Float[Array, " dims"], u: Float[Array, " dims"]
    ) -> Float[Array, ""]:
        """The log density of u under the mixture of the Beta laws and the uniform one."""
        log_beta = jnp.sum(beta_log_prob(u, a, b))
        if self.uniform_share == 0:
            return log_beta
        log_share = math.log(self.uniform_share)
        if (excess := self._excess) is not None:
            log_share += jnp.log(excess[self.times.cell(self.times.from_unit(u))])
        return jnp.logaddexp(math.log(1 - self.uniform_share) + log_beta, log_share)

    @property
    def rewarding(self) -> AbstractWeighting:
        """`reward`, or what None stands for."""
        return BoundWeight(clip=1.0) if self.reward is None else self.reward

    @property
    def _excess(self) -> Float[Array, " cells"] | None:
        """By cell the density of the share over that of uniform u; None where that is 1 everywhere."""
        clip = self.rewarding.clip if isinstance(self.rewarding, BoundWeight) else None
        if clip is None or not isinstance(self.times, DiffusionChain):
            return None
        excess = np.maximum(1.0, self.times.kl_weights / clip)
        if np.all(excess == 1):
            return None
        excess = jnp.asarray(excess, jnp.result_type(float))
        return excess / jnp.sum(excess * jnp.diff(self.times.edges()[0]))

    def _shared_points(self, n, key):
        """Draws of u from the share."""
        if (excess := self._excess) is None:
            return jr.uniform(key, (n, len(self.times.cells)))
        edges = self.times.edges()[0]
        cdf = jnp.append(0.0, jnp.cumsum(excess * jnp.diff(edges)))
        return jnp.interp(jr.uniform(key, (n, 1)), cdf, edges)

    def policy_loss(
        self, policy: PyTree, x: PyTree, u: Float[Array, "n dims"], drops: Float[Array, " n"]
    ) -> Float[Array, ""]:
        """What the policy descends: -mean(log pi(u) drop), and the entropy term."""

        def one(x, u):
            a, b = self.shapes(policy, x)
            return self.log_prob(a, b, u), jnp.sum(beta_entropy(a, b))

        log_prob, entropy = jax.vmap(one)(x, jax.lax.stop_gradient(u))
        drops = jax.lax.stop_gradient(drops)
        if self.entropy_mode == "code":
            return -jnp.mean(log_prob * (drops + self.entropy * entropy))
        return -jnp.mean(log_prob * drops) - self.entropy * jnp.mean(entropy)

    def improve(
        self, state: AdaptiveState, x: PyTree, u: Float[Array, "n dims"], drops: Float[Array, " n"]
    ) -> AdaptiveState:
        """One step of the policy for rewards `drops` of the draws `u`."""
        grads = eqx.filter_grad(self.policy_loss)(state.policy, x, u, drops)
        params = eqx.filter(state.policy, eqx.is_inexact_array)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, params)
        policy = eqx.apply_updates(state.policy, updates)
        return dataclasses.replace(state, policy=policy, opt_state=opt_state)

    def _shapes_of_batch(self, policy, x, n):
        if x is None and not isinstance(policy, SharedPolicy):
            raise ValueError('The policy looks at the data: pass x=..., or set policy="shared".')
        if isinstance(policy, SharedPolicy):
            return tuple(jnp.broadcast_to(shape, (n, *shape.shape)) for shape in self.shapes(policy, x))
        return jax.vmap(partial(self.shapes, policy))(x)

    @property
    def _optimizer(self):
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), optax.adam(self.learning_rate))

    # --- The look ---

    def _look(self, state, draw, before, after, x, key, *, objective):
        index_key, row_key, drops_key = jr.split(key, 3)
        n = jax.tree.leaves(x)[0].shape[0]
        i = jr.randint(index_key, (), 0, n)
        example = jax.tree.map(lambda x: x[i], x)
        row = self.sweep_drops(before, after, example, objective, key=row_key)
        some = slice(None if self.reward_batch is None else min(self.reward_batch, n))
        x, u = jax.tree.map(lambda x: x[some], (x, draw.aux))
        drops = self.drops(before, after, x, state.subset, objective, key=drops_key)

        a, b = self._shapes_of_batch(state.policy, x, len(u))
        state = self.improve(state, x, u, drops)
        queue = state.queue.at[state.pointer].set(row)
        size = jnp.minimum(state.size + 1, self.queue_length)
        choose = partial(select_columns, subset_size=self.subset_size, ranking=self.ranking)
        chosen, informative = choose(queue, size)
        subset = jnp.where(informative & (size >= self.min_rows), chosen, state.subset)
        return dataclasses.replace(
            state,
            queue=queue,
            pointer=(state.pointer + 1) % self.queue_length,
            size=size,
            subset=subset,
            metrics=self._metrics(a, b, u, drops, row),
        )

    def sweep_drops(
        self, before: PyTree, after: PyTree, x: PyTree, objective: Objective, *, key: Key[Array, ""]
    ) -> Float[Array, " swept"]:
        """The drop of the bound's terms at all swept times, for one example."""
        ts = self.times.points()[self.swept]

        def terms(model, key):
            one = lambda args: self._term(objective, model, x, *args)
            keys = jr.split(key, len(ts))
            return jax.lax.map(one, (ts, keys), batch_size=min(self.sweep_block, len(ts)))

        return self._difference(terms, before, after, key)

    def drops(
        self,
        before: PyTree,
        after: PyTree,
        x: PyTree,
        subset: Int[Array, " subset"],
        objective: Objective,
        *,
        key: Key[Array, ""],
    ) -> Float[Array, " n"]:
        """The drop of the bound's terms at the times of the subset, reduced over them, for every example."""
        ts = self.times.points()[jnp.asarray(self.swept)[subset]]
        n = jax.tree.leaves(x)[0].shape[0]

        def terms(model, key):
            def at(args):
                t, key = args
                one = lambda x, key: self._term(objective, model, x, t, key)
                return jax.vmap(one)(x, jr.split(key, n))

            return jax.lax.map(at, (ts, jr.split(key, len(ts))))

        differences = self._difference(terms, before, after, key)
        return jnp.sum(differences, axis=0) / (1 if self.reduction == "sum" else self.subset_size)

    def _difference(self, terms, before, after, key):
        fresh = jr.fold_in(key, 1)
        if self.deterministic:
            before, after = eqx.nn.inference_mode((before, after))
        return terms(before, key) - terms(after, key if self.common_noise else fresh)

    def _term(self, objective, model, x, t, key):
        return self.rewarding(t[None], self.times)[0] * objective(model, x, t, key)

    def _metric_names(self):
        names = ("a", "b") if len(self.times.cells) == 1 else ("a_t", "b_t", "a_r", "b_r")
        return [f"timesteps/{name}" for name in (*names, "drop", "drop_std", "drop_corr", "sweep_drop")]

    def _metrics(self, a, b, u, drops, row):
        means = [jnp.mean(shape[:, d]) for d in range(a.shape[1]) for shape in (a, b)]
        u = u[:, 0] - jnp.mean(u[:, 0])
        centred, std = drops - jnp.mean(drops), jnp.std(drops)
        scale = jnp.linalg.norm(u) * jnp.linalg.norm(centred)
        corr = jnp.where(scale > 0, jnp.sum(u * centred) / jnp.where(scale > 0, scale, 1.0), 0.0)
        values = [*means, jnp.mean(drops), std, corr, jnp.sum(row)]
        return dict(zip(self._metric_names(), values, strict=True))
