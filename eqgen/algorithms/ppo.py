"""PPO: proximal policy optimisation, the on-policy reference.

Schulman, Wolski, Dhariwal, Radford and Klimov, "Proximal Policy Optimization Algorithms", arXiv 1707.06347 (2017):
from each rollout of the current policy several epochs of minibatch steps are taken on the policy gradient's
surrogate r A, r = pi(a|s) / pi_old(a|s), which is clipped so that moving r out of [1 - epsilon, 1 + epsilon] gains
nothing.

Notation (paper symbol = name here):

    pi_theta = policy           V = value                   A_t = advantage
    T = rollout_length          N = num_envs of the loop    M = minibatch_size        K = epochs
    gamma = discount            lambda = trace_decay        epsilon = clip
    c_1 = value_weight          c_2 = entropy_weight

[P] the paper, its Table 3 (MuJoCo) and Section 6.1; [C1] the authors' code of its time (Baselines, ppo1), [C2]
their later one (Baselines, ppo2), [I] inferred here, [T] tested here.

`update` takes one rollout and makes K T N / M gradient steps; it is what `step` and the log's `updates` count. The
loop changes no parameter between updates, so log pi_old and V of the rollout are not stored while acting: they are
computed at the beginning of `update`, from the state that acted.

Differs from the paper and its code in:
- The Gaussian is squashed by tanh, since actions are in the box; in [C1, C2] the environment clips them. A stored
  action's density is taken at its inverse tanh, the same in pi and pi_old, whose Jacobians cancel.
- A truncated step bootstraps from its true next observation. [C1, C2] take the time limit for the task's end.
- Observations are normalised by running moments, as in [C1, C2]. They move at the end of an update, so that pi_old
  is the policy that acted; [C1] moves them before it computes pi_old.
- Rewards stay as they are; [C2] divides them by the deviation of running returns, which needs to know of every
  environment's past. Instead V is learnt in units of the running moments of its targets, and is 0 at first; when
  the moments move its last layer is rescaled so that V stays what it was (van Hasselt et al., arXiv 1602.07714).
  So what is learned does not depend on the scale of rewards [I, T].
- The value loss is the paper's square, (V - target)^2, not [C2]'s clipped one.
- The learning rate is constant [P] unless `decay_updates` is given; [C1, C2] let it fall to 0 by the end of a run.
- Epochs are cut into minibatches as one stream, so that T N need not be a multiple of M [I].
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key, ScalarLike

from eqgen.algorithms.base import AbstractOnPolicyAgent, gradient_step, vector_sizes
from eqgen.data.normalizer import RunningNormalizer
from eqgen.losses import generalized_advantages
from eqgen.networks.mlp import MLP
from eqgen.networks.policies import TanhGaussianPolicy
from eqgen.tree import filter_scan
from eqgen.types import Metrics


Networks = tuple[TanhGaussianPolicy, MLP]
"""The policy and V, both of normalised observations; V in units of its targets' moments."""


class PPOState(eqx.Module):
    """Everything that evolves, once per rollout."""

    networks: Networks
    opt_state: optax.OptState
    observations: RunningNormalizer
    targets: RunningNormalizer
    step: Int[Array, ""]


class Samples(eqx.Module):
    """What the steps of a rollout are to the loss; `target` is that of V, normalised."""

    obs: Float[Array, "*batch obs"]
    action: Float[Array, "*batch act"]
    log_prob: Float[Array, "*batch"]
    advantage: Float[Array, "*batch"]
    target: Float[Array, "*batch"]


class PPO(AbstractOnPolicyAgent):
    """Hyperparameters and methods of PPO."""

    rollout_length: int = 2048
    """T: steps of each environment in a rollout [P], whose MuJoCo runs have one."""
    epochs: int = 10
    """K: how often each step of a rollout is learned from [P]."""
    minibatch_size: int = 64
    """M: steps in a minibatch [P]; all of a shorter rollout."""
    clip: float = 0.2
    """epsilon: how far the ratio of probabilities may move from 1 [P]."""
    discount: float = 0.99
    """gamma, in [0, 1) [P]."""
    trace_decay: float = 0.95
    """lambda of the advantages, in [0, 1] [P]."""
    learning_rate: float = 3e-4
    """Of Adam [P]."""
    adam_eps: float = 1e-5
    """Adam's epsilon [C1, C2]."""
    decay_updates: int = 0
    """Updates after which the learning rate has fallen to 0, linearly; 0: it stays [P]."""
    max_gradient_norm: float = 0.5
    """What the norm of the gradient of both networks is cut at [C2]."""
    value_weight: float = 0.5
    """c_1, of half the squared error [C2]; beside the cut at a norm Adam hardly sees it."""
    entropy_weight: float = 0.0
    """c_2 [P]."""
    normalize_observations: bool = True
    """Whether networks see z-scores by all observations so far [C1, C2]."""
    observation_clip: float = 10.0
    """What these are cut at, plus and minus [C2]."""
    normalize_targets: bool = True
    """Whether V is learnt in units of its targets' moments [I]."""
    hidden: tuple[int, ...] = (64, 64)
    """Of each of the two networks, which share nothing [P]."""
    activation: str = "tanh"
    """Behind every hidden layer [P]."""

    sizes = {
        "smoke": dict(rollout_length=10, epochs=2, minibatch_size=8, hidden=(32, 32)),
        "cpu": dict(rollout_length=256),  # the paper's 2048 steps in 8 environments
        "paper": dict(),
    }
    evaluation_policy = "greedy: tanh of the Gaussian's mean"

    def __check_init__(self):
        for name in ("epochs", "minibatch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    def normalized(self, state: PPOState, obs: Float[Array, "*batch obs"]) -> Float[Array, "*batch obs"]:
        """Observations as the networks see them."""
        if not self.normalize_observations:
            return obs
        return jnp.clip(state.observations(obs), -self.observation_clip, self.observation_clip)

    def act(self, state, obs, *, key, explore):
        policy, obs = state.networks[0], self.normalized(state, obs)
        return policy.sample(obs, key=key)[0] if explore else policy.mode(obs)

    # --- The loss (Eq. 9, to be descended) ---

    def surrogate(
        self, log_ratio: Float[Array, " batch"], advantage: Float[Array, " batch"]
    ) -> Float[Array, " batch"]:
        """min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) (Eq. 7)."""
        ratio = jnp.exp(log_ratio)
        return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - self.clip, 1 + self.clip) * advantage)

    def loss(
        self, networks: Networks, batch: Samples, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """-L^CLIP + c_1 L^VF - c_2 S on a minibatch, whose advantages are standardised [C2]."""
        policy, value = networks
        log_ratio = jax.vmap(policy.log_prob)(batch.obs, batch.action) - batch.log_prob
        advantage = (batch.advantage - jnp.mean(batch.advantage)) / (jnp.std(batch.advantage) + 1e-8)
        actor_loss = -jnp.mean(self.surrogate(log_ratio, advantage))
        critic_loss = 0.5 * jnp.mean((jax.vmap(value)(batch.obs) - batch.target) ** 2)
        loss = actor_loss + self.value_weight * critic_loss
        if self.entropy_weight:
            keys = jr.split(key, len(batch.obs))
            loss += self.entropy_weight * jnp.mean(
                jax.vmap(lambda s, k: policy.sample(s, key=k)[1])(batch.obs, keys)
            )
        metrics = {
            "actor/loss": actor_loss,
            "actor/clipped": jnp.mean(jnp.abs(jnp.expm1(log_ratio)) > self.clip),
            "actor/kl": jnp.mean(jnp.expm1(log_ratio) - log_ratio),
            "critic/loss": critic_loss,
        }
        return loss, metrics

    # --- Updates ---

    def optimizer(self, step: ScalarLike) -> optax.GradientTransformation:
        """Adam at the learning rate of update number `step`, the gradient's norm cut."""
        rate = self.learning_rate
        if self.decay_updates:
            rate *= jnp.maximum(0.0, 1 - step / self.decay_updates)
        return optax.chain(
            optax.clip_by_global_norm(self.max_gradient_norm), optax.adam(rate, eps=self.adam_eps)
        )

    def minibatches(self, num_samples: int, *, key: Key[Array, ""]) -> Int[Array, "steps size"]:
        """Which samples each gradient step sees: `epochs` permutations of all, one after another, cut in pieces.

        Less than one piece is left over at the end of the last epoch.
        """
        permute = lambda key: jr.permutation(key, num_samples)
        rows = jax.vmap(permute)(jr.split(key, self.epochs)).reshape(-1)
        size = min(self.minibatch_size, num_samples)
        steps = rows.size // size
        return rows[: steps * size].reshape(steps, size)

    def update(self, state, batch, *, key):
        row_key, loss_key = jr.split(key)
        (policy, value), targets = state.networks, state.targets
        obs, next_obs = self.normalized(state, batch.obs), self.normalized(state, batch.next_obs)
        each = lambda fn: jax.vmap(jax.vmap(fn))  # over time and environments
        log_prob = each(policy.log_prob)(obs, batch.action)
        v, next_v = (targets.inverse(each(value)(s)) for s in (obs, next_obs))
        advantage = generalized_advantages(
            batch, v, next_v, discount=self.discount, trace_decay=self.trace_decay
        )
        if self.normalize_targets:
            targets = targets.update((v + advantage).reshape(-1))
            value = in_other_units(value, state.targets, targets)
        samples = Samples(obs, batch.action, log_prob, advantage, targets(v + advantage))
        samples = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), samples)

        optimizer = self.optimizer(state.step)
        rows = self.minibatches(len(samples.target), key=row_key)

        def gradient_step_on(carry, xs):
            (networks, opt_state), (rows, key) = carry, xs
            minibatch = jax.tree.map(lambda x: x[rows], samples)
            grads, metrics = eqx.filter_grad(self.loss, has_aux=True)(networks, minibatch, key=key)
            return gradient_step(optimizer, networks, opt_state, grads), metrics

        carry, xs = ((policy, value), state.opt_state), (rows, jr.split(loss_key, len(rows)))
        (networks, opt_state), metrics = filter_scan(gradient_step_on, carry, xs)
        observations = state.observations
        if self.normalize_observations:
            observations = observations.update(batch.obs.reshape(-1, obs.shape[-1]))
        metrics = jax.tree.map(jnp.mean, metrics)
        metrics |= {"actor/entropy": -jnp.mean(log_prob), "critic/value": jnp.mean(v)}
        return PPOState(networks, opt_state, observations, targets, state.step + 1), metrics

    # --- Initial state ---

    def init(self, example, *, key):
        obs_size, action_size = vector_sizes(example)
        policy_key, value_key = jr.split(key)
        # Weights of scale 1 / sqrt(inputs), the last of the policy 0.01 times that, std 1 [C1, C2]; V = 0 [I].
        shared = (self.hidden, self.activation)
        policy = TanhGaussianPolicy(
            obs_size,
            action_size,
            *shared,
            initialization="truncated_normal",
            state_dependent_std=False,
            key=policy_key,
        )
        value = MLP((obs_size,), "scalar", *shared, "truncated_normal", key=value_key)
        policy = eqx.tree_at(lambda p: p.net, policy, scaled(policy.net, 0.01))
        return self.from_networks(policy, scaled(value, 0.0), obs_size)

    def from_networks(self, policy: TanhGaussianPolicy, value: MLP, obs_size: int) -> PPOState:
        """A fresh state around networks of your own."""
        networks = (policy, value)
        return PPOState(
            networks=networks,
            opt_state=self.optimizer(0).init(eqx.filter(networks, eqx.is_inexact_array)),
            observations=RunningNormalizer.create((obs_size,)),
            targets=RunningNormalizer.create(()),
            step=jnp.zeros((), jnp.int32),
        )


def scaled(net: MLP, factor: ScalarLike, offset: ScalarLike = 0.0) -> MLP:
    """The network that returns `factor` times what `net` does, plus `offset`."""
    last = lambda net: (net.layers[-1].weights, net.layers[-1].bias)
    (weight,), bias = last(net)
    return eqx.tree_at(last, net, ((factor * weight,), factor * bias + offset))


def in_other_units(net: MLP, old: RunningNormalizer, new: RunningNormalizer) -> MLP:
    """The network that says in units of `new` what `net` says in units of `old`."""
    return scaled(net, old.std / new.std, (old.mean - new.mean) / new.std)
