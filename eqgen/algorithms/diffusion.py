"""A diffusion model of points, trajectories or images, alone or by class, and trained at times of any law.

Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", arXiv 2006.11239 (2020): the chain, its variational
bound, and a network that predicts the noise, trained on the unweighted error. What the network predicts is a field
(the noise, the clean example, v, the score, the velocity of flow matching), and so are the times it is trained at
and their weight (`eqgen.timesteps`), which is what the adaptive sampler of Kim et al. 2024 (arXiv 2411.09998)
learns. With classes, labels are dropped at random for classifier-free guidance (Ho & Salimans 2022, 2207.12598).

Notation (paper symbol = name here; step k of a chain of T is the time (k + 1) / T of its schedule):

    x_0 = x        x_t = noised        eps = eps        eps_theta = model (whatever `prediction` says)
    ab_t = alpha^2 = 1 - sigma^2       c_t = BoundWeight        L = bound        T = times.num_steps

Differs from DDPM in:
- The moving average forgets its beginning at once (`debias`); DDPM's code ramps the decay up, which ends alike.
- Networks are small and meant for a CPU unless the size is "paper": the sizes of DDPM's for CIFAR-10,
  with 8 groups in the group norm instead of 32, and no dropout by default.
- Learning rates are constant after the warm-up, as there; nothing anneals them.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, Self, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from eqgen.algorithms.base import AbstractOfflineLearner, Trained, averaging_rate
from eqgen.data.examples import Examples
from eqgen.networks.temporal import DiT1D
from eqgen.networks.unet import UNet1D
from eqgen.networks.unet2d import UNet2D
from eqgen.networks.vector_denoiser import VectorDenoiser
from eqgen.parameterizations import Kind, convert, from_x0_and_eps
from eqgen.samplers import ddim, uniform_grid
from eqgen.timesteps.adaptive import AdaptiveTimesteps
from eqgen.timesteps.base import AbstractTimestepSampler
from eqgen.timesteps.heuristics import StaticTimesteps
from eqgen.timesteps.times import AbstractTimes, ContinuousTimes, DiffusionChain, FlowIntervals
from eqgen.timesteps.weightings import BoundWeight


Labelled = tuple[Array, Int[Array, "*batch"]]
"""Data and classes: what a model with classes is trained on."""


class DiffusionState(eqx.Module):
    """The network, what the timestep sampler has learnt, and the shape of an example."""

    model: Trained
    timesteps: PyTree
    step: Int[Array, ""]
    shape: tuple[int, ...] = eqx.field(static=True)


class Bound(NamedTuple):
    """The parts of the variational bound, in bits per dimension, means over examples."""

    terms: Float[Array, " steps"]
    """KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k)) of every step k, as if step 0 were one of them."""
    decoder: Float[Array, ""]
    """-log p(x_0 | x at step 0), which is what step 0 really costs."""
    prior: Float[Array, ""]
    """KL(q(x at the last step | x_0) || N(0, I))."""

    def total(self, *, last: bool = True) -> Float[Array, "*seeds"]:
        """decoder + terms of the steps from 1 on + prior; without the last step's term if `last` is False, which on
        the cosine schedule has weight 500 and drowns the others."""
        end = None if last else -1
        return self.decoder + jnp.sum(self.terms[..., 1:end], axis=-1) + self.prior


class Diffusion(AbstractOfflineLearner):
    """Hyperparameters and methods of the model. The defaults are DDPM's for data of unit variance.

    **Arguments:**

    - `timesteps`: the times of training and the weight of the loss; its `times` are those of the model. Any but
      `FlowIntervals`.
    - `prediction`: what the network predicts; "velocity" needs `ContinuousTimes`.
    - `precondition`: the network sees x_t / s and its v is multiplied by s, s^2 = alpha^2 + sigma^2, so that
      nothing explodes with the variance: the preconditioning of Karras et al. (2022) for data of unit variance.
      For "v" only; nothing changes where s = 1.
    - `network`: "auto" by the rank of an example: 1 "mlp", 2 "dit", 3 "unet". An MLP takes any, flattened.
    - `hidden`: of the MLP; `width`, `depth`, `num_heads`: of the transformer; `width`, `multipliers`,
      `num_blocks`, `attention`, `dropout`: of the U-Net of images; that of trajectories has `width` and
      `multipliers` alone.
    - `num_classes`: 0: labels are ignored. Else batches must have them; a share `label_dropout` is left out.
    - `learning_rate`, `warmup` (updates), `max_grad_norm` (None: no clipping): of Adam.
    - `average`: decay of the moving average, which samples.
    """

    timesteps: AbstractTimestepSampler = StaticTimesteps(DiffusionChain(1000))
    prediction: Kind = "eps"
    precondition: bool = False
    network: Literal["auto", "mlp", "dit", "unet"] = "auto"
    hidden: tuple[int, ...] = (256, 256, 256)
    width: int = 128
    depth: int = 2
    num_heads: int = 4
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention: tuple[int, ...] = (1,)
    dropout: float = 0.0
    num_classes: int = 0
    label_dropout: float = 0.1
    learning_rate: float = 2e-4
    warmup: int = 0
    max_grad_norm: float | None = 1.0
    average: float = 0.9999
    debias: bool = True
    total_updates: int = 800_000

    sizes = {
        "smoke": dict(
            hidden=(16,),
            width=8,
            depth=1,
            num_heads=2,
            multipliers=(1, 2),
            num_blocks=1,
            attention=(),
            total_updates=40,
        ),
        "cpu": dict(
            hidden=(128, 128, 128),
            width=32,
            multipliers=(1, 2),
            num_blocks=1,
            attention=(),
            learning_rate=1e-3,
            average=0.999,
            total_updates=10_000,
        ),
        "paper": dict(),
    }

    def __check_init__(self):
        if isinstance(self.times, FlowIntervals):
            raise ValueError(
                "Diffusion: the times are FlowIntervals, pairs (r, t), which one-step models are trained at. "
                "Choose DiffusionChain or ContinuousTimes."
            )
        if self.prediction == "velocity" and isinstance(self.times, DiffusionChain):
            raise ValueError(
                "Diffusion: prediction='velocity' needs ContinuousTimes; a chain has no velocity."
            )
        if self.precondition and self.prediction != "v":
            raise ValueError(f"Diffusion: precondition=True is for prediction='v', not {self.prediction!r}.")
        if self.total_updates < 1 or self.num_classes < 0 or self.warmup < 0:
            raise ValueError(
                f"Diffusion: total_updates={self.total_updates}, num_classes={self.num_classes} and "
                f"warmup={self.warmup}: at least 1, 0 and 0 are needed."
            )
        for name in ("average", "label_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Diffusion: {name}={getattr(self, name)} must lie in [0, 1).")

    @classmethod
    def profiles(cls) -> Mapping[str, Self]:
        """ "adaptive": the adaptive sampler with its robust settings; "adaptive-paper": on the released code's
        chain for CIFAR-10, with its constants and optimiser."""
        chain = DiffusionChain(1000, betas="quad", variance="large")
        released: dict[str, Any] = dict(dropout=0.1, warmup=5_000)
        return {
            "default": cls(),
            "adaptive": cls(timesteps=AdaptiveTimesteps(DiffusionChain(1000))),
            "adaptive-paper": cls(timesteps=AdaptiveTimesteps.paper(chain, policy="image_flat"), **released),
        }

    @property
    def times(self) -> AbstractTimes:
        """The times of the model, those of its timestep sampler."""
        return self.timesteps.times

    # --- The model ---

    def predict(
        self,
        model: Any,
        noised: Float[Array, "*x"],
        time: Float[Array, ""],
        label: Int[Array, ""] | None = None,
        kept: Float[Array, ""] | float = 1.0,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*x"]:
        """What `prediction` says, of one example at a time of the schedule; `kept = 0` drops the label, `key` is
        dropout's."""
        schedule = self.times.schedule
        scale = 1.0
        if self.precondition:
            scale = jnp.sqrt(schedule.alpha(time) ** 2 + schedule.sigma(time) ** 2)
        labels = () if label is None else (label, kept)
        dropout = {"key": key} if self.dropout else {}
        return scale * model(noised / scale, time, *labels, **dropout)

    def denoiser(
        self,
        state: DiffusionState,
        label: Int[Array, ""] | None = None,
        *,
        weight: float = 1.0,
        clip: tuple[float, float] | None = None,
    ) -> Callable[[Array, Array], Array]:
        """The function (x_t, t) to E[x_0 given x_t] of the averaged network, which `eqgen.samplers` take.

        **Arguments:**

        - `label`: a class; None is all of them.
        - `weight`: of classifier-free guidance; 1 is the conditional model, more exaggerates.
        - `clip`: the range that x_0 is clipped to.

        **Raises:** `ValueError` for a label where there are no classes, or a weight without a label.
        """
        if label is None and weight != 1:
            raise ValueError(f"weight={weight} guides towards a class: pass its label.")
        if label is not None and not self.num_classes:
            raise ValueError("This model has no classes: train one with Diffusion(num_classes=...).")
        model = eqx.nn.inference_mode(state.model.average)
        schedule = self.times.schedule
        anything = jnp.zeros((), jnp.int32) if self.num_classes else None

        def denoise(x, t):
            predict = partial(self.predict, model, x, t)
            if label is None:
                found = predict(anything, 0.0)
            elif weight == 1:
                found = predict(label)
            else:
                found = weight * predict(label) + (1 - weight) * predict(label, 0.0)
            x_0 = convert(found, x, t, schedule, source=self.prediction, target="x0")
            return x_0 if clip is None else jnp.clip(x_0, *clip)

        return denoise

    def sample(
        self,
        state: DiffusionState,
        *,
        key: Key[Array, ""],
        num_steps: int = 50,
        eta: float = 0.0,
        label: Int[Array, ""] | None = None,
        weight: float = 1.0,
        clip: tuple[float, float] | None = None,
    ) -> Float[Array, "*x"]:
        """One example (`jax.vmap` over keys makes many), by DDIM on an even grid; `eta = 1` with all the steps of a
        chain is DDPM's ancestral sampling. Other arguments as in `denoiser`."""
        start_key, key = jr.split(key)
        times, schedule = self.times, self.times.schedule
        if isinstance(times, DiffusionChain):
            if num_steps > times.num_steps:
                raise ValueError(f"num_steps={num_steps}: the chain has {times.num_steps}.")
            high = 1.0
            ts = jnp.round(uniform_grid(num_steps, high, 0.0) * times.num_steps) / times.num_steps
        elif isinstance(times, ContinuousTimes | FlowIntervals):
            high = times.high
            ts = uniform_grid(num_steps, high, times.low)
        else:
            raise ValueError(f"There is no grid of sampling times for {type(times).__name__}.")
        start = schedule.sigma(high) * jr.normal(start_key, state.shape)
        denoise = self.denoiser(state, label, weight=weight, clip=clip)
        return ddim(denoise, start, ts, schedule, eta=eta, key=key)[0]

    # --- Losses ---

    def objective(
        self, model: Any, x: Array | Labelled, t: Shaped[Array, ""], key: Key[Array, ""]
    ) -> Float[Array, ""]:
        """The mean squared error of the prediction for one example at one of `times`, unweighted."""
        eps_key, drop_key, dropout_key = jr.split(key, 3)
        x, labels = self._parts(x)
        if labels:
            labels = (*labels, jr.bernoulli(drop_key, 1 - self.label_dropout).astype(x.dtype))
        eps, time, schedule = jr.normal(eps_key, x.shape), self.times.time(t), self.times.schedule
        target = from_x0_and_eps(x, eps, time, schedule, kind=self.prediction)
        predicted = self.predict(model, schedule.perturb(x, eps, time), time, *labels, key=dropout_key)
        return jnp.mean((predicted - target) ** 2)

    def bound(
        self,
        model: Any,
        x: Array | Labelled,
        *,
        half_bin: float | None = None,
        per_step: int | None = None,
        key: Key[Array, ""],
    ) -> Bound:
        """The variational bound on -log p(x), in bits per dimension, on a table of noise fixed by the key.

        **Arguments:**

        - `model`: such as `state.model.average`; dropout is off, labels are dropped at their rate.
        - `half_bin`: half the distance of two levels, for data of finitely many levels in [-1, 1], each of which
          stands for the values nearer to it than to others. None: a density.
        - `per_step`: how many of the examples each step is estimated from, taking turns; None is all.

        **Raises:** `ValueError` where the times are no `DiffusionChain`, of which this is the bound.
        """
        if not isinstance(self.times, DiffusionChain):
            raise ValueError(
                f"The bound is of a DiffusionChain; in {type(self.times).__name__} BoundWeight makes its density."
            )
        model, chain, n = eqx.nn.inference_mode(model), self.times, jax.tree.leaves(x)[0].shape[0]
        some = n if per_step is None else min(per_step, n)
        noise_key = lambda k, i: jr.fold_in(jr.fold_in(key, k), i)

        def error(k):
            rows = (k * some + jnp.arange(some)) % n
            one = lambda x, i: self.objective(model, x, k, noise_key(k, i))
            return jnp.mean(jax.vmap(one)(jax.tree.map(lambda x: x[rows], x), rows))

        block = min(chain.num_steps, max(1, 256 // some))
        errors = jax.lax.map(error, chain.points(), batch_size=block)
        terms = BoundWeight(prediction=self.prediction)(chain.points(), chain) * errors
        decode = lambda x, i: self._decoder(model, x, half_bin, noise_key(0, i))
        decoder = jnp.mean(jax.vmap(decode)(x, jnp.arange(n)))
        last = float(chain.tables.alpha_bar[-1])
        squares = jnp.mean(self._parts(x)[0] ** 2)
        prior = 0.5 * (last * squares - last - math.log1p(-last)) / math.log(2)
        return Bound(terms, decoder, prior)

    def _decoder(self, model, x, half_bin, key):
        """-log2 p(x_0 | x at step 0), a mean over dimensions, with the noise that `objective` has at step 0."""
        eps_key, _, _ = jr.split(key, 3)
        x, labels = self._parts(x)
        schedule, time = self.times.schedule, self.times.time(jnp.zeros((), jnp.int32))
        noised = schedule.perturb(x, jr.normal(eps_key, x.shape), time)
        predicted = self.predict(model, noised, time, *labels)
        eps = convert(predicted, noised, time, schedule, source=self.prediction, target="eps")
        chain = cast(DiffusionChain, self.times)  # `bound` has seen to it
        beta = float(chain.tables.beta[0])
        mean = (noised - beta / schedule.sigma(time) * eps) / math.sqrt(1 - beta)
        std = math.sqrt(chain.reverse_variance()[0])
        if half_bin is None:
            return -jnp.mean(norm.logpdf(x, mean, std)) / math.log(2)
        # Mirrored into the lower tail, where the distribution function is small and differences are exact.
        side = jnp.where(x > mean, -1.0, 1.0)
        cdf = lambda edge: norm.logcdf(side * (edge - mean) / std)
        low = jnp.where(side * x - half_bin < -1, -jnp.inf, cdf(x - side * half_bin))
        high = jnp.where(side * x + half_bin > 1, 0.0, cdf(x + side * half_bin))
        gap = jnp.minimum(low - high, -jnp.finfo(x.dtype).eps)
        return -jnp.mean(high + jnp.log(-jnp.expm1(gap))) / math.log(2)

    def _parts(self, x: Any) -> tuple[Array, tuple[Array, ...]]:
        """Data, and the labels in a tuple of their own, empty without classes."""
        return (x[0], (x[1],)) if self.num_classes else (x, ())

    # --- Update ---

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam, its rate rising over `warmup` updates."""
        rate = (
            optax.linear_schedule(0.0, self.learning_rate, self.warmup) if self.warmup else self.learning_rate
        )
        adam = optax.adam(rate)
        return (
            adam
            if self.max_grad_norm is None
            else optax.chain(optax.clip_by_global_norm(self.max_grad_norm), adam)
        )

    def update(self, state, batch, *, key):
        """One step of the network on `mean(weight * objective)`, and then one of the timestep sampler."""
        t_key, noise_key, look_key = jr.split(key, 3)
        x, n = self.inputs(batch), len(batch.x)
        draw = self.timesteps.sample(state.timesteps, n, x=x, key=t_key)

        def loss(model):
            losses = jax.vmap(partial(self.objective, model))(x, draw.t, jr.split(noise_key, n))
            return jnp.mean(draw.weight * losses), losses

        rate = averaging_rate(self.average, state.step, debias=self.debias)
        model, (value, losses) = state.model.step(self.optimizer, loss, rate=rate, has_aux=True)
        timesteps = self.timesteps.update(
            state.timesteps,
            draw,
            losses,
            before=state.model.online,
            after=model.online,
            x=x,
            objective=self.objective,
            key=look_key,
        )
        metrics = {"loss": jnp.mean(losses), "weighted_loss": value} | self.timesteps.metrics(timesteps)
        return DiffusionState(model, timesteps, state.step + 1, state.shape), metrics

    def inputs(self, batch: Examples) -> Array | Labelled:
        """What `objective` and `bound` take: the data, with their classes if there are any.

        **Raises:** `ValueError` where classes are missing.
        """
        if self.num_classes and batch.label is None:
            raise ValueError(
                f"num_classes={self.num_classes}, and the data have no labels: use num_classes=0."
            )
        return batch.x if batch.label is None or not self.num_classes else (batch.x, batch.label)

    # --- Initial state ---

    def init(self, example, *, key):
        """A fresh state; `example` is one of `Examples`, without a leading axis.

        **Raises:** `ValueError` where the network does not fit the example.
        """
        network_key, timesteps_key = jr.split(key)
        return self.from_network(example, self._network(example.x.shape, network_key), key=timesteps_key)

    def from_network(self, example: Examples, network: Any, *, key: Key[Array, ""]) -> DiffusionState:
        """A fresh state around a network of your own: `network(x, time)`, with classes `network(x, time, label,
        kept)`, with dropout also `key=`; `time` lies in [0, 1]."""
        timesteps = self.timesteps.init(self.inputs(example), key=key)
        model = Trained.begin(network, self.optimizer)
        return DiffusionState(model, timesteps, jnp.zeros((), jnp.int32), example.x.shape)

    def _network(self, shape, key):
        rank = len(shape)
        kind = {1: "mlp", 2: "dit", 3: "unet"}.get(rank) if self.network == "auto" else self.network
        match kind, rank:
            case "mlp", _:
                if self.dropout:
                    raise ValueError(f"dropout={self.dropout}: the MLP has none.")
                return VectorDenoiser(shape, self.hidden, self.num_classes, key=key)
            case "unet", 3:
                return UNet2D(
                    shape,
                    self.width,
                    self.multipliers,
                    num_blocks=self.num_blocks,
                    attention=self.attention,
                    num_classes=self.num_classes,
                    dropout=self.dropout,
                    key=key,
                )
            case (("dit" | "unet"), 2):
                if self.num_classes or self.dropout:
                    raise ValueError(
                        f"num_classes={self.num_classes}, dropout={self.dropout}: networks of trajectories have "
                        "neither classes nor dropout. Pass one of your own to from_network."
                    )
                if kind == "unet":
                    return UNet1D(shape[1], self.width, self.multipliers, key=key)
                return DiT1D(shape[1], self.width, self.depth, self.num_heads, key=key)
        raise ValueError(f"network={self.network!r} has no form for examples of shape {shape}.")
