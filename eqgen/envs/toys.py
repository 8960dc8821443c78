"""Bandits with two-dimensional actions whose optimal policy is known exactly.

One step, nothing to observe. The reward is the log-density of a Gaussian mixture, so Q*(a) = log p(a) and the
Boltzmann policy of temperature 1, pi*(a) = exp(Q*(a)) / Z on the box [-1, 1]^2, is the mixture itself cut off
at the box, from which `sample_optimal` draws without approximation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key

from eqgen.envs.base import AbstractEnv
from eqgen.scores import GaussianMixture
from eqgen.types import TimeStep


class MixtureBandit(AbstractEnv):
    """Reward log p(a) for a mixture p of Gaussians; `density` also knows its score, noised or not.

    Components belong to modes (one each, or the many along a moon), by which coverage is counted. On the box
    the rewards of the four bandits of the catalog lie between -40 and 3.
    """

    name: str
    density: GaussianMixture
    modes: Int[Array, " components"]
    """To which mode each component belongs, counted from 0."""
    num_modes: int
    obs_shape: tuple[int, ...] = (1,)
    action_dim: int = 2
    max_steps: int = 1

    def reset(self, *, key: Key[Array, ""]) -> tuple[tuple, Float[Array, " 1"]]:
        return (), jnp.zeros(1)

    def step(self, state: tuple, action: Float[Array, " 2"], *, key: Key[Array, ""]) -> tuple[Any, TimeStep]:
        reward = self.log_density(jnp.clip(action, -1, 1))
        return (), TimeStep(jnp.zeros(1), reward, terminated=jnp.array(True), truncated=jnp.array(False))

    def log_density(self, action: Float[Array, " 2"]) -> Float[Array, ""]:
        """log p(a): the reward, Q*(a), and up to log Z the log-density of the optimal policy on the box."""
        return self.density.log_density(action)

    def mode(self, action: Float[Array, " 2"]) -> Int[Array, ""]:
        """The mode that most probably produced the action."""
        return jnp.argmax(self._per_mode(self.density.responsibilities(action)))

    def sample_optimal(self, n: int, *, key: Key[Array, ""]) -> Float[Array, "n 2"]:
        """Exact draws from the optimal policy: draws from the mixture, repeated while they miss the box."""

        def draw(key):
            def again(carry):
                key, redo = jr.split(carry[0])
                return key, self.density.sample(key=redo)

            outside = lambda carry: jnp.any(jnp.abs(carry[1]) > 1)
            return jax.lax.while_loop(outside, again, again((key, None)))[1]

        return jax.vmap(draw)(jr.split(key, n))

    @property
    def mode_centres(self) -> Float[Array, "modes 2"]:
        """The centre of mass of each mode (which for a moon lies off the arc)."""
        weights = self.density.weights
        return self._per_mode(weights[:, None] * self.density.means) / self._per_mode(weights)[:, None]

    @property
    def mode_weights(self) -> Float[Array, " modes"]:
        """The probability of each mode under the optimal policy, which has nothing outside the box."""
        cdf = lambda x: jax.scipy.stats.norm.cdf((x - self.density.means) / self.density.stds[:, None])
        mass = self._per_mode(self.density.weights * jnp.prod(cdf(1.0) - cdf(-1.0), axis=1))
        return mass / mass.sum()

    def _per_mode(self, values):
        """Sums over the components of each mode."""
        return jax.ops.segment_sum(values, self.modes, self.num_modes)


def ring(num_modes: int = 8, radius: float = 0.7, std: float = 0.1) -> MixtureBandit:
    """Equal Gaussians evenly spaced on a circle, the first at angle 0."""
    angles = 2 * np.pi * np.arange(num_modes) / num_modes
    means = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return _bandit("toy/ring", means, np.full(num_modes, std), np.ones(num_modes), np.arange(num_modes))


def moons(std: float = 0.1, num_components: int = 32) -> MixtureBandit:
    """Two interleaved half circles of equal weight, each a chain of `num_components` Gaussians."""
    angles = np.linspace(0, np.pi, num_components)
    arc = 0.55 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    shift = np.array([-0.275, -0.15])
    means, modes = np.concatenate([shift + arc, -shift - arc]), np.repeat([0, 1], num_components)
    return _bandit("toy/moons", means, np.full(2 * num_components, std), np.ones(2 * num_components), modes)


def broad_sharp(broad_std: float = 0.3, sharp_std: float = 0.06) -> MixtureBandit:
    """A broad mode with 0.7 of the mass, and a sharp one with 0.3 and by far the greater value.

    A policy that only climbs the value ends in the sharp one.
    """
    means, stds = np.array([[-0.4, 0.0], [0.6, 0.0]]), np.array([broad_std, sharp_std])
    return _bandit("toy/broad-sharp", means, stds, np.array([0.7, 0.3]), np.arange(2))


def mixture(std: float = 0.15) -> MixtureBandit:
    """Four Gaussians of weights 0.4, 0.3, 0.2, 0.1 at (1, 1), (-1, 1), (-1, -1), (1, -1) times one half."""
    means = 0.5 * np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    return _bandit("toy/mixture", means, np.full(4, std), np.array([0.4, 0.3, 0.2, 0.1]), np.arange(4))


def _bandit(name, means, stds, weights, modes):
    means, stds, weights = (jnp.asarray(x, jnp.result_type(float)) for x in (means, stds, weights))
    density = GaussianMixture(means, stds, weights / weights.sum())
    modes, num_modes = jnp.asarray(modes, jnp.int32), int(modes.max()) + 1
    return MixtureBandit(name, density=density, modes=modes, num_modes=num_modes)


TOYS = {"ring": ring, "moons": moons, "broad-sharp": broad_sharp, "mixture": mixture}
"""The constructors by catalog name."""
