"""OGBench's npz files: observations, actions, terminals, qpos, qvel, and no rewards.

A row with terminals = 1 holds the last state of an episode, and an action that was not taken: it is dropped here
and becomes the final observation (Park et al., 2024, "OGBench: Benchmarking Offline Goal-Conditioned RL").
"""

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import cast

import numpy as np

from eqgen.data.episodes import DataError, Episodes, from_flat


_DAMAGE = (
    *(ValueError, EOFError, SyntaxError, LookupError, MemoryError, NotImplementedError, RuntimeError),
    *(TypeError, ArithmeticError, AttributeError, UnicodeError, lzma.LZMAError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)
"""What NumPy and zipfile raise for files that are not what they should be."""


def load(
    path: str | Path, *, goal: tuple[float, float] | None = None, tolerance: float | None = None
) -> Episodes:
    """The episodes of one file; each is a stream and truncated at its end.

    **Arguments:**

    - `goal`, `tolerance`: of a single task in a maze. Then as in OGBench's `relabel_dataset` the reward is 0 where
        the position (the first two of `qpos`) is within `tolerance` of `goal`, and the step terminated, and -1
        elsewhere. None: `rewards` is None.

    **Raises:** `DataError` when the file or its content is not what it should be.
    """
    path = Path(path)
    if (goal is None) != (tolerance is None):
        raise ValueError("goal and tolerance belong together; give both or neither.")
    try:
        arrays = _read(path, ("observations", "actions", "terminals", *(["qpos"] if goal else [])))
        last = _last_states(arrays["terminals"])
        if len(last) != len(arrays["observations"]):
            raise DataError(
                f"terminals has {len(last)} rows and observations has {len(arrays['observations'])}. "
                "Was the file cut?"
            )
        for key in arrays:
            if arrays[key].shape[:1] != arrays["observations"].shape[:1]:
                raise DataError(f"{key} has shape {arrays[key].shape} for {len(last)} observations.")
        if goal is not None and (arrays["qpos"].ndim != 2 or arrays["qpos"].shape[1] < 2):
            raise DataError(
                f"qpos has shape {arrays['qpos'].shape}; it must begin with a position in the plane."
            )
        final = arrays["observations"][last]
        kept = {key: arrays.pop(key)[~last] for key in list(arrays) if key != "terminals"}
        ends = np.cumsum(~last)[last]  # rows kept up to each last state
        if len(ends) > 1 and (np.diff(ends) == 0).any() or ends[0] == 0:
            raise DataError("an episode has one state and so no step. Drop it.")
        truncated = np.zeros(len(kept["observations"]), bool)
        truncated[ends - 1] = True
        rewards, terminated = None, np.zeros(len(truncated), bool)
        if goal is not None:
            distance = np.linalg.norm(kept["qpos"][:, :2] - np.asarray(goal, np.float32), axis=1)
            rewards = (distance <= tolerance).astype(np.float32) - 1
            terminated = distance <= tolerance
        return from_flat(
            kept["observations"],
            kept["actions"],
            rewards,
            terminated,
            truncated,
            streams=np.array([0, *ends]),
            final_observations=final,
            name=path.stem,
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _last_states(terminals):
    values = terminals.reshape(-1)
    if not np.isin(values, (0, 1)).all():
        raise DataError(f"terminals holds {values[~np.isin(values, (0, 1))][0]}; flags are 0 or 1.")
    last = values.astype(bool)
    if not last.size or not last[-1]:
        raise DataError("the last row is not the last state of an episode. Was the file cut?")
    return last


def _check_member(archive: zipfile.ZipFile, name: str) -> None:
    """Before an array is read: that its header promises what is there, and that it is no bomb."""
    info = archive.getinfo(name)
    if info.file_size > 2**28 + 100 * info.compress_size:
        raise DataError(
            f"{name} would unpack from {info.compress_size} to {info.file_size} bytes, which data never do. If "
            "they are meant, store them unpacked."
        )
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(member)
        promised, held = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
        if not dtype.hasobject and promised != held:
            raise DataError(f"{name} claims {promised} bytes and holds {held}. Copy it again.")


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Some arrays of an npz file as float32; nothing is unpickled."""
    try:
        content = np.load(path, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise DataError("it is one array and no npz file.")
        with content as file:
            arrays = {}
            for key in keys:
                if key not in file:
                    raise DataError(f"there is no {key}. It has: {', '.join(file.files) or 'nothing'}.")
                _check_member(cast(zipfile.ZipFile, file.zip), f"{key}.npy")
                array = file[key]
                if array.dtype.kind not in "fiub" or array.ndim == 0:
                    raise DataError(f"{key} holds {array.dtype} of shape {array.shape}, not rows of numbers.")
                arrays[key] = np.asarray(array, np.float32)
            return arrays
    except DataError:
        raise
    except OSError as error:
        if error.strerror:
            raise DataError(f"{error.strerror}.") from error
        raise DataError(f"it is no npz file: {error}") from error
    except _DAMAGE as error:
        unsafe = "pickle" in str(error).lower()
        hint = (
            "Python objects are never loaded: they can run code. Store plain arrays."
            if unsafe
            else "Copy it again."
        )
        raise DataError(f"it cannot be read: {error} {hint}") from error
