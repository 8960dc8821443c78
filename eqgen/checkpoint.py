"""A PyTree in one file: a line of JSON, then the leaves.

The first line says what the file is: the format, the version of eqgen, the caller's metadata, the path, shape
and dtype of every leaf, and a SHA-256 of all this and of the leaves. So a file that is damaged, foreign or of
other shapes is told apart before anything is read into arrays, and nothing is ever unpickled. The leaves are
written by `equinox.tree_serialise_leaves` (NumPy's npy format, one after another).
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqgen
from eqgen.files import parse_json, replacing


Tree = TypeVar("Tree")

FORMAT, VERSION = "eqgen-checkpoint", 1


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the message says why and what to do."""


class DamagedCheckpointError(CheckpointError):
    """The file is not what was once written: an older checkpoint may still be good."""


def save(path: str | Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Writes `tree` to `path`: wholly, or not at all.

    Leaves that are neither arrays nor Python numbers (activation functions, strings) are not written; they
    come from `like` when the file is read.

    **Arguments:**

    - `path`: an existing file of that name is replaced once the new one is complete and on disk.
    - `metadata`: anything JSON can hold.

    **Raises:** `CheckpointError` for typed PRNG keys and arrays of Python objects, which have no portable
    form, and when the disk is full or the folder cannot be written to; the previous file is then as it was.
    """
    leaves = _describe(tree, saving=True)
    content = {"eqgen": eqgen.__version__, "metadata": metadata, "leaves": leaves}
    blank = _header(content, payload_bytes=10**18, sha256="0" * 64)
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(blank + b"\n")
            payload = _HashedWriter(file, _canonical(content))
            eqx.tree_serialise_leaves(payload, tree)
            file.seek(0)
            header = _header(content, payload_bytes=payload.size, sha256=payload.hash.hexdigest())
            file.write(header.ljust(len(blank)))
    except (OSError, RuntimeError) as error:
        cause = error
        while not isinstance(cause, OSError):  # Equinox wraps what goes wrong at a leaf
            if (cause := cause.__cause__) is None:
                raise
        raise CheckpointError(
            f"Could not write {path}: {cause.strerror or cause}. What was there before is untouched. "
            "Free some space or choose another folder."
        ) from error


def load(path: str | Path, like: Tree) -> tuple[Tree, dict[str, Any]]:
    """Reads what `save` wrote.

    **Arguments:**

    - `like`: a tree of the same structure, whose array leaves may also be `jax.ShapeDtypeStruct` (from
        `eqx.filter_eval_shape`), so that nothing need be computed to read a file.

    **Returns:** the tree and the metadata.

    **Raises:** `DamagedCheckpointError` when the file is truncated, altered or not a checkpoint;
    `CheckpointError` when it is missing, of a newer format, or its leaves are not those of `like`.
    """
    with _open(path) as file:
        header = _read_header(path, file)
        start = file.tell()
        _verify(path, file, header)
        _match(path, header["content"]["leaves"], _describe(like, saving=False))
        file.seek(start)
        try:
            tree = eqx.tree_deserialise_leaves(file, like, filter_spec=_read_leaf)
        except (RuntimeError, ValueError, TypeError, EOFError, MemoryError) as error:
            # A checksum can be made to match by anyone.
            cause = error.__cause__ or error
            raise DamagedCheckpointError(
                f"The checkpoint {path} is not what its first line says: {cause}."
            ) from error
        return tree, header["content"]["metadata"]


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata alone, from the first line; the leaves are not checked."""
    with _open(path) as file:
        return _read_header(path, file)["content"]["metadata"]


def _read_leaf(file: BinaryIO, like: Any) -> Any:
    """A leaf, once its own header promises as many bytes as `like` has: nothing is allocated for one that lies."""
    if isinstance(like, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        expected = math.prod(like.shape) * np.dtype(like.dtype).itemsize
    elif isinstance(like, bool | int | float | complex):
        expected = 16
    else:
        return like
    start = file.tell()
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, dtype = read(file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > expected or min(shape, default=0) < 0:
        raise ValueError(f"a leaf of {expected} bytes is stored as {dtype} of shape {shape}")
    file.seek(start)
    return eqx.default_deserialise_filter_spec(file, like)


class _HashedWriter:
    """What `tree_serialise_leaves` writes to: passes everything on, and keeps its size and hash."""

    def __init__(self, file: BinaryIO, prefix: bytes):
        self.file, self.hash, self.size = file, hashlib.sha256(prefix), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)


def _canonical(content: dict) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _header(content: dict, *, payload_bytes: int, sha256: str) -> bytes:
    first = {"format": FORMAT, "version": VERSION, "payload_bytes": payload_bytes, "sha256": sha256}
    return json.dumps(first | {"content": content}).encode()


def _describe(tree: Any, *, saving: bool) -> list[list]:
    """[path, shape, dtype] of every leaf that is written, in order; of a Python number, its type."""
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = jax.tree_util.keystr(path)
        if isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
                raise CheckpointError(
                    f"The leaf {where} is a typed PRNG key, which has no portable form. Keep keys out of "
                    "states: derive them from a seed and a step, or store `jax.random.key_data(key)`."
                )
            if leaf.dtype == object:
                raise CheckpointError(
                    f"The leaf {where} is an array of Python objects, which are never pickled."
                )
            if saving and isinstance(leaf, jax.ShapeDtypeStruct):
                raise CheckpointError(f"The leaf {where} is a shape without values.")
            leaves.append([where, list(leaf.shape), str(leaf.dtype)])
        elif isinstance(leaf, bool | int | float | complex):
            leaves.append([where, [], type(leaf).__name__])
    return leaves


def _open(path: str | Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"Could not read the checkpoint {path}: {error.strerror or error}.") from error


def _read_header(path: str | Path, file: BinaryIO) -> dict[str, Any]:
    header: dict[str, Any] = {}
    try:
        # A foreign file may be one endless line.
        header = parse_json(file.readline(2**26))
        if header["format"] == FORMAT and header["version"] > VERSION:
            raise CheckpointError(
                f"{path} has checkpoint format {header['version']}; this eqgen ({eqgen.__version__}) reads "
                f"formats up to {VERSION}. Install a newer eqgen."
            )
        good = header["format"] == FORMAT and header["version"] == VERSION
        content = header["content"]
        good = good and isinstance(content["metadata"], dict) and all(map(_is_leaf, content["leaves"]))
        good = good and len(header["sha256"]) == 64 and type(header["payload_bytes"]) is int
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise DamagedCheckpointError(f"{path} is not a checkpoint of eqgen, or its first line is broken.")
    return header


def _is_leaf(leaf: Any) -> bool:
    """Whether an entry is as `_describe` makes them."""
    where, shape, dtype = leaf
    return isinstance(where, str) and isinstance(shape, list) and isinstance(dtype, str)


def _verify(path: str | Path, file: BinaryIO, header: dict[str, Any]) -> None:
    hash, size = hashlib.sha256(_canonical(header["content"])), 0
    while chunk := file.read(2**20):
        hash.update(chunk)
        size += len(chunk)
    if size < header["payload_bytes"]:
        raise DamagedCheckpointError(
            f"The checkpoint {path} is truncated: {size} of {header['payload_bytes']} bytes are there."
        )
    if (size, hash.hexdigest()) != (header["payload_bytes"], header["sha256"]):
        raise DamagedCheckpointError(
            f"The checkpoint {path} is damaged: its contents do not match its checksum."
        )


def _match(path: str | Path, found: list, expected: list) -> None:
    show: Callable[[list], str] = lambda leaf: f"{leaf[2]}{tuple(leaf[1])}"
    for ours, theirs in zip(expected, found):
        if ours[0] != theirs[0]:
            raise CheckpointError(
                f"{path} does not fit: where {ours[0]} is expected it holds {theirs[0]}. "
                "It was written by another algorithm or with other settings."
            )
        if ours[1:] != theirs[1:]:
            raise CheckpointError(
                f"{path} does not fit: {ours[0]} should be {show(ours)} and is {show(theirs)} in the file. "
                "It was written with other settings."
            )
    if len(expected) != len(found):
        raise CheckpointError(
            f"{path} does not fit: {len(expected)} leaves expected, {len(found)} in the file."
        )
