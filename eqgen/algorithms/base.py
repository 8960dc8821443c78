"""What every algorithm is: an immutable module of hyperparameters with `init`, `update` and (agents) `act`.

Hyperparameters are the module's fields, so `SOM(discount=0.97)` in a notebook, `--agent.discount 0.97` on the
command line and the entry in `settings.json` are one thing. What evolves is a separate `State` module that
each algorithm file writes out in full. Keys are arguments, never part of a state.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, ScalarLike

from eqgen.guidance import AbstractGuidance, AbstractPlanner, Obs, Plan
from eqgen.tree import polyak, tree_copy
from eqgen.types import Metrics, Transition


Size = Literal["smoke", "cpu", "paper"]
"""How much computation: seconds (tests), two CPU cores for up to about an hour, one GPU."""


class AbstractLearner(eqx.Module):
    """Something trained by repeated updates on batches.

    `sizes` holds, for each `Size`, the fields that differ from the class's defaults. Only fields that trade
    computation for quality belong there (widths, numbers of samples), never the method's own choices.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]]

    def __check_init__(self):
        for field in dataclasses.fields(self):
            choices, value = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in choices:
                raise ValueError(
                    f"{type(self).__name__}({field.name}={value!r}) is not supported; choose one of {choices}"
                )

    @abstractmethod
    def init(self, example: Any, *, key: Key[Array, ""]) -> eqx.Module:
        """A fresh state; `example` is one unbatched record, whose shapes the networks take on."""

    @abstractmethod
    def update(self, state: Any, batch: Any, *, key: Key[Array, ""]) -> tuple[Any, Metrics]:
        """One update on a batch (records with a leading axis); pure: it may be jitted, scanned, vmapped."""

    @classmethod
    def profiles(cls) -> Mapping[str, Self]:
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
    """A learner that acts: `obs` is one observation, the action lies in [-1, 1]^d.

    `evaluation_policy` says in words what `act(..., explore=False)` does, and goes into evaluation records.
    """

    evaluation_policy: ClassVar[str]

    @abstractmethod
    def act(
        self, state: Any, obs: Float[Array, "*obs"], *, key: Key[Array, ""], explore: bool
    ) -> Float[Array, " act"]:
        """The action to take; `explore` adds what the method does while it collects data (no default)."""

    @abstractmethod
    def init(self, example: Transition, *, key: Key[Array, ""]) -> eqx.Module: ...

    @abstractmethod
    def update(self, state: Any, batch: Transition, *, key: Key[Array, ""]) -> tuple[Any, Metrics]: ...


class AbstractOfflineLearner(AbstractLearner):
    """A learner on a fixed set, which says how long it learns."""

    total_updates: eqx.AbstractVar[int]


class AbstractPlanLearner(AbstractOfflineLearner, AbstractPlanner):
    """A planner that is trained, and acts: what `eqgen.planning` asks of one."""

    guidance: eqx.AbstractVar[AbstractGuidance]
    """How plans are made unless another way is asked for."""

    @abstractmethod
    def init(self, example: Any, *, key: Key[Array, ""], normalizer: Any = None) -> eqx.Module:
        """A fresh state; `normalizer` has the units of observations (None: those of the environment)."""

    @abstractmethod
    def plan(
        self, state: Any, obs: Obs, *, key: Key[Array, ""], guidance: AbstractGuidance | None = None
    ) -> Plan:
        """A plan from an observation of the environment, as z-scores."""

    @abstractmethod
    def action_towards(
        self, state: Any, obs: Obs, target: Obs, *, key: Key[Array, ""]
    ) -> Float[Array, " act"]:
        """The action from one state to the next, both as z-scores."""


class AbstractOnPolicyAgent(AbstractAgent):
    """An agent that learns from what its parameters of this moment did, and from that only once.

    `update` takes a whole rollout: transitions with the leading axes (rollout_length, num_envs), in the order in
    which each environment made them. Loops call it after every `rollout_length` steps of all environments, counted
    from the end of the warm-up. Nothing in the state changes in between, so what networks said when actions were
    taken (log-probabilities, values) need not be stored: `update` computes it from the state that it is given.
    """

    rollout_length: eqx.AbstractVar[int]
    """Steps of each environment in a rollout."""

    def __check_init__(self):
        if self.rollout_length < 1:
            raise ValueError(f"rollout_length is {self.rollout_length}; it must be at least 1.")


def vector_sizes(example: Transition) -> tuple[int, int]:
    """The lengths of the observation and action vectors.

    **Raises:** `ValueError` when either is not a vector, which these networks need.
    """
    for name in ("obs", "action"):
        if getattr(example, name).ndim != 1:
            raise ValueError(
                f"The {name} has shape {getattr(example, name).shape}; these networks take vectors. "
                "Flatten it in the environment, or write `init` with networks of your own."
            )
    return example.obs.size, example.action.size


def gradient_step(
    optimizer: optax.GradientTransformation, model: PyTree, opt_state: optax.OptState, grads: PyTree
) -> tuple[PyTree, optax.OptState]:
    """The model after one step of the optimiser, and the optimiser's next state."""
    updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state


class Trained(eqx.Module):
    """A network, its moving average (None where nobody wants it), and its optimiser's state."""

    online: Any
    average: Any
    opt_state: optax.OptState

    @classmethod
    def begin(cls, network: Any, optimizer: optax.GradientTransformation, *, averaged: bool = True) -> Self:
        """Before the first step."""
        average = tree_copy(network) if averaged else None
        return cls(network, average, optimizer.init(eqx.filter(network, eqx.is_inexact_array)))

    def step(
        self,
        optimizer: optax.GradientTransformation,
        loss: Callable[..., Any],
        *args: Any,
        rate: ScalarLike,
        has_aux: bool = False,
        **kwargs: Any,
    ) -> tuple[Self, Any]:
        """One step on `loss(network, *args, **kwargs)`, and what it returned; `rate` is the average's."""
        value_and_grad = eqx.filter_value_and_grad(loss, has_aux=has_aux)
        value, grads = value_and_grad(self.online, *args, **kwargs)
        online, opt_state = gradient_step(optimizer, self.online, self.opt_state, grads)
        average = None if self.average is None else polyak(self.average, online, rate)
        return type(self)(online, average, opt_state), value


def averaging_rate(decay: float, step: Int[Array, ""], *, debias: bool) -> ScalarLike:
    """The share of the online network that update number `step`, from 0, brings into its average.

    1 - d keeps d^n of the beginning after n updates. With `debias` it is (1 - d) / (1 - d^n), which makes the
    average the weighted mean of the n networks so far, weights d^(n - k), and forgets the beginning.
    """
    if not debias:
        return 1 - decay
    return (1 - decay) / -jnp.expm1((step + 1) * jnp.log(decay))
