"""TD3: twin delayed deep deterministic policy gradient.

Fujimoto, van Hoof and Meger, "Addressing Function Approximation Error in Actor-Critic Methods",
arXiv 1802.09477 (2018): a deterministic actor climbs the critic, and three measures keep the critic's errors from
being climbed instead. The target takes the minimum of two critics, the actor and the targets move less often than
the critics, and the target's action is blurred by clipped noise (target policy smoothing).

Notation (paper symbol = name here):

    pi_phi = actor          Q_theta1, Q_theta2 = critics         d = policy_delay
    sigma-tilde = smoothing_std       c = smoothing_clip         sigma = exploration_std

[P] the paper, [C] its public code (whose constants are the ones in use since: 2 x 256 units and a rate of 3e-4,
where the paper has 400 and 300 units and 1e-3).

Differs from the paper and its code in:
- The actor moves at the first update of the critics, the third and so on; [C] begins with the second.
- `noisy_target_action=False` leaves the smoothing out.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr

from eqgen.algorithms.actor_critic import AbstractActorCritic
from eqgen.networks.policies import DeterministicPolicy


class TD3(AbstractActorCritic):
    """Hyperparameters and methods of TD3."""

    num_candidates: int = 1
    num_eval_candidates: int = 1
    bootstrap_with: Literal["online", "target"] = "target"
    exploration: Literal["annealed", "constant", "none"] = "constant"
    exploration_std: float = 0.1
    """sigma, of the noise on the behaviour's action, in units of the box [-1, 1] [P]."""
    smoothing_std: float = 0.2
    """Standard deviation of the noise on the target's action [P]."""
    smoothing_clip: float = 0.5
    """What that noise is cut at, plus and minus [P]."""
    reward_scale: float = 1.0
    final_actor_learning_rate: float = 3e-4
    """Equal to `actor_learning_rate`: no decay [P]."""
    hidden: tuple[int, ...] = (256, 256)
    activation: str = "relu"

    sizes = {"smoke": dict(hidden=(32, 32)), "cpu": dict(), "paper": dict()}
    evaluation_policy = "deterministic: the actor's action"

    def __check_init__(self):
        for name in ("num_candidates", "num_eval_candidates", "num_target_candidates"):
            if (value := getattr(self, name)) not in (1, None):
                raise ValueError(f"{name} is {value}; the actor is deterministic, so that it must be 1.")

    def make_actor(self, obs_size, action_size, *, key):
        return DeterministicPolicy(obs_size, action_size, self.hidden, self.activation, key=key)

    def sample(self, actor, critics, obs, *, key):
        return actor(obs)

    def blur(self, state, action, *, key):
        noise = self.smoothing_std * jr.normal(key, action.shape)
        return jnp.clip(action + jnp.clip(noise, -self.smoothing_clip, self.smoothing_clip), -1, 1)

    def actor_loss(self, actor, state, batch, next_actions, *, key):
        """-Q_theta1(s, pi(s))."""
        q = jax.vmap(lambda s: state.critics(s, actor(s))[0])(batch.obs)
        return -jnp.mean(q), {"actor/loss": -jnp.mean(q)}
