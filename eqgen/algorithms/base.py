"""What every algorithm is: an immutable module of hyperparameters with `init`, `update` and, for agents, `act`.

Hyperparameters are the module's fields, so `SOM(discount=0.97)` in a notebook, `--agent.discount 0.97` on the
command line and the entry in `settings.json` are one thing. What evolves is a separate `State` module that
each algorithm file writes out in full. Keys are arguments, never part of a state.
"""

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar, Literal, Self

import equinox as eqx
from jaxtyping import Array, Float, Key

from eqgen.types import Metrics, Transition


Size = Literal["smoke", "cpu", "paper"]
"""How much computation: seconds (tests), two CPU cores for up to about an hour, one GPU."""


class AbstractLearner(eqx.Module):
    """Something trained by repeated updates on batches.

    `sizes` holds, for each `Size`, the fields that differ from the class's defaults. Only fields that trade
    computation for quality belong there (widths, numbers of samples), never the method's own choices.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]]

    @abstractmethod
    def init(self, example: Any, *, key: Key[Array, ""]) -> eqx.Module:
        """A fresh state; `example` is one unbatched record, whose shapes the networks take on."""

    @abstractmethod
    def update(self, state: Any, batch: Any, *, key: Key[Array, ""]) -> tuple[Any, Metrics]:
        """One update on a batch of records with a leading axis; pure, so it may be jitted, scanned, vmapped."""

    @classmethod
    def profiles(cls) -> dict[str, Self]:
        """Named settings of the method (`--profile` on the command line); "default" is always there."""
        return {"default": cls()}

    def resized(self, size: Size) -> Self:
        """The same method with the fields of `sizes[size]`."""
        return dataclasses.replace(self, **self.sizes[size])

    @classmethod
    def tiny(cls) -> Self:
        """Settings that take seconds: for contract tests and smoke runs."""
        return cls().resized("smoke")


class AbstractAgent(AbstractLearner):
    """A learner that acts: `obs` is one observation, the action lies in [-1, 1]^d."""

    @abstractmethod
    def act(
        self, state: Any, obs: Float[Array, "*obs"], *, key: Key[Array, ""], explore: bool
    ) -> Float[Array, " act"]:
        """The action to take; `explore` adds what the method uses while it collects data. No default: say which."""

    @abstractmethod
    def init(self, example: Transition, *, key: Key[Array, ""]) -> eqx.Module: ...

    @abstractmethod
    def update(self, state: Any, batch: Transition, *, key: Key[Array, ""]) -> tuple[Any, Metrics]: ...
