"""State-action value functions and ensembles of them."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from eqgen.networks.embeddings import sinusoid
from eqgen.networks.mlp import MLP, Initialization, SplitLinear, mish
from eqgen.tree import ensemble, for_each_member


class QEnsemble(eqx.Module):
    """`size` independent critics Q(s, a), stored as one stack.

    Score many actions of one observation by `jax.vmap(lambda a: critics(obs, a))(actions)`: the observation's
    share of the first layer is then computed once. For many actions one after the other there is `at`.
    """

    members: MLP

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: tuple[int, ...],
        activation: Callable | str = mish,
        initialization: Initialization = "uniform",
        size: int = 2,
        *,
        key: Key[Array, ""],
    ):
        def make(key):
            return MLP((obs_size, action_size), "scalar", hidden, activation, initialization, key=key)

        self.members = ensemble(make, size, key=key)

    def __call__(self, obs: Float[Array, " obs"], action: Float[Array, " act"]) -> Float[Array, " size"]:
        """The value by every member."""
        return eqx.filter_vmap(lambda member: member(obs, action))(self.members)

    def at(self, obs: Float[Array, " obs"]) -> Callable[[Float[Array, " act"]], Float[Array, " size"]]:
        """The values of actions at `obs`, whose share of the first layer is computed here, once."""
        folded = eqx.filter_vmap(lambda member: member.fold(0, obs))(self.members)
        each = for_each_member(folded)
        return lambda action: each(lambda member: member(action))


class NoiseConditionedQEnsemble(eqx.Module):
    """`size` independent critics Q(s, a, l) of noised actions, stored as one stack.

    The noise level l = 0, ..., num_levels - 1 is a whole number; each member embeds it by a sinusoid of 16
    numbers and a small network of its own (NC-LQL [C]). A level is passed as its row of `embeddings()`, so that
    a batch, or a chain of many steps, embeds each level once.
    """

    members: MLP
    embedders: MLP
    num_levels: int = eqx.field(static=True)
    embedding_size: int = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        num_levels: int,
        hidden: tuple[int, ...],
        activation: Callable | str = mish,
        initialization: Initialization = "truncated_normal",
        embedding_size: int = 16,
        size: int = 2,
        *,
        key: Key[Array, ""],
    ):
        def make(key):
            key, embedder_key = jax.random.split(key)
            inputs = (obs_size, action_size, embedding_size)
            member = MLP(inputs, "scalar", hidden, activation, initialization, key=key)
            widths = ((embedding_size,), embedding_size, (2 * embedding_size,))
            return member, MLP(*widths, activation, initialization, key=embedder_key)

        self.members, self.embedders = ensemble(make, size, key=key)
        self.num_levels, self.embedding_size, self.size = num_levels, embedding_size, size

    def embeddings(self) -> Float[Array, "levels size embedding"]:
        """What `__call__` takes for each level: its embedding by every member."""
        sinusoids = jax.vmap(lambda level: sinusoid(level, self.embedding_size))(jnp.arange(self.num_levels))
        embed = eqx.filter_vmap(lambda embedder, x: embedder(x), in_axes=(eqx.if_array(0), None))
        return jax.vmap(lambda x: embed(self.embedders, x))(sinusoids)

    def __call__(
        self,
        obs: Float[Array, " obs"],
        action: Float[Array, " act"],
        embedding: Float[Array, "size embedding"],
    ) -> Float[Array, " size"]:
        """The value by every member at the level with this embedding."""
        return eqx.filter_vmap(lambda member, e: member(obs, action, e))(self.members, embedding)

    def at_level(
        self, level: int
    ) -> Callable[[Float[Array, " obs"], Float[Array, " act"]], Float[Array, " size"]]:
        """The critics of one level, as a function of observation and action."""
        embedding = self.embeddings()[level]
        return lambda obs, action: self(obs, action, embedding)

    def level_shares(self) -> Float[Array, "levels size width"]:
        """What each level adds to the first layer of every member: what the function made by `at` takes."""
        weights = self.members.layers[0].weights[2]
        return jnp.einsum("lse,sew->lsw", self.embeddings(), weights)

    def at(
        self, obs: Float[Array, " obs"]
    ) -> Callable[[Float[Array, " act"], Float[Array, "size width"]], Float[Array, " size"]]:
        """The values of (action, a row of `level_shares()`) at `obs`.

        For chains: the observation's and the levels' shares of the first layer are computed once per chain,
        not once per step.
        """
        absent = jnp.zeros(self.embedding_size)
        folded = eqx.filter_vmap(lambda member: member.fold(2, absent).fold(0, obs))(self.members)
        each = for_each_member(folded)
        return lambda action, share: each(lambda member, s: member.shift(s)(action), share)


class StateValue(eqx.Module):
    """V(s): hidden layers with layer norm, then Mish (Diffusion Veteran's value of states [C])."""

    layers: tuple[tuple[SplitLinear, eqx.nn.LayerNorm], ...]
    out: SplitLinear

    def __init__(self, obs_size: int, hidden: tuple[int, ...] = (256, 256), *, key: Key[Array, ""]):
        *keys, out_key = jax.random.split(key, len(hidden) + 1)
        sizes = [obs_size, *hidden]
        self.layers = tuple(
            (SplitLinear((a,), b, key=k), eqx.nn.LayerNorm(b)) for a, b, k in zip(sizes, hidden, keys)
        )
        self.out = SplitLinear((sizes[-1],), 1, key=out_key)

    def __call__(self, obs: Float[Array, " obs"]) -> Float[Array, ""]:
        x = obs
        for linear, norm in self.layers:
            x = mish(norm(linear(x)))
        return self.out(x)[0]
