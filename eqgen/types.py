"""The records that pass between environments, replay, algorithms and loops.

All are written for one example; a batch is the same record with leading axes (made by `jax.vmap`).
"""

import equinox as eqx
from jaxtyping import Array, Bool, Float, Scalar


Metrics = dict[str, Scalar]
"""What a loss or an update reports: a flat dict of scalars whose keys never change between calls."""


class TimeStep(eqx.Module):
    """What an environment answers to one action, before any reset.

    `obs` is the observation *after* the action, also when the episode ended with it. `terminated` says that
    the task ended (no value beyond it); `truncated` says that only the clock ran out (the value goes on).
    Both may be true; termination then wins.
    """

    obs: Float[Array, "*obs"]
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]

    @property
    def done(self) -> Bool[Array, ""]:
        """Whether the episode ended, for either reason."""
        return self.terminated | self.truncated


class Transition(eqx.Module):
    """One step of experience, as replay stores it.

    `action` lies in [-1, 1]^d, whatever the bounds of the environment. `next_obs` is the true next
    observation (never the first one of the following episode). Only `terminated` stops bootstrapping.
    """

    obs: Float[Array, "*obs"]
    action: Float[Array, " act"]
    reward: Float[Array, ""]
    next_obs: Float[Array, "*obs"]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]
