"""Images for diffusion models: scikit-learn's digits and photographs, drawn shapes, CIFAR-10, a folder of pictures.

All are `ExampleData` of bytes, channels first. Digits and photographs need the extra `images`, CIFAR-10 needs its
archives as published (Krizhevsky, 2009, "Learning Multiple Layers of Features from Tiny Images").
"""

import gzip
import pickletools
import reprlib
import struct
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from eqgen.data.episodes import DataError
from eqgen.data.examples import ExampleData, to_levels


# --- scikit-learn ---


def digits() -> ExampleData:
    """1797 handwritten digits, 1 x 8 x 8 with 17 levels and the labels 0 to 9.

    **Raises:** `ImportError` without scikit-learn.
    """
    content: Any = _sklearn_datasets().load_digits()
    return ExampleData(content.images.astype(np.uint8)[:, None], content.target, levels=17)


def photo_patches(
    size: int = 8, *, stride: int = 4, held_out: float = 0.2
) -> tuple[ExampleData, ExampleData]:
    """Square grey patches of the two photographs that come with scikit-learn, labelled by the photograph.

    The photographs are split and not the patches: those of the two sets have no pixel in common, while patches of
    one set overlap if `stride` is below `size`. With the defaults 26670 are to train on and 6510 are held out.

    **Arguments:** `held_out`: which part of each photograph, from its right edge.

    **Raises:** `ImportError` without scikit-learn; `ValueError` where a region has no room for a patch.
    """
    if size < 1 or stride < 1 or not 0 < held_out < 1:
        raise ValueError(
            f"size is {size}, stride {stride} and held_out {held_out}; at least 1, at least 1 and a number between "
            "0 and 1 are needed."
        )
    photos = _sklearn_datasets().load_sample_images().images
    # The luma of JPEG.
    grey = [np.round(photo @ np.array([0.299, 0.587, 0.114])).astype(np.uint8) for photo in photos]
    border = [round(photo.shape[1] * (1 - held_out)) for photo in grey]
    train = [photo[:, :column] for photo, column in zip(grey, border)]
    rest = [photo[:, column:] for photo, column in zip(grey, border)]
    return _patches(train, size, stride), _patches(rest, size, stride)


def _patches(regions, size, stride):
    for region in regions:
        if min(region.shape) < size:
            height, width = region.shape
            raise ValueError(f"A patch of {size} x {size} does not fit into {height} x {width} pixels.")
    windows = [np.lib.stride_tricks.sliding_window_view(region, (size, size)) for region in regions]
    patches = [window[::stride, ::stride].reshape(-1, 1, size, size) for window in windows]
    labels = np.repeat(np.arange(len(patches)), [len(patch) for patch in patches])
    return ExampleData(np.concatenate(patches), labels, levels=256)


def _sklearn_datasets():
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "Digits and photographs come with scikit-learn. Remedy: pip install 'eqgen[images]'"
        ) from error
    return datasets


# --- Drawn ---

SHAPES = ("disc", "square", "triangle", "cross")


def shapes(n: int, size: int = 32, *, key: Key[Array, ""]) -> ExampleData:
    """`n` pictures, 3 x `size` x `size`, of one shape each, whose number in `SHAPES` is the label.

    Place, size, colour and the grey of the background are random, but a shape lies wholly inside, is brighter than
    what is behind it, and has smooth edges. Labels take turns, so that classes are as equal as `n` allows.

    **Raises:** `ValueError` when `size` is below 8: nothing could be told apart.
    """
    if n < 1 or size < 8:
        raise ValueError(f"n is {n} and size {size}; at least 1 and 8 are needed.")
    labels = jnp.arange(n) % len(SHAPES)
    return ExampleData(_draw(labels, jr.uniform(key, (n, 7)), size), labels, levels=256)


@partial(jax.jit, static_argnames="size")
def _draw(
    labels: Int[Array, " n"], numbers: Float[Array, "n 7"], size: int
) -> UInt8[Array, "n 3 {size} {size}"]:
    """Pictures of these kinds; the numbers in [0, 1] say size, place, background and colour."""

    def picture(of):
        label, (u, *place, ground, red, green, blue) = of
        radius = size / 8 * (1 + u)
        pixels, room = jnp.arange(size) + 0.5, size - 2 * (radius + 1)
        x, y = jnp.meshgrid(*(pixels - radius - 1 - room * v for v in place))
        cover = jnp.clip(0.5 - _distance(label, x, y, radius), 0, 1)[None]
        ground, colour = 0.6 * ground - 1, 1.2 * jnp.stack([red, green, blue])[:, None, None] - 0.2
        return to_levels(ground + cover * (colour - ground), 256)

    # Some at a time: as floats they take many times the memory of what is kept.
    return jax.lax.map(picture, (labels, numbers), batch_size=256)


def _distance(
    label: Int[Array, ""], x: Float[Array, "h w"], y: Float[Array, "h w"], radius: Float[Array, ""]
) -> Float[Array, "h w"]:
    """How far outside (or, negative, inside) of the shape each place is, with y pointing down; beyond a corner it
    is the larger of the distances from the edges."""
    box = lambda width, height: jnp.maximum(jnp.abs(x) - width, jnp.abs(y) - height)
    disc = jnp.sqrt(x**2 + y**2) - radius
    square = box(radius * 0.8, radius * 0.8)
    # Equilateral, and `radius` is that of the circle through its corners.
    triangle = jnp.maximum(y, jnp.sqrt(3) / 2 * jnp.abs(x) - y / 2) - radius / 2
    cross = jnp.minimum(box(radius, radius / 3), box(radius / 3, radius))
    return jnp.stack([disc, square, triangle, cross])[label]


# --- CIFAR-10 ---

_ROW = 1 + 3 * 32 * 32
_LARGEST = 2**27
"""Bytes of one batch. The published ones have 31 million; what is much larger is something else."""


_LARGEST_ARCHIVE = 2**29


def cifar10(path: str | Path, *, train: bool = True) -> ExampleData:
    """CIFAR-10, 3 x 32 x 32: 50000 images to train on, or the 10000 of the test batch.

    **Arguments:** `path`: the binary version (`cifar-10-binary.tar.gz`) or the one for Python
    (`cifar-10-python.tar.gz`), as an archive or as the folder that is in it. Archives are read and never unpacked,
    and of pickles only what arrays of bytes consist of is understood; nothing in them is run.

    **Raises:** `DataError` when a file is missing, cut, damaged or something else; it names the file.
    """
    path = Path(path)
    names = [f"data_batch_{number}" for number in range(1, 6)] if train else ["test_batch"]
    wanted = {f"{name}{suffix}" for name in names for suffix in ("", ".bin")}
    try:
        contents = _folder_contents(path, wanted) if path.is_dir() else _archive_contents(path, wanted)
    except DataError:
        raise
    except (
        OSError,
        EOFError,
        zlib.error,
        tarfile.TarError,
        ValueError,
        LookupError,
        ArithmeticError,
    ) as error:
        why = (
            getattr(error, "strerror", None)
            or f"no archive that can be read: {str(error).partition(chr(10))[0]}"
        )
        raise DataError(f"{path}: {why}. Give the folder or the .tar.gz of CIFAR-10.") from error
    if not contents:
        raise DataError(f"{path}: there is neither {names[0]} nor {names[0]}.bin. Is this CIFAR-10?")
    suffix = ".bin" if any(name.endswith(".bin") for name in contents) else ""
    batches = []
    for name in names:
        file = name + suffix
        if file not in contents:
            raise DataError(f"{path}: there is no {file}. Copy the whole of CIFAR-10.")
        try:
            batches.append((_binary_batch if suffix else _python_batch)(contents.pop(file)))
        except DataError as error:
            raise DataError(f"{path}: {file}: {error}") from error
    images, labels = (np.concatenate(parts) for parts in zip(*batches))
    return ExampleData(images.reshape(-1, 3, 32, 32), labels, levels=256)


def _folder_contents(path, wanted):
    """The wanted files in a folder, or in the one that an archive makes in it."""
    for folder in (path, path / "cifar-10-batches-bin", path / "cifar-10-batches-py"):
        files = [folder / name for name in sorted(wanted) if (folder / name).is_file()]
        if files:
            for file in files:
                _check_bytes(file, file.stat().st_size)
            return {file.name: file.read_bytes() for file in files}
    return {}


def _archive_contents(path, wanted):
    contents = {}
    with (
        _opened_archive(path) as whole,
        tarfile.open(fileobj=cast(Any, _Bounded(path, whole)), mode="r:") as archive,
    ):
        for member in archive:
            inside = PurePosixPath(member.name)
            if inside.is_absolute() or ".." in inside.parts:
                raise DataError(f"{path}: {member.name!r} points out of the archive. Download it again.")
            if inside.name in wanted:
                if not member.isreg():
                    raise DataError(f"{path}: {member.name!r} is no plain file. Download it again.")
                _check_bytes(f"{path}: {member.name}", member.size)
                contents[inside.name] = cast(IO[bytes], archive.extractfile(member)).read()
        while archive.fileobj.read(2**20):
            pass  # up to the checksum, which stands at the end
    return contents


def _opened_archive(path):
    """The archive as it is before it was packed by gzip, if it was."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else open(path, "rb")


class _Bounded:
    """A file of which no more can be read, or skipped, than an archive of CIFAR-10 has."""

    def __init__(self, path, file):
        self.path, self.file = path, file

    def read(self, size):
        self._check(self.file.tell() + size)
        return self.file.read(size)

    def seek(self, position):
        self._check(position)
        return self.file.seek(position)

    def tell(self):
        return self.file.tell()

    def _check(self, position):
        if not 0 <= position <= _LARGEST_ARCHIVE:
            raise DataError(
                f"{self.path} unpacks to more than {_LARGEST_ARCHIVE} bytes; CIFAR-10 has 180 million."
            )


def _check_bytes(name, count):
    if count > _LARGEST:
        raise DataError(f"{name} has {count} bytes; a batch of CIFAR-10 has 31 million.")


def _binary_batch(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images as rows, and labels."""
    if not content or len(content) % _ROW:
        raise DataError(f"it has {len(content)} bytes, no multiple of {_ROW}. Was it cut? Copy it again.")
    rows = np.frombuffer(content, np.uint8).reshape(-1, _ROW)
    return rows[:, 1:], _checked(rows[:, 0])


def _python_batch(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _unpickled(content)
    except DataError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"it is no pickle, or damaged: {error}. Copy it again.") from error
    if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
        found = ", ".join(sorted(batch)) or "nothing" if isinstance(batch, dict) else type(batch).__name__
        raise DataError(f"a dictionary with data and labels is needed; it holds {found}.")
    data, labels = batch["data"], batch["labels"]
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _ROW - 1 or not len(data):
        shape = data.shape if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"data is {shape}; bytes of shape (images, {_ROW - 1}) are needed.")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError("labels is no list of whole numbers.")
    if len(labels) != len(data):
        raise DataError(f"there are {len(labels)} labels for {len(data)} images.")
    return data, _checked(labels)


def _checked(labels):
    if wrong := [label for label in labels if not 0 <= label <= 9]:
        raise DataError(f"a label is {wrong[0]}; those of CIFAR-10 are 0 to 9.")
    return np.asarray(labels, np.int32)


_NAMES = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
}
"""The functions and classes that arrays of bytes name in a pickle, as words that are looked at and not called."""


def _unpickled(content: bytes) -> Any:
    """What a pickle of protocol 2 holds: dictionaries, lists, tuples, strings, whole numbers, arrays of bytes.

    Nothing is imported and nothing called. Strings of Python 2, which are bytes, come out as Latin-1.

    **Raises:** `DataError` naming what it asks for beyond that; `ValueError`, `TypeError`, `LookupError` or
    `AttributeError` where it is damaged.
    """
    stack: list[Any] = []
    marks, memo = [], {}

    def since_mark():
        begin = marks.pop()
        items = stack[begin:]
        del stack[begin:]
        return items

    value: Any
    for opcode, value, _ in pickletools.genops(content):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "BININT" | "BININT1" | "BININT2" | "BINSTRING" | "SHORT_BINSTRING" | "BINUNICODE":
                stack.append(value)
            case "NONE" | "NEWFALSE" | "NEWTRUE":
                stack.append({"NONE": None, "NEWFALSE": False, "NEWTRUE": True}[opcode.name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "APPEND":
                item = stack.pop()
                list.append(cast(list, stack[-1]), item)
            case "APPENDS":
                items = since_mark()
                list.extend(cast(list, stack[-1]), items)
            case "SETITEM":
                items = [stack.pop(-2), stack.pop()]
                _set(stack[-1], items)
            case "SETITEMS":
                items = since_mark()
                _set(stack[-1], items)
            case "GLOBAL":
                if value not in _NAMES:
                    raise DataError(
                        f"it asks for {value.replace(' ', '.')}, which no array of bytes needs; it was refused and "
                        "nothing was run. Do not trust this file."
                    )
                stack.append(_NAMES[value])
            case "REDUCE":
                arguments = stack.pop()
                stack[-1] = _reduced(stack[-1], arguments)
            case "BUILD":
                state = stack.pop()
                stack[-1] = _built(stack[-1], state)
            case name:
                raise DataError(f"it holds the instruction {name}, which CIFAR-10's pickles do not.")
    raise ValueError("it does not end")


def _set(thing, items):
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Other keys have no use here, and the hash of tuples within tuples may take for ever.
        if not isinstance(key, str):
            raise TypeError(f"a key is {type(key).__name__}")
        dict.update(thing, {key: value})


def _reduced(name, arguments):
    """What pickle would get by calling the function of this name."""
    match name, arguments:
        case "array", _:
            return "array"  # an empty one, whose content follows
        case "dtype", ("u1", *_):
            return "u1"
        case "encode", (str(text), "latin1"):
            return text
    raise DataError(
        f"it asks for {reprlib.repr(name)} of {reprlib.repr(arguments)}; only arrays of bytes are read."
    )


def _built(thing, state):
    """What pickle would get by giving this state to the thing."""
    match thing, state:
        case "u1", tuple():
            return "u1"
        case "array", (_, tuple(shape), "u1", bool(fortran), str(text)):
            array = np.frombuffer(text.encode("latin-1"), np.uint8)
            return array.reshape(shape, order="F" if fortran else "C")
    raise DataError(f"it gives {reprlib.repr(thing)} a state that no array of bytes has.")


# --- Folders ---

_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".pgm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""Those that Pillow decodes by itself; for some others it starts a program."""


_DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(struct.error, zlib.error),
)
"""What Pillow raises for files that are not what they should be."""


def folder(path: str | Path, *, size: int | tuple[int, int] | None = None, grey: bool = False) -> ExampleData:
    """The PNG, JPEG, BMP, GIF, PPM, TIFF and WebP files of a folder; hidden and other files are passed over.

    Either the images lie in the folder itself and have no labels, or each folder in it holds those of one class:
    label 0 is the first by name. Colour images are RGB, whatever they were, and transparency is dropped.

    **Arguments:**

    - `size`: the images' height and width (one number: both), to which they are scaled after what is too long in
        one direction was cut off at both ends. None: all must have one size, and keep it.
    - `grey`: one channel instead of three.

    **Raises:** `DataError` naming the file that cannot be used; `ValueError` for a size below 1.
    """
    path, size = Path(path), (size, size) if isinstance(size, int) else size
    if size is not None and min(size) < 1:
        raise ValueError(f"size is {size}; at least 1 is needed.")
    try:
        own, folders = _image_files(path), sorted(f for f in _visible(path) if f.is_dir())
        classes = {f: _image_files(f) for f in folders}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Give a folder of images.") from error
    if own and any(classes.values()):
        raise DataError(
            f"{path} has images ({own[0].name}) beside folders of images. Labels need folders only."
        )
    for f, files in classes.items():
        if not own and not files:
            raise DataError(f"{f} is a folder without images, and folders are classes. Remove it.")
    files = own or [file for files in classes.values() for file in files]
    if not files:
        raise DataError(f"{path} has no images: files {', '.join(sum(_FORMATS.values(), ()))} are read.")
    images = [_image(file, size, grey) for file in files]
    for file, image in zip(files, images):
        if image.shape != images[0].shape:
            raise DataError(
                f"{file} has {image.shape[1]} x {image.shape[2]} pixels and {files[0]} has {images[0].shape[1]} x "
                f"{images[0].shape[2]}. Give the size that all shall have: `folder(path, size=...)`."
            )
    labels = None if own else np.repeat(np.arange(len(classes)), [len(f) for f in classes.values()])
    return ExampleData(np.stack(images), labels, levels=256)


def _visible(path) -> Iterator[Path]:
    return (entry for entry in path.iterdir() if not entry.name.startswith("."))


def _image_files(path) -> list[Path]:
    suffixes = sum(_FORMATS.values(), ())
    return sorted(f for f in _visible(path) if f.suffix.lower() in suffixes and f.is_file())


def _image(path, size, grey) -> np.ndarray:
    """One image as (channels, height, width) bytes."""
    from PIL import Image, ImageOps  # heavy, and only folders need it

    bomb = (Image.DecompressionBombWarning, Image.DecompressionBombError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=list(_FORMATS)) as file:
                if file.mode.startswith(("I", "F")):
                    raise DataError(
                        f"{path} has more than 8 bits per channel ({file.mode}). Convert it to 8."
                    )
                image = ImageOps.exif_transpose(file).convert("L" if grey else "RGB")
    except DataError:
        raise
    except bomb as error:
        raise DataError(f"{path} is too large to be decoded safely: {error} Make it smaller.") from error
    except _DAMAGE as error:
        raise DataError(f"{path} cannot be read as an image: {error}. Remove it or copy it again.") from error
    if size is not None:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    array = np.asarray(image)
    return array[None] if grey else array.transpose(2, 0, 1)
