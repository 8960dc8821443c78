"""One look for every figure: sizes, colours and the few kinds of picture that eqgen draws.

With `interactive`, the only module that loads matplotlib on import. Call `use_style()` once at the top of a
notebook or script, then use ordinary matplotlib with these helpers; inside a library, draw in a `with style():`
block. Colours are those of Okabe and Ito (2008), told apart under the common forms of colour blindness; curves of
different methods should differ in line style or label as well.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.rcsetup import cycler
from numpy.typing import ArrayLike

from eqgen.envs.maze import GOAL_RADIUS, Maze2D
from eqgen.evaluation import bootstrap_interval
from eqgen.files import replacing


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
"""Okabe and Ito's palette: blue, vermilion, green, purple, orange, sky blue, yellow, black."""

COLUMN_WIDTH = 3.35
"""Width in inches of one column of a two-column page; `TEXT_WIDTH` spans both."""

TEXT_WIDTH = 6.9

STYLE: dict[Any, Any] = {  # matplotlib types the keys
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=list(COLORS)),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "figure.figsize": (COLUMN_WIDTH, COLUMN_WIDTH * 0.7),
    "font.size": 8,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "image.cmap": "cividis",
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "pdf.fonttype": 42,  # TrueType: text stays text, and journals accept it
    "savefig.dpi": 300,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}
"""The rcParams of every figure."""

_BAND_NAMES = {
    "ci": "95 % bootstrap interval",
    "std": "± 1 standard deviation",
    "sem": "± 1 standard error",
    "range": "minimum to maximum",
}

Extent = tuple[float, float, float, float]
"""(x_min, x_max, y_min, y_max) of a plane."""


def use_style() -> None:
    """Makes `STYLE` the default of every figure from here on."""
    plt.rcParams.update(STYLE)


def style() -> AbstractContextManager:
    """`with style():` applies `STYLE` to what is drawn inside, and to nothing else."""
    return plt.rc_context(STYLE)


def subplots(
    rows: int = 1, columns: int = 1, *, width: float = COLUMN_WIDTH, aspect: float = 0.7, **kwargs
) -> tuple[Figure, Any]:
    """`plt.subplots`, `width` inches wide in all, each panel `aspect` times as high as wide."""
    with style():
        return plt.subplots(rows, columns, figsize=(width, width / columns * aspect * rows), **kwargs)


def learning_curve(
    ax: Axes,
    steps: ArrayLike,
    values: ArrayLike,
    *,
    label: str | None = None,
    band: str = "ci",
    show_seeds: bool = False,
    **style: Any,
) -> str:
    """The mean over seeds with a band.

    **Arguments:**

    - `steps`, `values`: of shapes (times,) and (seeds, times); every seed is measured at the same steps.
    - `band`: "ci" (95 % bootstrap interval of the mean), "std" or "sem" (one standard deviation or one
        standard error of the mean, n - 1), "range" (minimum to maximum).
    - `show_seeds`: also draws each seed as a thin line; do so below about five seeds.
    - `style`: of the line, as `ax.plot` takes it.

    **Returns:** what line and band are, in words, for the caption: "mean and 95 % bootstrap interval over
    5 seeds".
    """
    if band not in _BAND_NAMES:
        raise ValueError(f"band is {band!r}; choose one of {', '.join(_BAND_NAMES)}.")
    steps, values = np.asarray(steps), np.asarray(values)
    if values.ndim != 2 or values.shape[1:] != steps.shape:
        raise ValueError(f"values has shape {values.shape}; (seeds, {steps.size}) is needed.")
    if steps.size == 1:  # which a line would not show
        style = {"marker": "o", **style}
    (line,) = ax.plot(steps, values.mean(0), label=label, **style)
    if len(values) == 1:
        return "1 seed"
    low, high = _band(values, band)
    ax.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if show_seeds:
        ax.plot(steps, values.T, color=line.get_color(), alpha=0.4, linewidth=0.5)
    return f"mean and {_BAND_NAMES[band]} over {len(values)} seeds"


def _band(values, band):
    mean, std = values.mean(0), values.std(0, ddof=1)
    if band == "std":
        return mean - std, mean + std
    if band == "sem":
        return mean - std / len(values) ** 0.5, mean + std / len(values) ** 0.5
    if band == "range":
        return values.min(0), values.max(0)
    return np.transpose([bootstrap_interval(column, np.mean) for column in values.T])


def density(
    ax: Axes,
    log_density: Callable[[Float[Array, "2"]], Float[Array, ""]],
    *,
    extent: Extent = (-1.0, 1.0, -1.0, 1.0),
    resolution: int = 200,
    cmap: str = "Blues",
) -> None:
    """A density on the plane, from its unnormalised logarithm; the highest value is the darkest."""
    _, _, points = _grid(extent, resolution)
    logs = np.asarray(jax.jit(jax.vmap(jax.vmap(log_density)))(points))
    ax.imshow(np.exp(logs - logs.max()), extent=extent, origin="lower", cmap=cmap, interpolation="bilinear")
    ax.grid(False)


def vector_field(
    ax: Axes,
    field: Callable[[Float[Array, "2"]], Float[Array, "2"]],
    *,
    extent: Extent = (-1.0, 1.0, -1.0, 1.0),
    resolution: int = 20,
    cmap: str = "viridis",
) -> None:
    """A field on the plane: arrows of one length give the direction, their colour the magnitude.

    Lengths that follow the magnitude hide the field where it is weak, which for scores is where the data are.
    """
    xs, ys, points = _grid(extent, resolution)
    arrows = np.asarray(jax.jit(jax.vmap(jax.vmap(field)))(points))
    norms = np.linalg.norm(arrows, axis=-1)
    unit = arrows / np.maximum(norms, np.finfo(norms.dtype).tiny)[..., None]
    looks = {"cmap": cmap, "pivot": "mid", "scale": 1.2 * resolution, "width": 0.005}
    quiver = ax.quiver(xs, ys, unit[..., 0], unit[..., 1], norms, **looks)
    ax.figure.colorbar(quiver, ax=ax, label="magnitude", shrink=0.8)
    ax.set(xlim=extent[:2], ylim=extent[2:], aspect="equal")
    ax.grid(False)


def maze(ax: Axes, env: Maze2D, *, color: str = "0.35") -> None:
    """The walls as in the layout's text, and the goal within the circle where it is rewarded to be.

    The horizontal axis is the observation's second coordinate, the vertical one its first, downwards.
    """
    row, column = np.asarray(env.goal)
    ax.add_patch(Circle((column, row), GOAL_RADIUS, facecolor="none", edgecolor=COLORS[2], linestyle="--"))
    half = np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, 0.5], [0.5, -0.5]])
    boxes = [(y, x) + half for x, y in env.walls]
    # Edges of their own colour, or light seams show between neighbours.
    looks = {"facecolors": color, "edgecolors": color, "linewidths": 0.3}
    ax.add_collection(PolyCollection(boxes, zorder=1.5, **looks))
    ax.plot(column, row, marker="*", color=COLORS[2], markersize=7, markeredgewidth=0, zorder=4)
    height, width = len(env.layout), len(env.layout[0])
    ax.set(xlim=(-0.7, width - 0.7), ylim=(height - 0.7, -0.7), aspect="equal", xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def maze_path(
    ax: Axes,
    positions: ArrayLike,
    *,
    times: ArrayLike | None = None,
    cmap: str = "plasma",
    **style,
) -> LineCollection:
    """A plan or trajectory in a maze, its colour the time, with a circle at its start and a square at its end.

    **Arguments:**

    - `positions`: of shape (times, 2), the observation's first two coordinates, or (times, 4), observations.
    - `times`: one per position, by which it is coloured; their numbers 0, 1, ... if None.
    - `style`: of the line, as matplotlib's `LineCollection` takes it (`norm` gives several paths one scale).

    **Returns:** the line; `fig.colorbar(line, label="step")` explains its colours.
    """
    positions = np.asarray(positions)
    if positions.ndim != 2 or len(positions) < 2 or positions.shape[1] < 2:
        raise ValueError(
            f"positions has shape {positions.shape}; (times, 2 or more) with two times is needed."
        )
    points = positions[:, 1::-1]
    times = np.arange(len(points)) if times is None else np.asarray(times)
    if times.shape != points.shape[:1]:
        raise ValueError(f"times has shape {times.shape}; one for each of {len(points)} positions is needed.")
    looks = {"norm": Normalize(times[0], times[-1]), "capstyle": "round", "linewidths": 1.2} | style
    line = LineCollection(list(np.stack([points[:-1], points[1:]], axis=1)), cmap=cmap, **looks)
    line.set_array((times[:-1] + times[1:]) / 2)
    ax.add_collection(line)
    for point, time, marker in ((points[0], times[0], "o"), (points[-1], times[-1], "s")):
        looks = {"markerfacecolor": "white", "markeredgecolor": line.to_rgba(time), "markersize": 4}
        ax.plot(*point, marker=marker, alpha=line.get_alpha(), zorder=line.get_zorder() + 1, **looks)
    return line


def _grid(extent, resolution):
    x_min, x_max, y_min, y_max = extent
    xs, ys = np.linspace(x_min, x_max, resolution), np.linspace(y_min, y_max, resolution)
    return xs, ys, jnp.stack(jnp.meshgrid(xs, ys), axis=-1)


def save(fig: Figure, path: str | Path, formats: Sequence[str] = ("pdf", "png")) -> list[Path]:
    """Writes the figure once in each format, under `path` with that suffix.

    The files carry no date and no program version, so the same figure gives the same bytes. Each is written
    to a temporary name and renamed.

    **Returns:** the paths written.
    """
    path = Path(path)
    path = path.with_suffix("") if path.suffix.lstrip(".") in ("pdf", "png", "svg") else path
    metadata = {"pdf": {"CreationDate": None, "Producer": None, "Creator": None}, "png": {"Software": None}}
    written = [path.with_name(f"{path.name}.{suffix}") for suffix in formats]
    for suffix, target in zip(formats, written):
        with replacing(target) as temporary, plt.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "eqgen"}):
            fig.savefig(temporary, metadata=metadata.get(suffix, {"Date": None}), dpi=STYLE["savefig.dpi"])
    return written
