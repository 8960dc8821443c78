"""Data for diffusion models: exact levels, fair draws, known densities, and files that are read or refused."""

import importlib.util
import io
import sys
import tarfile

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from eqgen.data import images, points
from eqgen.data.episodes import DataError
from eqgen.data.examples import ExampleData, from_levels, to_levels
from eqgen.offline import Data


needs_sklearn = pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="needs the extra images")
RNG = np.random.default_rng(0)


# --- Examples ---


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_levels_are_exact_and_return(levels):
    values = np.arange(levels, dtype=np.uint8)
    x = from_levels(jnp.asarray(values), levels)
    exact = 2 * values.astype(np.float64) / (levels - 1) - 1
    np.testing.assert_allclose(x, exact, atol=3e-8, rtol=0)
    assert x[0] == -1 and x[-1] == 1 and x.dtype == jnp.float32
    np.testing.assert_array_equal(to_levels(x, levels), values)
    half = ExampleData(values, levels=levels).half_bin
    np.testing.assert_allclose(np.diff(exact) / 2, half)
    # Within half a bin of a level it is that level; beyond the ends it is the last one.
    np.testing.assert_array_equal(to_levels(x + 0.99 * half, levels), values)
    np.testing.assert_array_equal(to_levels(x - 0.99 * half, levels), values)


def test_values_are_stored_as_they_are():
    pixels = RNG.integers(0, 256, (5, 3, 2, 2))
    data = ExampleData(pixels, np.arange(5), levels=256)
    assert data.values.dtype == jnp.uint8 and data.labels.dtype == jnp.int32
    assert len(data) == 5 and data.shape == (3, 2, 2)
    x, label = data.examples()
    np.testing.assert_allclose(x, pixels / 127.5 - 1, atol=1e-7)
    np.testing.assert_array_equal(label, np.arange(5))

    continuous = ExampleData(np.array([[3.5, -7.0]]))
    assert continuous.half_bin is None and continuous.values.dtype == jnp.float32
    np.testing.assert_array_equal(continuous.examples().x, [[3.5, -7]])
    assert continuous.examples().label is None


def test_samples_are_uniform_and_keep_their_labels():
    data = ExampleData(np.arange(50, dtype=np.uint8)[:, None], np.arange(50) + 7, levels=51)
    assert isinstance(data, Data)
    x, label = eqx.filter_jit(lambda data, key: data.sample(20_000, key=key))(data, jr.key(0))
    np.testing.assert_array_equal(to_levels(x[:, 0], 51) + 7, label)
    counts = np.bincount(np.asarray(label) - 7, minlength=50)
    assert len(counts) == 50 and stats.chisquare(counts).pvalue > 1e-3
    again = data.sample(20_000, key=jr.key(0))
    np.testing.assert_array_equal(again.x, x)
    assert (data.sample(20_000, key=jr.key(1)).x != x).any()


@pytest.mark.parametrize("held_out, count", [(3, 3), (0.25, 5), (1, 1), (19, 19)])
def test_split_is_a_partition(held_out, count):
    data = ExampleData(np.arange(20, dtype=np.uint8)[:, None], np.arange(20) % 3, levels=20)
    train, rest = data.split(held_out, key=jr.key(0))
    assert len(rest) == count and train.levels == rest.levels == 20
    for part in (train, rest):
        assert (np.diff(part.values[:, 0].astype(int)) > 0).all()
        np.testing.assert_array_equal(part.labels, part.values[:, 0] % 3)
    both = np.concatenate([train.values[:, 0], rest.values[:, 0]])
    np.testing.assert_array_equal(np.sort(both), np.arange(20))


def test_split_is_random():
    data = ExampleData(np.arange(20, dtype=np.uint8)[:, None], levels=20)
    held_out = lambda key: data.split(5, key=key)[1].values[:, 0]
    counts = sum(np.bincount(held_out(key), minlength=20) for key in jr.split(jr.key(0), 60))
    assert counts.sum() == 300 and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("held_out", [0, 20, 21, -1, 0.0, 0.01, 0.99, 1.0, 5.0])
def test_split_leaves_something(held_out):
    data = ExampleData(np.arange(20, dtype=np.uint8)[:, None], levels=20)
    with pytest.raises(ValueError, match="both parts need at least one"):
        data.split(held_out, key=jr.key(0))


@pytest.mark.parametrize(
    "values, labels, levels, message",
    [
        (np.zeros((0, 2)), None, None, "no examples"),
        (np.zeros((3, 0)), None, None, "no examples"),
        (np.zeros((3, 2)), np.arange(2), None, "2 labels for 3 examples"),
        (np.array([[0.0, 1], [2, np.nan]]), None, None, "Example 1 holds nan"),
        (np.array([[0.0, 1], [-np.inf, 2]]), None, None, "Example 1 holds -inf"),
        (np.array([[0], [17]]), None, 17, r"Example 1 holds 17, which is not one of 0 \.\. 16"),
        (np.array([[0], [1], [-1]]), None, 17, "Example 2 holds -1"),
        (np.array([[300]]), None, 256, "Example 0 holds 300"),
        (np.zeros((3, 2)), None, 17, "float64; levels are whole numbers"),
        (np.zeros((3, 2), int), None, 1, "levels is 1"),
        (np.zeros((3, 2), int), None, 257, "levels is 257"),
    ],
)
def test_bad_examples_are_named(values, labels, levels, message):
    with pytest.raises(ValueError, match=message):
        ExampleData(values, labels, levels=levels)


# --- Points ---


@pytest.mark.parametrize(
    "name, correlation", [("ring", 0), ("checkerboard", 3 / 16), ("spirals", -0.208), ("moons", -0.447)]
)
def test_points_are_standardised(name, correlation):
    n = 200_000
    draw = jax.jit(points.POINTS[name], static_argnums=0)
    x = np.asarray(draw(n, key=jr.key(0)), np.float64)
    assert x.shape == (n, 2)
    np.testing.assert_array_equal(draw(n, key=jr.key(0)), x)
    assert (draw(n, key=jr.key(1)) != x).mean() > 0.99
    # Five standard errors, of which those of the squares depend on their spread.
    assert (abs(x.mean(axis=0)) < 5 / np.sqrt(n)).all()
    assert (abs((x**2).mean(axis=0) - 1) < 5 * (x**2).std(axis=0) / np.sqrt(n)).all()
    assert abs((x[:, 0] * x[:, 1]).mean() - correlation) < 5 * (x[:, 0] * x[:, 1]).std() / np.sqrt(n) + 5e-4


def test_ring_density():
    side = np.linspace(-2.2, 2.2, 401)
    grid = jnp.asarray(np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2), jnp.float32)
    log_prob = jax.jit(jax.vmap(points.ring_log_prob))
    of_grid = np.asarray(log_prob(grid), np.float64)
    mass = np.exp(of_grid) * (side[1] - side[0]) ** 2
    assert abs(mass.sum() - 1) < 1e-4

    # The samples have the density's entropy, ...
    x = points.ring(50_000, key=jr.key(1))
    of_samples = np.asarray(log_prob(x))
    assert abs(of_samples.mean() - (mass * of_grid).sum()) < 4 * of_samples.std() / np.sqrt(len(x))
    # ... as much mass where it is above some value, ...
    for bound in (-2, -1, 0, 0.5):
        assert abs((of_samples > bound).mean() - mass[of_grid > bound].sum()) < 0.01
    # ... and modes of equal weight.
    modes = np.round(np.arctan2(x[:, 1], x[:, 0]) / (np.pi / 4)).astype(int) % 8
    assert stats.chisquare(np.bincount(modes, minlength=8)).pvalue > 1e-3


def test_checkerboard_fills_the_squares_of_one_colour():
    x = np.asarray(points.checkerboard(40_000, key=jr.key(0)))
    cells = np.floor((x + points.BOARD) / (points.BOARD / 2)).astype(int)
    assert cells.min() == 0 and cells.max() == 3 and (cells.sum(axis=1) % 2 == 0).all()
    counts = np.bincount(cells[:, 0] * 4 + cells[:, 1], minlength=16)
    assert (counts > 0).sum() == 8 and stats.chisquare(counts[counts > 0]).pvalue > 1e-3
    within = (x + points.BOARD) / (points.BOARD / 2) - cells
    assert stats.kstest(within.reshape(-1), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", ["spirals", "moons"])
def test_curves_are_where_they_should_be(name):
    """Undo scale and noise: the points lie on the curve of the docstring, and as many on each half."""
    noise = {"spirals": points.SPIRALS_STD, "moons": points.MOONS_STD}[name]
    x = np.asarray(points.POINTS[name](4000, key=jr.key(0)), np.float64)
    if name == "spirals":
        w = np.linspace(0, 1, 2000)
        half = w[:, None] * np.stack([np.cos(3 * np.pi * w), np.sin(3 * np.pi * w)], axis=1)
        std = np.sqrt([1 / 4 + 1 / (12 * np.pi**2), 1 / 4 - 1 / (12 * np.pi**2)])
        halves = half / std, -half / std
    else:
        a = np.linspace(0, np.pi, 2000)
        outer, inner = np.stack([np.cos(a), np.sin(a)], 1), np.stack([1 - np.cos(a), 1 / 2 - np.sin(a)], 1)
        std = np.sqrt([3 / 4, 9 / 16 - 1 / np.pi])
        halves = (outer - [1 / 2, 1 / 4]) / std, (inner - [1 / 2, 1 / 4]) / std
    scale = np.sqrt(1 - noise**2)
    apart = [np.sqrt(((x[:, None] - scale * half[None, ::4]) ** 2).sum(-1)).min(axis=1) for half in halves]
    nearest = np.minimum(*apart)
    assert nearest.max() < 5 * noise and nearest.mean() < noise
    assert abs((apart[0] < apart[1]).mean() - 0.5) < 0.04


def test_paths_lead_around_their_discs():
    paths, discs, left = (np.asarray(x, np.float64) for x in points.paths(2000, key=jr.key(0)))
    assert paths.shape == (2000, 32, 2) and discs.shape == (2000, 3)
    centres, radii = discs[:, None, :2], discs[:, 2]

    def clearance(begin, end):
        """Between the discs and the lines from each begin to its end."""
        step = end - begin
        along = ((centres - begin) * step).sum(-1) / (step**2).sum(-1)
        nearest = begin + np.clip(along, 0, 1)[..., None] * step
        return np.sqrt(((nearest - centres) ** 2).sum(-1)).min(axis=1) - radii

    assert clearance(paths[:, :-1], paths[:, 1:]).min() > 0.01
    assert (clearance(paths[:, :1], paths[:, -1:]) < 0).mean() > 0.5  # there is something to lead around
    assert np.sqrt((paths**2).sum(-1)).max() < 1 and (np.sqrt((discs[:, :2] ** 2).sum(-1)) + radii).max() < 1

    # On the side that the label says, which is a coin's; the nearest point tells it.
    along, away = paths[:, -1] - paths[:, 0], paths - centres
    away = away[np.arange(2000), (away**2).sum(-1).argmin(axis=1)]
    np.testing.assert_array_equal(along[:, 0] * away[:, 1] - along[:, 1] * away[:, 0] > 0, left == 1)
    assert stats.binomtest(int(left.sum()), len(left)).pvalue > 1e-3
    # A parabola: second differences are constant along a path.
    bends = np.diff(paths, n=2, axis=1)
    assert abs(bends - bends[:, :1]).max() < 1e-5 < abs(bends).max()


def test_trajectories_are_the_paths_as_a_set():
    data = points.trajectories(2000, key=jr.key(3))
    paths, _, left = points.paths(2000, key=jr.key(3))
    assert data.levels is None and data.shape == (32, 2)
    np.testing.assert_array_equal(data.examples().x, paths)
    np.testing.assert_array_equal(data.examples().label, left)


# --- scikit-learn and drawings ---


@needs_sklearn
def test_digits_are_the_known_ones():
    data = images.digits()
    assert len(data) == 1797 and data.shape == (1, 8, 8) and data.levels == 17 and data.half_bin == 1 / 16
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    np.testing.assert_array_equal(np.bincount(data.labels), counts)
    np.testing.assert_array_equal(np.unique(data.values), np.arange(17))
    # The first row of the set: a zero.
    np.testing.assert_array_equal(data.values[0, 0, 0], [0, 0, 5, 13, 9, 1, 0, 0])
    assert data.labels[0] == 0
    np.testing.assert_array_equal(data.examples().x, np.asarray(data.values, np.float32) / 8 - 1)


@needs_sklearn
def test_photo_patches_are_many():
    train, rest = images.photo_patches()
    assert len(train) == 26_670 and len(rest) == 6_510
    assert train.shape == rest.shape == (1, 8, 8) and train.levels == 256
    for part in (train, rest):
        np.testing.assert_array_equal(np.bincount(part.labels), [len(part) / 2] * 2)
        assert 40 < np.asarray(part.values, np.float64).std() < 90  # photographs, neither flat nor noise


@needs_sklearn
@pytest.mark.parametrize("size, stride, held_out", [(8, 4, 0.2), (5, 1, 0.33), (4, 7, 0.6)])
def test_photo_patches_never_overlap_what_is_held_out(monkeypatch, size, stride, held_out):
    """On photographs whose grey is the number of the column, or of the row."""
    from sklearn import datasets

    columns, rows = np.meshgrid(np.arange(120, dtype=np.uint8), np.arange(40, dtype=np.uint8))
    photos = [np.repeat(grey[..., None], 3, axis=2) for grey in (columns, rows)]
    fake = type("Photos", (), {"images": photos})
    monkeypatch.setattr(datasets, "load_sample_images", lambda: fake)
    train, rest = images.photo_patches(size, stride=stride, held_out=held_out)
    of_columns = lambda part: np.asarray(part.values)[np.asarray(part.labels) == 0]
    border = round(120 * (1 - held_out))
    assert of_columns(train).max() < border <= of_columns(rest).min()
    assert of_columns(train).max() >= border - stride and of_columns(rest).min() == border
    # Each patch is a piece of the photograph, upright.
    patch = of_columns(rest)[1, 0]
    np.testing.assert_array_equal(patch, np.broadcast_to(border + stride + np.arange(size), (size, size)))
    of_rows = np.asarray(train.values)[np.asarray(train.labels) == 1]
    np.testing.assert_array_equal(of_rows[0, 0], np.arange(size)[:, None].repeat(size, 1))


@needs_sklearn
def test_photo_patches_are_luma(monkeypatch):
    from sklearn import datasets

    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    fake = type("Photos", (), {"images": [np.tile(colours[None], (1, 5, 1))]})
    monkeypatch.setattr(datasets, "load_sample_images", lambda: fake)
    train, _ = images.photo_patches(1, stride=1)
    assert train.values[:4].reshape(-1).tolist() == [76, 150, 29, 255]


@needs_sklearn
def test_photo_patches_say_what_does_not_fit():
    for wrong in (dict(size=0), dict(stride=0), dict(held_out=0.0), dict(held_out=1.0)):
        with pytest.raises(ValueError, match="are needed"):
            images.photo_patches(**wrong)
    with pytest.raises(ValueError, match="200 x 200 does not fit into 427 x 128"):
        images.photo_patches(200, stride=100)


@pytest.mark.parametrize("load", [images.digits, images.photo_patches])
def test_missing_scikit_learn_has_a_remedy(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'eqgen\[images\]'"):
        load()


def test_shapes_depend_on_the_key_alone():
    data = images.shapes(402, key=jr.key(0))
    assert data.shape == (3, 32, 32) and data.levels == 256
    np.testing.assert_array_equal(np.bincount(data.labels), [101, 101, 100, 100])
    np.testing.assert_array_equal(images.shapes(402, key=jr.key(0)).values, data.values)
    assert (images.shapes(402, key=jr.key(1)).values != data.values).any(axis=(1, 2, 3)).all()


def test_shapes_are_what_they_are_called():
    n, size = 300, 96  # large, so that pixels hardly matter
    data = images.shapes(n, size, key=jr.key(0))
    pixels = np.asarray(data.values, np.float32)
    ground = pixels[:, :, :1, :1]
    border = np.ones((size, size), bool)
    border[1:-1, 1:-1] = False
    assert (abs(pixels[..., border] - ground[..., 0]) <= 1).all()  # wholly inside
    assert (pixels >= ground).all()  # a brighter shape
    assert len(np.unique(pixels.max(axis=(2, 3)), axis=0)) > 290  # of its own colour
    # How much of a pixel is covered, from the channel in which it is seen best.
    contrast = pixels.max(axis=(2, 3)) - ground[:, :, 0, 0]
    best = np.arange(n), contrast.argmax(axis=1)
    cover = (pixels[best] - ground[best]) / contrast[best][:, None, None]
    assert ((cover > 0.1) & (cover < 0.9)).any(axis=(1, 2)).mean() > 0.95  # smooth edges

    # The area, of a shape as high as 1, tells what it is.
    area, width, height = cover.sum((1, 2)), cover.sum(2).max(1), cover.sum(1).max(1)
    filled = area / height**2
    kinds = np.asarray(data.labels)
    for kind, part in enumerate([np.pi / 4, 1, 1 / np.sqrt(3), 5 / 9]):
        assert abs(np.median(filled[kinds == kind]) - part) < 0.03, images.SHAPES[kind]
    # The triangle's point is on top: its centre of mass is a third of its height above its foot.
    rows = cover.max(axis=2) > 0.5
    foot = size - rows[:, ::-1].argmax(axis=1)
    above = (foot - (cover.sum(2) * (np.arange(size) + 0.5)).sum(1) / area) / height
    for kind, part in enumerate([1 / 2, 1 / 2, 1 / 3, 1 / 2]):
        assert abs(np.median(above[kinds == kind]) - part) < 0.03, images.SHAPES[kind]
    # Places and sizes vary as far as there is room.
    radius = width[kinds == 0] / 2
    assert 11.9 < radius.min() < 13 and 23 < radius.max() < 24.1
    for axis in (1, 2):
        centre = (cover.sum(axis) * (np.arange(size) + 0.5)).sum(1) / area
        assert centre.min() < 24 and centre.max() > size - 24


def test_shapes_need_room():
    with pytest.raises(ValueError, match="at least 1 and 8"):
        images.shapes(3, 7, key=jr.key(0))
    with pytest.raises(ValueError, match="at least 1 and 8"):
        images.shapes(0, key=jr.key(0))


# --- CIFAR-10 ---

NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
# Every byte occurs, and the batches are of different lengths.
BATCHES = {
    name: (RNG.integers(0, 256, (2 + i, 3072), np.uint8), RNG.integers(0, 10, 2 + i).tolist())
    for i, name in enumerate(NAMES)
}


def binary(rows, labels):
    return np.concatenate([np.array(labels, np.uint8)[:, None], rows], axis=1).tobytes()


def text(content: bytes) -> bytes:
    """A string in a pickle of Python 2."""
    short = len(content) < 256
    return (b"U" if short else b"T") + len(content).to_bytes(1 if short else 4, "little") + content


def number(value: int) -> bytes:
    return b"K%c" % value if value < 256 else b"M" + value.to_bytes(2, "little")


def array(rows, dtype=b"u1") -> bytes:
    """An array of bytes as NumPy pickled it under Python 2."""
    shape = b"".join(map(number, rows.shape)) + {1: b"\x85", 2: b"\x86"}[rows.ndim]
    described = b"cnumpy\ndtype\nq\x0e" + text(dtype) + b"K\x00K\x01\x87q\x0fRq\x10"
    described += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\tU\x01bq\n\x87q\x0bRq\x0c"
    return empty + b"(K\x01" + shape + described + b"\x89" + text(rows.tobytes()) + b"tb"


def pickled(rows, labels, /, **instead: bytes) -> bytes:
    """A batch as it was published: a dictionary of strings, numbers and one array."""
    entries = {
        "batch_label": text(b"training batch 1 of 5") + b"q\x03",
        "labels": b"]q\x05(" + b"".join(map(number, labels)) + b"e",
        "data": array(rows),
        "filenames": b"]q\x11(" + b"".join(text(b"a.png") for _ in labels) + b"e",
    } | instead
    return b"\x80\x02}q\x01(" + b"".join(text(k.encode()) + v for k, v in entries.items()) + b"u."


def batch_files(version):
    if version == "bin":
        return {f"{name}.bin": binary(*batch) for name, batch in BATCHES.items()}
    return {name: pickled(*batch) for name, batch in BATCHES.items()}


def written(path, files, *, version="bin", archive=False):
    """The files as a folder or as a .tar.gz."""
    if archive:
        with tarfile.open(path, "w:gz") as tar:
            for name, content in {"readme.html": b"<p>", **files}.items():
                info = tarfile.TarInfo(f"cifar-10-batches-{version}/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        path.mkdir(parents=True)
        for name, content in {"readme.html": b"<p>", **files}.items():
            (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("where", ["folder", "folder above", "archive"])
@pytest.mark.parametrize("version", ["bin", "py"])
def test_cifar10_is_read_bit_exactly(tmp_path, version, where):
    path = tmp_path / ("cifar.tar.gz" if where == "archive" else f"cifar-10-batches-{version}")
    path = written(path, batch_files(version), version=version, archive=where == "archive")
    path = tmp_path if where == "folder above" else path
    for train, names in ((True, NAMES[:5]), (False, NAMES[5:])):
        data = images.cifar10(path, train=train)
        rows, labels = zip(*(BATCHES[name] for name in names))
        np.testing.assert_array_equal(data.values, np.concatenate(rows).reshape(-1, 3, 32, 32))
        np.testing.assert_array_equal(data.labels, np.concatenate(labels))
        assert data.levels == 256 and data.values.dtype == jnp.uint8


def test_cifar10_missing(tmp_path):
    with pytest.raises(DataError, match="No such file.*Give the folder or the .tar.gz"):
        images.cifar10(tmp_path / "nowhere")
    with pytest.raises(DataError, match="neither data_batch_1 nor data_batch_1.bin"):
        images.cifar10(tmp_path)
    for version, name in (("bin", "data_batch_3.bin"), ("py", "data_batch_3")):
        files = batch_files(version)
        del files[name]
        for archive in (False, True):
            path = tmp_path / f"{version}{archive}"
            with pytest.raises(DataError, match=f"there is no {name}\\. Copy"):
                images.cifar10(written(path, files, version=version, archive=archive))
            assert len(images.cifar10(path, train=False)) == 7  # which needs another file


@pytest.mark.parametrize(
    "content, message",
    [
        (binary(*BATCHES["data_batch_2"])[:-1], "has 9218 bytes, no multiple of 3073. Was it cut"),
        (b"", "has 0 bytes"),
        (binary(BATCHES["data_batch_2"][0], [1, 9, 10]), "a label is 10"),
    ],
)
def test_cifar10_bad_binary_file_is_named(tmp_path, content, message):
    files = batch_files("bin") | {"data_batch_2.bin": content}
    with pytest.raises(DataError, match=f"data_batch_2.bin: .*{message}"):
        images.cifar10(written(tmp_path / "it", files))


ROWS, LABELS = BATCHES["data_batch_2"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no pickle, or damaged"),
        (b"<html>", "no pickle, or damaged"),
        (pickled(ROWS, LABELS)[:-1], "no pickle, or damaged"),
        (pickled(ROWS, LABELS)[:5000], "no pickle, or damaged"),
        (b"\x80\x02.", "no pickle, or damaged"),
        (b"\x80\x02h\x07.", "no pickle, or damaged"),
        (b"\x80\x02}K\x01(e.", "no pickle, or damaged"),
        (b"\x80\x02}(K\x01K\x02u.", "a key is int"),
        (b"\x80\x02].", "it holds list"),
        (b"\x80\x02}(" + text(b"fine_labels") + b"]u.", "data and labels is needed; it holds fine_labels"),
        (pickled(ROWS[:, :-1], LABELS), r"data is \(3, 3071\)"),
        (pickled(ROWS, LABELS, data=array(ROWS.reshape(-1)[:300])), r"data is \(300,\)"),
        (pickled(ROWS, LABELS, data=b"]"), "data is list"),
        (pickled(ROWS[:0], []), r"data is \(0, 3072\)"),
        (pickled(ROWS, LABELS, data=array(ROWS, b"f4")), "only arrays of bytes are read"),
        (pickled(ROWS, LABELS, data=array(ROWS, b"O8")), "only arrays of bytes are read"),
        (pickled(ROWS, LABELS[:-1]), "2 labels for 3 images"),
        (pickled(ROWS, [1, 2, 10]), "a label is 10"),
        (pickled(ROWS, LABELS, labels=b"J\xff\xff\xff\xff"), "labels is no list"),
        (pickled(ROWS, LABELS, labels=b"](K\x01K\x02J\xff\xff\xff\xffe"), "a label is -1"),
        (pickled(ROWS, LABELS, labels=b"](K\x01K\x02U\x013e"), "labels is no list"),
    ],
)
def test_cifar10_bad_pickle_is_named(tmp_path, content, message):
    files = batch_files("py") | {"data_batch_2": content}
    with pytest.raises(DataError, match=f"data_batch_2: .*{message}"):
        images.cifar10(written(tmp_path / "it", files))


def attacks(command: bytes) -> dict[str, tuple[bytes, str]]:
    """Pickles that run a command when they are loaded as pickles are."""
    call = text(command) + b"\x85R."
    quoted = repr(command.decode()).encode()
    state = b"}" + text(b"labels") + b"cposix\nsystem\n" + text(command) + b"\x85Rs."
    described = b"\x80\x02cnumpy\nndarray\n" + text(command) + b"\x85R."
    return {
        "os": (b"\x80\x02cos\nsystem\n" + call, r"os\.system"),
        "posix": (b"\x80\x02cposix\nsystem\n" + call, r"posix\.system"),
        "within a batch": (b"\x80\x02" + state, r"posix\.system"),
        "builtins": (
            b"\x80\x02c__builtin__\neval\n" + text(b"__import__('os').system(%s)" % quoted) + b"\x85R.",
            r"__builtin__\.eval",
        ),
        "a likely package": (b"\x80\x02cnumpy.core.multiarray\nos.system\n" + call, "os.system"),
        "protocol 0": (b"cos\nsystem\n(S" + quoted + b"\ntR.", r"os\.system"),
        "inst": (b"(S" + quoted + b"\nios\nsystem\n.", "instruction"),
        "obj": (b"(cos\nsystem\n" + text(command) + b"o.", r"os\.system"),
        "stack global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93" + call, "instruction SHORT_BINUNICODE"),
        "new object": (b"\x80\x02cos\nsystem\n" + text(command) + b"\x85\x81.", r"os\.system"),
        "extension": (b"\x80\x02\x82\x01" + call, "instruction EXT1"),
        "persistent": (b"P" + command + b"\n.", "instruction PERSID"),
        "call of an allowed name": (described, "only arrays of bytes"),
    }


@pytest.mark.parametrize("attack", attacks(b""))
def test_cifar10_runs_nothing(tmp_path, attack):
    content, message = attacks(f"touch {tmp_path}/ran".encode())[attack]
    files = batch_files("py") | {"data_batch_1": content}
    for archive in (False, True):
        with pytest.raises(DataError, match=f"data_batch_1: .*{message}"):
            images.cifar10(written(tmp_path / f"{archive}", files, version="py", archive=archive))
    assert not (tmp_path / "ran").exists()


def test_cifar10_is_not_held_up_by_tuples_within_tuples(tmp_path):
    """Whose text, or hash, takes 2^60 steps."""
    bomb = b"K\x01" + b"q\x01h\x01\x86" * 60
    for content in (b"\x80\x02cnumpy\ndtype\n" + bomb + b"R.", b"\x80\x02}" + bomb + b"K\x01s."):
        files = batch_files("py") | {"data_batch_1": content}
        path = tmp_path / str(len(content))
        with pytest.raises(DataError, match="data_batch_1"):
            images.cifar10(written(path, files))


def test_cifar10_bad_archives(tmp_path, monkeypatch):
    files = batch_files("bin")
    good = written(tmp_path / "good.tar.gz", files, archive=True)
    content = good.read_bytes()
    for name, damaged in {
        "cut": content[: len(content) // 2],
        "flipped": content[:9000] + bytes(200) + content[9200:],
        "text": b"404 not found",
        "empty": b"",
    }.items():
        path = tmp_path / f"{name}.tar.gz"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name}.tar.gz: .*Give the folder or the .tar.gz"):
            images.cifar10(path)

    for name in ("../data_batch_1.bin", "a/../../data_batch_1.bin", "/data_batch_1.bin"):
        path = tmp_path / "inner" / "outside.tar.gz"
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo(name)
            info.size = 3073
            tar.addfile(info, io.BytesIO(bytes(3073)))
        with pytest.raises(DataError, match="points out of the archive"):
            images.cifar10(path)
        assert not list(tmp_path.rglob("data_batch*"))

    path = tmp_path / "link.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="data_batch_1.bin' is no plain file"):
        images.cifar10(path)

    monkeypatch.setattr(images, "_LARGEST", 10_000)
    with pytest.raises(DataError, match="data_batch_3.bin has 12292 bytes"):
        images.cifar10(good)
    with pytest.raises(DataError, match="data_batch_3.bin has 12292 bytes"):
        images.cifar10(written(tmp_path / "folder", files))


# --- Folders ---


def saved(path, shape=(4, 6, 3), mode=None):
    """An image of noise; its pixels."""
    pixels = RNG.integers(0, 256, shape, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return pixels


def test_folder_of_classes(tmp_path):
    # Written in another order than that of their names.
    pixels = {name: saved(tmp_path / name) for name in ("b/2.png", "a/z.PNG", "b/10.bmp", "c/x.tiff")}
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "._2.png").write_bytes(b"what a Mac leaves")
    data = images.folder(tmp_path)
    assert data.shape == (3, 4, 6) and data.levels == 256
    assert data.labels.tolist() == [0, 1, 1, 2]
    for row, name in enumerate(["a/z.PNG", "b/10.bmp", "b/2.png", "c/x.tiff"]):
        np.testing.assert_array_equal(data.values[row], pixels[name].transpose(2, 0, 1))


def test_folder_without_classes(tmp_path):
    pixels = [saved(tmp_path / name) for name in ("0.png", "1.ppm")]
    data = images.folder(tmp_path)
    assert data.labels is None
    np.testing.assert_array_equal(data.values, np.stack(pixels).transpose(0, 3, 1, 2))


def test_folder_in_grey(tmp_path):
    pixels = saved(tmp_path / "0.png", (4, 6))
    saved(tmp_path / "1.png")
    data = images.folder(tmp_path, grey=True)
    assert data.shape == (1, 4, 6)
    np.testing.assert_array_equal(data.values[0, 0], pixels)
    np.testing.assert_array_equal(images.folder(tmp_path).values[0], np.stack([pixels] * 3))


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK", "1"])
def test_folder_reads_every_kind_of_colour(tmp_path, mode):
    saved(tmp_path / "0.tif", mode=mode)
    expected = np.asarray(Image.open(tmp_path / "0.tif").convert("RGB"))
    np.testing.assert_array_equal(images.folder(tmp_path).values[0], expected.transpose(2, 0, 1))


def test_folder_turns_photographs_upright(tmp_path):
    pixels = RNG.integers(0, 256, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif)
    turned = np.rot90(pixels, -1)
    np.testing.assert_array_equal(images.folder(tmp_path).values[0], turned.transpose(2, 0, 1))


def test_folder_crops_and_scales(tmp_path):
    # 8 x 40 with one colour in the middle and another beside it (apart by what the filter is wide); and a square.
    wide = np.zeros((8, 40, 3), np.uint8)
    wide[:, 9:31] = 200
    Image.fromarray(wide).save(tmp_path / "0.png")
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "1.png")
    data = images.folder(tmp_path, size=4)
    assert data.shape == (3, 4, 4)
    np.testing.assert_array_equal(data.values[0], np.full((3, 4, 4), 200))
    np.testing.assert_array_equal(data.values[1], np.full((3, 4, 4), 90))
    assert images.folder(tmp_path, size=(3, 5)).shape == (3, 3, 5)
    with pytest.raises(ValueError, match="at least 1"):
        images.folder(tmp_path, size=0)


def test_folder_names_what_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        images.folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no images"):
        images.folder(tmp_path)
    saved(tmp_path / "a" / "0.png")
    with pytest.raises(DataError, match="Not a directory"):
        images.folder(tmp_path / "a" / "0.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is a folder without images"):
        images.folder(tmp_path)
    saved(tmp_path / "above.png")
    with pytest.raises(DataError, match=r"images \(above.png\) beside folders"):
        images.folder(tmp_path)


def test_folder_names_the_other_shape(tmp_path):
    saved(tmp_path / "0.png")
    saved(tmp_path / "1.png", (6, 4, 3))
    with pytest.raises(DataError, match=r"1.png has 6 x 4 pixels and .*0.png has 4 x 6.*size="):
        images.folder(tmp_path)
    assert len(images.folder(tmp_path, size=4)) == 2


def test_folder_names_damaged_images(tmp_path):
    saved(tmp_path / "0.png", (40, 60, 3))
    saved(tmp_path / "good.jpg", (40, 60, 3))
    png, jpeg = (tmp_path / "0.png").read_bytes(), (tmp_path / "good.jpg").read_bytes()
    for content in (b"", b"text", png[: len(png) // 2], png[:100] + bytes(50) + png[150:], jpeg[:300]):
        (tmp_path / "1.png").write_bytes(content)
        with pytest.raises(DataError, match="1.png cannot be read as an image"):
            images.folder(tmp_path)
    # Another format under this name could be one that Pillow hands to a program, as it does with PostScript.
    Image.open(tmp_path / "0.png").save(tmp_path / "1.png", format="PCX")
    with pytest.raises(DataError, match="1.png cannot be read as an image"):
        images.folder(tmp_path)


def test_folder_needs_8_bits(tmp_path):
    Image.fromarray(RNG.integers(0, 2**16, (4, 6), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep.png has more than 8 bits per channel \(I;16\)"):
        images.folder(tmp_path)


@pytest.mark.parametrize("limit", [20, 10])  # at which Pillow warns, and at which it refuses
def test_folder_decodes_no_bombs(tmp_path, monkeypatch, limit):
    saved(tmp_path / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24)
    assert len(images.folder(tmp_path)) == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match="0.png is too large to be decoded safely"):
        images.folder(tmp_path)
