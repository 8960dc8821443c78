"""The records that pass between environments, replay, algorithms and loops.

The shapes are those of one example, after the leading axes `*batch` that all fields of a batch share.
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

    obs: Float[Array, "..."]
    reward: Float[Array, "*batch"]
    terminated: Bool[Array, "*batch"]
    truncated: Bool[Array, "*batch"]

    @property
    def done(self) -> Bool[Array, "*batch"]:
        """Whether the episode ended, for either reason."""
        return self.terminated | self.truncated


class Transition(eqx.Module):
    """One step of experience, as replay stores it.

    `action` lies in [-1, 1]^d, whatever the bounds of the environment. `next_obs` is the true next
    observation (never the first one of the following episode). Only `terminated` stops bootstrapping.
    """

    obs: Float[Array, "..."]
    action: Float[Array, "*batch act"]
    reward: Float[Array, "*batch"]
    next_obs: Float[Array, "..."]
    terminated: Bool[Array, "*batch"]
    truncated: Bool[Array, "*batch"]
