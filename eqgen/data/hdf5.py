"""HDF5 from strangers: arrays are read only if they are what they seem.

A file can point to other files (external links and storage, virtual datasets) and claim sizes that it does not
hold. Such datasets are refused by name. Nothing in a file is ever unpickled or evaluated. Files in which HDF5
itself crashes or runs for ever are found out by a process that looks at them first.
"""

import math
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import h5py
import numpy as np

from eqgen.data.episodes import DataError


_PROBE = """
import sys
import h5py

def look(item, seen):
    address = h5py.h5o.get_info(item.id).addr
    if address in seen:
        return
    seen.add(address)
    print(".", end="", flush=True)
    item.attrs.get("eqgen")
    if isinstance(item, h5py.Dataset):
        item.id.get_storage_size()
        if item.shape and not (item.external or item.is_virtual):
            item[:1] if item.nbytes < 2**20 else None
        return
    for name in item:
        if isinstance(item.get(name, getlink=True), h5py.HardLink):
            attempt(look, item[name], seen)

def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception:  # which the reader itself will meet, and name
        return None

for line in sys.stdin:
    file = attempt(h5py.File, line[:-1], "r")
    if file is not None:
        attempt(look, file, set())
        attempt(file.close)
    print(flush=True)
"""
PATIENCE = 20.0
"""Seconds in which one more of a file's groups and arrays must have been looked at."""


class _Prober:
    """Looks at files before they are opened here, in a process of its own, which stays for the next one.

    In a damaged file HDF5 may go in circles, or crash; inside its C code nothing here could end that.
    """

    def __init__(self):
        self._lock, self._process = threading.Lock(), None

    def look(self, path: Path) -> str | None:
        """What is wrong, if the file cannot be looked at."""
        if "\n" in (name := os.fspath(path.absolute())):
            return "its name has more than one line"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _PROBE],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # not interrupted with this process
                )
            process = self._process
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(os.fsencode(name + "\n"))
                process.stdin.flush()
                # A point for each group and array, and a new line at the end. The first waits for the interpreter.
                while select.select([process.stdout], [], [], PATIENCE)[0]:
                    if not (seen := os.read(process.stdout.fileno(), 2**16)):
                        wrong = "HDF5 crashes in it"
                        break
                    if seen.endswith(b"\n"):
                        return None
                else:
                    wrong = f"HDF5 does not come to an end in it within {PATIENCE:g} seconds"
            except OSError:
                wrong = "HDF5 crashes in it"
            process.kill()
            process.wait()
            return wrong


_prober = _Prober()


def _probe(path: Path) -> None:
    if path.is_file() and (wrong := _prober.look(path)):
        raise DataError(f"it is damaged: {wrong}. Copy or make it again.")


_DAMAGE = (RuntimeError, LookupError, TypeError, ValueError, ArithmeticError, MemoryError)
"""What h5py and NumPy raise for files that are not what they should be, besides `OSError`."""
_LARGE = 2**28


@contextmanager
def opened(path: str | Path) -> Iterator[h5py.File]:
    """The file, open for reading; whatever HDF5 objects to in it becomes a `DataError` with the file's name."""
    path = Path(path)
    try:
        _probe(path)
        if not h5py.is_hdf5(path):
            path.open("rb").close()  # missing, a folder, unreadable: these say so themselves
            raise DataError("it is no HDF5 file. Was it downloaded and unpacked whole?")
        with h5py.File(path, "r") as file:
            yield file
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        if error.strerror and error.filename:
            raise DataError(f"{path}: {error.strerror}.") from error
        raise DataError(f"{path} is damaged: {error}. Copy or make it again.") from error
    except _DAMAGE as error:
        raise DataError(f"{path} is damaged: {error}. Copy or make it again.") from error


@contextmanager
def _reading(key: str):
    """Whatever HDF5 or h5py stumble over while they read `key` becomes a `DataError`."""
    try:
        yield
    except DataError:
        raise
    except (OSError, *_DAMAGE) as error:
        raise DataError(f"{key} cannot be read: {error}. Copy the file or make it again.") from error


def names(group: h5py.Group) -> list[str]:
    """The names of what a group holds, in order; such as are no text are left out."""
    return sorted(name for name in group if isinstance(name, str))


def dataset_names(group: h5py.Group, depth: int = 5) -> list[str]:
    """The paths of all datasets in a group and in its groups.

    **Raises:** `DataError` for links, and for groups within groups without end.
    """
    if depth == 0:
        raise DataError(f"{group.name} is nested too deeply, or contains itself.")
    found = []
    for name in names(group):
        item = child(group, name)
        inner = dataset_names(item, depth - 1) if isinstance(item, h5py.Group) else [""]
        found += [f"{name}/{path}".rstrip("/") for path in inner]
    return found


def child(group: h5py.Group, key: str) -> h5py.Group | h5py.Dataset | None:
    """What lies under the key in this very file; None if nothing does.

    **Raises:** `DataError` for links, to other files above all.
    """
    for part in key.split("/"):
        if not isinstance(group, h5py.Group):
            return None
        with _reading(key):
            link = group.get(part, getlink=True)
            if link is None:
                return None
            if not isinstance(link, h5py.HardLink):
                raise DataError(
                    f"{key} is a link to elsewhere, which is not followed. Store the array itself."
                )
            group = cast(h5py.Group, group[part])  # or another; the next turn looks
    return group


def dataset(group: h5py.Group, key: str) -> h5py.Dataset:
    """The numeric dataset under the key, not yet read.

    **Raises:** `DataError` when there is none, or not one that can be read with trust.
    """
    found = child(group, key)
    if found is None:
        raise DataError(f"there is no {key}. It has: {', '.join(names(group)[:12]) or 'nothing'}.")
    if not isinstance(found, h5py.Dataset):
        hint = " Dictionaries are for Minari's loader." if isinstance(found, h5py.Group) else ""
        raise DataError(f"{key} is no array but a {type(found).__name__.lower()}.{hint}")
    with _reading(key):
        if found.external or found.is_virtual:
            raise DataError(f"{key} lies in other files, which are not opened. Store the array itself.")
        if not found.shape or found.dtype.kind not in "fiub":
            raise DataError(
                f"{key} holds {found.dtype} of shape {found.shape}, not rows of numbers. Store it as float32."
            )
        stored = found.id.get_storage_size()
        # gzip packs at most about 1000 to 1.
        if found.nbytes > 2**20 + 1100 * stored:
            raise DataError(
                f"{key} claims {found.nbytes} bytes and holds {stored}: the rest was never written. Make it anew."
            )
        # What is packed is unpacked a chunk at a time, which may be larger than the array.
        chunk = math.prod(found.chunks or ()) * found.dtype.itemsize
        if max(found.nbytes, chunk) > _LARGE + 100 * stored:
            raise DataError(
                f"{key} would unpack from {stored} to {max(found.nbytes, chunk)} bytes, which data never do. "
                "If they are meant, store them unpacked."
            )
    return found


def read(group: h5py.Group, key: str) -> np.ndarray:
    """The array under the key in memory, in single precision."""
    found = dataset(group, key)
    with _reading(key):
        return found.astype(np.float32)[()]


def read_flags(group: h5py.Group, key: str) -> np.ndarray:
    """The array of zeros and ones (of any type) under the key, as booleans; a column counts as a row."""
    found = dataset(group, key)
    with _reading(key):
        values = found[()]
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    strange = np.flatnonzero(~np.isin(values, (0, 1)))
    if len(strange):
        raise DataError(f"{key} is {values.reshape(-1)[strange[0]]} in row {strange[0]}; flags are 0 or 1.")
    return values.astype(bool)


def mapped(group: h5py.Group, key: str) -> np.ndarray:
    """The array under the key, memory-mapped: pages come from the disk as rows are used.

    **Raises:** `DataError` when it is packed, in pieces, or not in single precision.
    """
    found = dataset(group, key)
    offset = found.id.get_offset()
    if offset is None or found.dtype != np.dtype("<f4"):
        kind = "packed or in pieces" if offset is None else found.dtype
        raise DataError(
            f"{key} is {kind} and cannot be memory-mapped. Load it into memory (memory_map=False), or write it "
            "with `eqgen.data.d4rl.save`."
        )
    with _reading(key):
        return np.memmap(group.file.filename, found.dtype, "r", offset, found.shape)
