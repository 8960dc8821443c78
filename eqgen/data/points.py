"""Points in the plane and paths through it, drawn from known distributions: data for the smallest diffusion models.

Every distribution of `POINTS` has mean 0 and variance 1 in both coordinates, exactly; what is said below about the
curves comes before the scale that makes it so.
"""

from collections.abc import Callable
from functools import partial
from math import pi, sqrt

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from eqgen.data.examples import ExampleData


RING_STD = 0.1
RING_RADIUS = sqrt(2 * (1 - RING_STD**2))
BOARD = sqrt(3)
"""The checkerboard is [-BOARD, BOARD]^2."""
SPIRALS_STD = 0.05
MOONS_STD = 0.1


# --- Points ---


def ring(n: int, *, key: Key[Array, ""]) -> Float[Array, "n 2"]:
    """Eight Gaussians of equal weight and standard deviation `RING_STD`, evenly on a circle of `RING_RADIUS`.

    The coordinates are uncorrelated.
    """
    mode_key, noise_key = jr.split(key)
    modes = _ring_modes()[jr.randint(mode_key, (n,), 0, 8)]
    return modes + RING_STD * jr.normal(noise_key, (n, 2))


def ring_log_prob(x: Float[Array, "2"]) -> Float[Array, ""]:
    """The log-density of `ring` at one point."""
    squares = jnp.sum((x[None] - _ring_modes()) ** 2, axis=1)
    return jax.nn.logsumexp(-squares / (2 * RING_STD**2)) - jnp.log(8 * 2 * pi * RING_STD**2)


def _ring_modes():
    angles = jnp.arange(8) * (pi / 4)
    return RING_RADIUS * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)


def checkerboard(n: int, *, key: Key[Array, ""]) -> Float[Array, "n 2"]:
    """Uniform on 8 of the 4 x 4 squares of [-`BOARD`, `BOARD`]^2: those whose column and row, counted from the
    lower left, are both even or both odd. Each coordinate is uniform; their covariance is 3/16."""
    column_key, row_key, place_key = jr.split(key, 3)
    columns = jr.randint(column_key, (n,), 0, 4)
    rows = 2 * jr.randint(row_key, (n,), 0, 2) + columns % 2
    corners = jnp.stack([columns, rows], axis=1)
    return (corners + jr.uniform(place_key, (n, 2))) * (BOARD / 2) - BOARD


def spirals(n: int, *, key: Key[Array, ""]) -> Float[Array, "n 2"]:
    """Two arms of one and a half turns, each the other turned by 180 degrees, with noise of `SPIRALS_STD`.

    Before the noise an arm is w (cos 3 pi w, sin 3 pi w), 0 ≤ w ≤ 1, with density 2 w; the variances of that are
    1/4 ± 1/(12 pi^2), and each coordinate is divided by its own. The correlation is -0.208.
    """
    place_key, arm_key, noise_key = jr.split(key, 3)
    w = jnp.sqrt(jr.uniform(place_key, (n,)))
    arm = jr.rademacher(arm_key, (n,), jnp.float32)
    curve = (arm * w)[:, None] * jnp.stack([jnp.cos(3 * pi * w), jnp.sin(3 * pi * w)], axis=1)
    std = jnp.sqrt(jnp.array([[1 / 4 + 1 / (12 * pi**2), 1 / 4 - 1 / (12 * pi**2)]]))
    return _with_noise(curve / std, SPIRALS_STD, noise_key)


def moons(n: int, *, key: Key[Array, ""]) -> Float[Array, "n 2"]:
    """Two half circles, one hooked into the other, with noise of `MOONS_STD`.

    Before the noise: (cos a, sin a) and (1 - cos a, 1/2 - sin a) for uniform 0 ≤ a ≤ pi, as in scikit-learn's
    `make_moons`, less the mean (1/2, 1/4) and divided by the standard deviations, whose squares are 3/4 and
    9/16 - 1/pi. The correlation is -0.447.
    """
    place_key, moon_key, noise_key = jr.split(key, 3)
    angle = jr.uniform(place_key, (n,), maxval=pi)
    sign = jr.rademacher(moon_key, (n,), jnp.float32)
    # Less their means, one moon is the other turned by 180 degrees.
    curve = sign[:, None] * jnp.stack([jnp.cos(angle) - 1 / 2, jnp.sin(angle) - 1 / 4], axis=1)
    std = jnp.sqrt(jnp.array([[3 / 4, 9 / 16 - 1 / pi]]))
    return _with_noise(curve / std, MOONS_STD, noise_key)


def _with_noise(points, std, key):
    """Points of unit variance with noise of this standard deviation, again of unit variance."""
    return sqrt(1 - std**2) * points + std * jr.normal(key, points.shape)


POINTS: dict[str, Callable[..., Float[Array, "n 2"]]] = {
    "ring": ring,
    "checkerboard": checkerboard,
    "spirals": spirals,
    "moons": moons,
}


# --- Paths ---


@partial(jax.jit, static_argnames=("n", "horizon"))
def paths(
    n: int, horizon: int = 32, *, key: Key[Array, ""]
) -> tuple[Float[Array, "n horizon 2"], Float[Array, "n 3"], Int[Array, " n"]]:
    """Paths from a start to a goal, each around a disc of its own, on a parabola (a quadratic Bezier curve).

    Start, goal and disc are drawn at random, and the side on which the disc is passed by a coin. All lies in the
    unit disc. In the frame of a path, where the start is (-1, 0) and the goal (1, 0), the disc of radius r has its
    centre (a, b), and the parabola h (1 - x^2) passes it with h = (b + r + 0.05) / (1 - (|a| + r)^2): so, being
    concave, it is at least 0.05 above a box around the disc.

    **Returns:** the paths, evenly spaced from start to goal; the discs as (x, y, radius); 1 where the path
    keeps to the left of its disc, 0 to the right.
    """
    keys = jr.split(key, 6)
    unit = lambda key, low, high: jr.uniform(key, (n,), minval=low, maxval=high)
    a, b = jr.uniform(keys[0], (2, n), minval=-0.2, maxval=0.2)
    radius = unit(keys[1], 0.2, 0.4)
    left = jr.bernoulli(keys[2], shape=(n,)).astype(jnp.int32)
    side = 2.0 * left - 1
    height = side * (side * b + radius + 0.05) / (1 - (jnp.abs(a) + radius) ** 2)
    x = jnp.broadcast_to(jnp.linspace(-1, 1, horizon)[None], (n, horizon))
    own_frame = jnp.stack([x, height[:, None] * (1 - x**2)], axis=-1)

    angle, half = unit(keys[3], 0, 2 * pi), unit(keys[4], 0.5, 0.75)
    middle = jr.uniform(keys[5], (n, 2), minval=-0.15, maxval=0.15)
    along = half[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    across = jnp.stack([-along[:, 1], along[:, 0]], axis=1)
    axes = jnp.stack([along, across], axis=1)
    centres = middle + jnp.einsum("ni,nij->nj", jnp.stack([a, b], axis=1), axes)
    points = middle[:, None] + jnp.einsum("nhi,nij->nhj", own_frame, axes)
    return points, jnp.concatenate([centres, (half * radius)[:, None]], axis=1), left


def trajectories(n: int, horizon: int = 32, *, key: Key[Array, ""]) -> ExampleData:
    """`paths` as a set, labelled by the side of the disc on which they pass. The discs are not part of it:
    `paths` gives them for the same key."""
    points, _, left = paths(n, horizon, key=key)
    return ExampleData(points, left)
