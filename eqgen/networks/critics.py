"""State-action value functions and ensembles of them."""

from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, Float, Key

from eqgen.networks.mlp import MLP, mish
from eqgen.tree import ensemble


class QEnsemble(eqx.Module):
    """`size` independent critics Q(s, a), stored as one stack.

    Score many actions of one observation by `jax.vmap(lambda a: critics(obs, a))(actions)`: the observation's
    share of the first layer is then computed once.
    """

    members: MLP

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: tuple[int, ...],
        activation: Callable | str = mish,
        size: int = 2,
        *,
        key: Key[Array, ""],
    ):
        make = lambda key: MLP((obs_size, action_size), "scalar", hidden, activation, key=key)
        self.members = ensemble(make, size, key=key)

    def __call__(self, obs: Float[Array, " obs"], action: Float[Array, " act"]) -> Float[Array, " size"]:
        """The value by every member."""
        return eqx.filter_vmap(lambda member: member(obs, action))(self.members)
