"""Figures: the numbers that are drawn, and files that depend on nothing but the figure."""

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest


matplotlib.use("Agg")

import matplotlib.pyplot as plt

from eqgen import plotting
from eqgen.envs.maze import Maze2D


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


VALUES = np.array([[0.0, 1.0, 4.0], [2.0, 3.0, 4.0], [4.0, 8.0, 4.0]])


def band_of(ax):
    """The lower and upper edge of the one filled band, at x = 0, 1, 2."""
    vertices = ax.collections[0].get_paths()[0].vertices
    edges = [vertices[np.isclose(vertices[:, 0], x), 1] for x in range(3)]
    return np.array([[y.min(), y.max()] for y in edges]).T


@pytest.mark.parametrize("band", ["ci", "std", "sem", "range"])
def test_learning_curve_draws_mean_and_named_band(band):
    _, ax = plotting.subplots()
    caption = plotting.learning_curve(ax, np.arange(3), VALUES, label="SOM", band=band)
    mean, std = VALUES.mean(0), VALUES.std(0, ddof=1)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), mean)
    low, high = band_of(ax)
    if band == "range":
        np.testing.assert_allclose([low, high], [VALUES.min(0), VALUES.max(0)])
    elif band == "ci":
        assert np.all(VALUES.min(0) <= low) and np.all(low[:2] < mean[:2]) and np.all(mean[:2] < high[:2])
        assert low[2] == high[2] == 4.0  # seeds that agree leave no doubt
    else:
        half = std if band == "std" else std / np.sqrt(3)
        np.testing.assert_allclose([low, high], [mean - half, mean + half])
    assert caption.endswith("over 3 seeds") and plotting._BAND_NAMES[band] in caption


def test_single_time_is_visible():
    _, ax = plotting.subplots()
    plotting.learning_curve(ax, np.arange(1), VALUES[:, :1])
    assert ax.lines[0].get_marker() == "o"


def test_single_seed_has_no_band():
    _, ax = plotting.subplots()
    assert plotting.learning_curve(ax, np.arange(3), VALUES[:1]) == "1 seed"
    assert not ax.collections


def test_learning_curve_refuses_what_it_cannot_draw():
    _, ax = plotting.subplots()
    with pytest.raises(ValueError, match="band is 'iqr'"):
        plotting.learning_curve(ax, np.arange(3), VALUES, band="iqr")
    with pytest.raises(ValueError, match=r"\(seeds, 2\) is needed"):
        plotting.learning_curve(ax, np.arange(2), VALUES)


def test_density_is_upright():
    """The darkest pixel lies at the mode: x to the right, y upwards."""
    _, ax = plotting.subplots()
    mode, extent = jnp.array([0.5, -0.25]), (-1.0, 1.0, -0.5, 0.5)
    plotting.density(ax, lambda x: -10 * jnp.sum((x - mode) ** 2) + 7.0, extent=extent, resolution=81)
    image = ax.images[0]
    row, column = np.unravel_index(np.argmax(image.get_array()), (81, 81))
    assert image.origin == "lower" and tuple(image.get_extent()) == extent
    np.testing.assert_allclose([-1 + 2 * column / 80, -0.5 + row / 80], mode, atol=1e-6)
    np.testing.assert_allclose(image.get_array().max(), 1.0)


def test_vector_field_shows_direction_by_arrow_and_magnitude_by_colour():
    _, ax = plotting.subplots()
    plotting.vector_field(ax, lambda x: jnp.array([0.0, 3.0]) * x[0], resolution=4)
    quiver = ax.collections[0]
    np.testing.assert_allclose(quiver.U, 0)
    np.testing.assert_allclose(quiver.V.reshape(4, 4)[0], [-1, -1, 1, 1], rtol=1e-5)
    np.testing.assert_allclose(quiver.get_array().reshape(4, 4)[0], [3, 1, 1, 3], rtol=1e-5)


def test_a_maze_is_drawn_as_its_text_reads():
    _, ax = plotting.subplots()
    env = Maze2D("#####\n#OOO#\n#G#O#\n#####")
    plotting.maze(ax, env)
    boxes = ax.collections[0].get_paths()
    for i, row in enumerate(env.layout):
        for j, cell in enumerate(row):
            covered = any(box.contains_point((j - 0.2, i - 0.2)) for box in boxes)
            assert covered == (cell == "#")
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[1, 2]])  # the goal: column, row
    left, right, bottom, top = *ax.get_xlim(), *ax.get_ylim()
    np.testing.assert_allclose([left, right, bottom, top], [-0.7, 4.3, 3.3, -0.7])  # rows run downwards
    assert ax.get_aspect() == 1


def test_a_path_in_a_maze_is_coloured_by_time_and_marked_at_its_ends():
    _, ax = plotting.subplots()
    obs = np.array([[1.0, 2.0, 9.0, 9.0], [1.5, 2.0, 9.0, 9.0], [2.0, 3.0, 9.0, 9.0]])
    line = plotting.maze_path(ax, obs)
    np.testing.assert_allclose(line.get_segments(), [[[2, 1], [2, 1.5]], [[2, 1.5], [3, 2]]])
    np.testing.assert_allclose(line.get_array(), [0.5, 1.5])
    assert line.get_clim() == (0, 2)
    start, end = ax.lines
    np.testing.assert_allclose([start.get_xydata()[0], end.get_xydata()[0]], [[2, 1], [3, 2]])
    assert (start.get_marker(), end.get_marker()) == ("o", "s")
    norm = plt.Normalize(0, 100)
    line = plotting.maze_path(ax, obs[:, :2], times=np.array([10.0, 20.0, 40.0]), norm=norm, alpha=0.5)
    np.testing.assert_allclose(line.get_array(), [15, 30])
    assert line.get_clim() == (0, 100) and line.get_alpha() == 0.5
    for wrong in (obs[:1], obs[0], obs[:, :1]):
        with pytest.raises(ValueError, match=r"positions has shape"):
            plotting.maze_path(ax, wrong)
    with pytest.raises(ValueError, match="each of 3 positions"):
        plotting.maze_path(ax, obs, times=np.arange(2))


def test_saved_files_depend_on_the_figure_alone(tmp_path):
    def draw(folder):
        fig, ax = plotting.subplots()
        ax.plot([0, 1], [0, 1])
        return [path.read_bytes() for path in plotting.save(fig, tmp_path / folder / "fig.png")]

    pdf, png = draw("a")
    assert pdf.startswith(b"%PDF") and png.startswith(b"\x89PNG")
    assert [pdf, png] == draw("b")
    assert b"CreationDate" not in pdf
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["fig.pdf", "fig.png"]


def test_failed_save_keeps_the_previous_figure(tmp_path, monkeypatch):
    fig, _ = plotting.subplots()
    (path,) = plotting.save(fig, tmp_path / "fig", formats=["png"])
    before = path.read_bytes()

    def broken(target, **_):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(fig, "savefig", broken)
    with pytest.raises(OSError):
        plotting.save(fig, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_style_leaves_the_defaults_of_others_alone():
    before = plt.rcParams["font.size"]
    with plotting.style():
        assert plt.rcParams["font.size"] == 8
    plotting.subplots()
    assert plt.rcParams["font.size"] == before
