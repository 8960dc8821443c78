"""FPMD: flow policy mirror descent, with a rectified flow (FPMD-R) or a MeanFlow (FPMD-M) as the policy.

Chen, Ma, Li, Wang and Dai, "One-Step Flow Policy Mirror Descent", arXiv 2507.23675 (2025): DPMD's mirror-descent
step, pi_new(a|s) ~ pi_old(a|s) exp(Q(s, a) / lambda), projected on flows instead of diffusions. Samples of pi_old
are regressed on, each weighted by exp(Q / lambda). The error of a single Euler step of a straight flow is bounded
by the variance of the policy, which falls as the policy improves. So FPMD-R samples in many steps while it learns
and in one when it has learned, and FPMD-M, whose network is the average velocity, in one step always.

Notation (paper symbol = name here):

    v_theta(a_t, t | s), u_theta(a_t, r, t | s) = actor        Q = critics        lambda = temperature

Time: the paper's rectified flow runs from noise at 0 to the action at 1, its MeanFlow from the action at 0 to noise
at 1, as everything here does. So here a_t = (1 - t) a + t eps and dx/dt = eps - a in both.

[P] the paper's abstract and introduction, [S] public reviews of it, [C] the first author's code as of September
2025, a month before the paper's second version, [I] inferred here, [T] tested here. We have not seen the paper's
equations.

Differs from the paper and its code in:
- [C] weights by exp(Q / (std lambda)) with Q as it is, which overflows or vanishes with returns. Here the weights'
  mean over the batch is divided out: the same direction, which is all that Adam sees [I]. As in the paper [S], the
  partition function of each state is left out, so that states of high value weigh more.
- The running deviation is that of the values of replayed actions, as in DPMD here; [C] takes the policy's.
- Terminal states have no weight: nobody acts in them, and the critics learn nothing there [I]; [C] weighs them.
- Sampling starts from N(0, I), where the flow is trained to start; [C] halves it.
- More than one step of the MeanFlow advances by its length; [C] advances by the whole average velocity each time,
  which is right for one step only.
- Candidates are compared where they are taken, in the box; [C] asks the critics before it clips.
- Time enters by Fourier features of 1 to 2 rad, in the MeanFlow as (t, t - r); [C] has sinusoids of at most 1 rad,
  of r and t. The MeanFlow learns its derivative in t, and low frequencies pay: after 5,000 steps on actions whose
  mean depends on the state, one step reproduced .995 of that dependence, and .71 with the 32 rad of SOM's network;
  the rectified flow had .98 and .97 [T].

On Pendulum, after 10,000 updates with 4 candidates and 2 x 64 units (one seed, two times ten episodes), evaluation
by one step of one sample returned -154 and -217 as FPMD-R, and -609 and -639 as FPMD-M. Of 4 samples the best
returned -150 either way: the MeanFlow's own samples are behind what the choice among them makes of them [T].
"""

import dataclasses
from abc import abstractmethod
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, PyTree

from eqgen import samplers
from eqgen.algorithms.actor_critic import AbstractActorCritic
from eqgen.exploration import AnnealedNoise, add_noise
from eqgen.meanflow import meanflow_target
from eqgen.networks.policies import MeanVelocity, Velocity


Action = Float[Array, " act"]
Obs = Float[Array, " obs"]


class AbstractFPMD(AbstractActorCritic):
    """What the two variants share: the weights, and one step when evaluated."""

    num_steps: eqx.AbstractVar[int]  # pyright: ignore[reportGeneralTypeIssues]  # it is no field yet
    """Steps of the flow while training: of the behaviour and of the samples regressed on."""
    num_eval_steps: int = 1
    num_eval_candidates: int = 1
    """Evaluation is one evaluation of the network [P]."""
    temperature: float = 3.0
    """lambda, in running standard deviations of Q [C]."""
    statistics_rate: float = 1e-3
    """How fast that deviation follows the batches' [C]."""
    max_frequency: float = 2.0
    """Of the Fourier features of time, in rad; see the head of this file [T]."""
    noise: AnnealedNoise = AnnealedNoise(target_entropy=-1.5, learning_rate=7e-3)  # [C]
    noise_on: Literal["candidates", "choice"] = "candidates"
    """Whether exploration noise is on every candidate when the best is chosen, in [C] since September 2025, or on
    the chosen one, in [C] before and in DPMD."""

    evaluation_policy = (
        "stochastic: best of num_eval_candidates samples by num_eval_steps steps, no exploration noise"
    )
    reports = ("loss", "weight_max", "q_deviation")

    def __check_init__(self):
        if self.noise_on == "candidates" and not self.noisy_target_action:
            raise ValueError(
                "noisy_target_action=False has no candidates without noise to take where noise_on='candidates'. "
                "Choose noise_on='choice'."
            )

    def shape(self, obs_size: int, action_size: int) -> tuple[Any, ...]:
        """What the actor's network is made of."""
        num_frequencies = 8
        return obs_size, action_size, self.hidden, self.activation, num_frequencies, self.max_frequency

    @abstractmethod
    def generate(self, actor: PyTree, obs: Obs, noise: Action) -> Action:
        """The flow's image of `noise` in `num_steps` steps, before clipping."""

    @abstractmethod
    def squared_error(
        self, actor: PyTree, obs: Obs, action: Action, *, key: Key[Array, ""]
    ) -> Float[Array, ""]:
        """The flow's regression on one action, at a random time: |prediction - target|^2 / d."""

    def sample(self, actor, critics, obs, *, key):
        return jnp.clip(self.generate(actor, obs, jr.normal(key, (actor.action_size,))), -1, 1)

    def draw(self, state, obs, *, key):
        if self.noise_on == "choice":
            return super().draw(state, obs, key=key)
        sample_key, noise_key = jr.split(key)
        return add_noise(super().draw(state, obs, key=sample_key), self.noise_std(state), key=noise_key)

    def explore(self, state, action, *, key):
        return action if self.noise_on == "candidates" else super().explore(state, action, key=key)

    def act(self, state, obs, *, key, explore):
        if explore:
            return super().act(state, obs, key=key, explore=True)
        evaluated = dataclasses.replace(self, num_steps=self.num_eval_steps, noise_on="choice")
        return super(AbstractFPMD, evaluated).act(state, obs, key=key, explore=False)

    def actor_loss(self, actor, state, batch, next_actions, *, key):
        q = jax.vmap(lambda s, a: self.q_value(state.critics, s, a))(batch.next_obs, next_actions)
        scaled, alive = q / ((state.memory + 1e-6) * self.temperature), ~batch.terminated
        weights = len(q) * jnp.where(alive, jax.nn.softmax(scaled, where=alive), 0.0)  # also if none is alive
        error = lambda s, a, k: self.squared_error(actor, s, a, key=k)
        errors = jax.vmap(error)(batch.next_obs, next_actions, jr.split(key, len(q)))
        values = (jnp.mean(weights * errors), jnp.max(weights), state.memory)
        return values[0], {f"actor/{name}": value for name, value in zip(self.reports, values, strict=True)}

    def adapt(self, state, batch, *, key):
        state = super().adapt(state, batch, key=key)
        q = jax.vmap(lambda s, a: self.q_value(state.critics, s, a))(batch.obs, batch.action)
        std = state.memory + self.statistics_rate * (jnp.std(q) - state.memory)
        return dataclasses.replace(state, memory=std)

    def initial_memory(self, obs_size, action_size, *, key):
        return jnp.ones(())


class FPMDR(AbstractFPMD):
    """FPMD-R: the actor is the velocity of a rectified flow."""

    num_steps: int = 20
    """[C]."""

    sizes = {
        "smoke": dict(hidden=(32, 32), num_steps=3, num_candidates=2),
        "cpu": dict(hidden=(256, 256), num_candidates=8),
        "paper": dict(),
    }

    def make_actor(self, obs_size, action_size, *, key):
        return Velocity(*self.shape(obs_size, action_size), key=key)

    def generate(self, actor, obs, noise):
        return samplers.euler(actor.at(obs), noise, samplers.uniform_grid(self.num_steps))[0]

    def squared_error(self, actor, obs, action, *, key):
        time_key, noise_key = jr.split(key)
        t, eps = jr.uniform(time_key), jr.normal(noise_key, action.shape)
        return jnp.mean((actor((1 - t) * action + t * eps, t, obs) - (eps - action)) ** 2)


class FPMDM(AbstractFPMD):
    """FPMD-M: the actor is the average velocity, a MeanFlow."""

    num_steps: int = 1
    """[S]."""
    flow_ratio: float = 0.0
    """Share of the intervals with r = t, plain flow matching; 0 in [C], 0.75 in the MeanFlow paper."""

    sizes = {
        "smoke": dict(hidden=(32, 32), num_candidates=2),
        "cpu": dict(hidden=(256, 256), num_candidates=8),
        "paper": dict(),
    }

    def make_actor(self, obs_size, action_size, *, key):
        return MeanVelocity(*self.shape(obs_size, action_size), key=key)

    def generate(self, actor, obs, noise):
        mean_velocity = lambda x, r, t: actor(x, r, t, obs)
        return samplers.meanflow(mean_velocity, noise, samplers.uniform_grid(self.num_steps))[0]

    def interval(self, *, key: Key[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """(r, t): two uniform times in order or, with probability `flow_ratio`, a single one twice [C]."""
        pair_key, flow_key = jr.split(key)
        first, second = jr.uniform(pair_key, (2,))
        second = jnp.where(jr.bernoulli(flow_key, self.flow_ratio), first, second)
        return jnp.minimum(first, second), jnp.maximum(first, second)

    def squared_error(self, actor, obs, action, *, key):
        time_key, noise_key = jr.split(key)
        r, t = self.interval(key=time_key)
        eps = jr.normal(noise_key, action.shape)
        mean_velocity = lambda x, r, t: actor(x, r, t, obs)
        u, target = meanflow_target(mean_velocity, (1 - t) * action + t * eps, r, t, eps - action)
        return jnp.mean((u - target) ** 2)
