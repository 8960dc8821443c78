"""D4RL's flat HDF5 files: the layout of its own sets and of those that eqgen makes.

    observations (N, d)   actions (N, a)   rewards (N,)   terminals (N,)   timeouts (N,)
    next_observations (N, d) and infos/* where there are any

An episode ends with a terminal, with a timeout, and where the next observation of a row is not that of the row
after it. Sets written by D4RL's scripts may lack timeouts; then every `step_limit` steps are one (Fu et al., 2020,
"D4RL: Datasets for Deep Data-Driven Reinforcement Learning").

Files of eqgen's carry one attribute more, `eqgen`: JSON with the set's name, how it was made, on what, its own
reference returns, and a SHA-256 of its arrays.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import h5py
import numpy as np

from eqgen.data import hdf5
from eqgen.data.episodes import DataError, Episodes, from_flat
from eqgen.data.reference import D4RL, Scale
from eqgen.files import parse_json, replacing
from eqgen.provenance import provenance


Resets = Literal["ends", "timeouts", "never"]
"""When the simulation was set back: at every end of an episode, at timeouts only, or never."""

_STEP_LIMITS = {
    "maze2d-umaze": 300,
    "maze2d-medium": 600,
    "maze2d-large": 800,
    "antmaze-umaze": 700,
    "antmaze": 1000,
    "kitchen": 280,
    "halfcheetah": 1000,
    "hopper": 1000,
    "walker2d": 1000,
    "ant": 1000,
}


def load(
    path: str | Path,
    *,
    name: str | None = None,
    step_limit: int | None = None,
    resets: Resets | None = None,
    memory_map: bool = False,
) -> Episodes:
    """The episodes of one file.

    **Arguments:**

    - `name`: of the set, such as "maze2d-umaze-v1". It decides the next two and the scale of scores. None: as the
        file says (eqgen's), or as D4RL names its files.
    - `step_limit`: the length of an episode; needed where the file has no timeouts.
    - `resets`: "never" for Maze2D, one stream in which only targets change (the terminals that D4RL's script
        writes there are no ends); "timeouts" for AntMaze, whose episodes go on after the goal; else "ends".
    - `memory_map`: leaves observations and actions on the disk. Only for files that are not packed, as eqgen's.

    **Raises:** `DataError` when the file or its content is not what it should be; it names what, and a remedy.
    """
    with hdf5.opened(path) as file:
        own = attributes(file)
        name = str(name or own.get("name") or set_name(path))
        family = name.removeprefix("eqgen/")
        limits = [limit for prefix, limit in _STEP_LIMITS.items() if family.startswith(prefix)]
        step_limit = step_limit or (limits[0] if limits else None)
        resets = resets or own.get("resets") or _resets(family)

        big = hdf5.mapped if memory_map else hdf5.read
        observations, actions = big(file, "observations"), big(file, "actions")
        rewards = hdf5.read(file, "rewards")
        if rewards.ndim == 2 and rewards.shape[1] == 1:
            rewards = rewards[:, 0]
        following = _NextObservations(file, observations) if "next_observations" in file else None
        terminated, truncated = _ends(file, len(observations), following, step_limit)
        if resets == "never":
            truncated, terminated = truncated | terminated, np.zeros_like(terminated)
        streams = _streams(file, resets, terminated, truncated)
        return from_flat(
            observations,
            actions,
            rewards,
            terminated,
            truncated,
            streams=streams,
            final_observations=following.read(streams[1:] - 1) if following else None,
            name=name,
            scale=_scale(own["scale"]) if own.get("scale") else D4RL.get(name),
        )


def set_name(path: str | Path) -> str:
    """The name of D4RL's set by its file: "maze2d-umaze-v1" of maze2d-umaze-sparse-v1.hdf5."""
    stem = Path(path).stem
    if found := re.fullmatch(r"Ant_maze_(u|big|hardest)-maze_.*_multigoal_(True|False)_sparse.*", stem):
        maze = {"u": "umaze", "big": "medium", "hardest": "large"}[found[1]]
        kind = {"True": "-diverse", "False": "" if maze == "umaze" else "-play"}[found[2]]
        return f"antmaze-{maze}{kind}-{'v2' if stem.endswith('_fixed') else 'v0'}"
    if stem.startswith("kitchen_microwave_kettle_light_slider"):
        return "kitchen-partial-v0"
    if stem.startswith("kitchen_microwave_kettle_bottomburner_light"):
        return "kitchen-mixed-v0"
    return stem.replace("-sparse", "").replace("_", "-")


def _resets(family: str) -> Resets:
    known: dict[str, Resets] = {"maze2d": "never", "antmaze": "timeouts"}
    return known.get(family.split("-")[0], "ends")


def _ends(file, n, following, step_limit):
    """Which rows are terminated and which truncated, by what the file has to say about it."""
    flags = {
        key: hdf5.read_flags(file, key)
        for key in ("terminals", "timeouts")
        if key != "timeouts" or key in file
    }
    for key, values in flags.items():
        if values.shape != (n,):
            raise DataError(
                f"{key} has shape {values.shape} and observations has {n} rows. Was the file cut?"
            )
    terminated = flags["terminals"]
    truncated = flags.get("timeouts", np.zeros(n, bool))
    if following:
        truncated = truncated | (following.breaks & ~terminated)
    if "timeouts" not in flags and not truncated.any():
        truncated = _derived_timeouts(terminated, step_limit)
    return terminated, truncated


def _derived_timeouts(terminated, step_limit):
    """A timeout after every `step_limit` steps since the last end."""
    if step_limit is None:
        raise DataError(
            "there are no timeouts, so nothing says where episodes end. Give the environment's limit: "
            "`load(path, step_limit=1000)`, or the set's name."
        )
    begins = np.concatenate([[0], np.flatnonzero(terminated) + 1])
    lengths = np.diff(np.append(begins, len(terminated)))
    elapsed = np.arange(len(terminated)) - np.repeat(begins, lengths)
    return (elapsed % step_limit == step_limit - 1) & ~terminated


def _streams(file, resets, terminated, truncated):
    """The rows where streams begin and, last, the number of rows."""
    n = len(truncated)
    if "metadata/stream_starts" in file:
        starts = hdf5.dataset(file, "metadata/stream_starts")[()].astype(np.int64)
        if (
            starts.ndim != 1
            or len(starts) == 0
            or starts[0] != 0
            or (np.diff(np.append(starts, n)) < 1).any()
        ):
            raise DataError("metadata/stream_starts do not ascend from 0 to below the number of rows.")
        return np.append(starts, n)
    ends = {"ends": terminated | truncated, "timeouts": truncated, "never": np.zeros(n, bool)}[resets]
    return np.unique(np.concatenate([[0], np.flatnonzero(ends) + 1, [n]]))


class _NextObservations:
    """`next_observations`, read in pieces: only where they differ from the row after are they worth keeping."""

    def __init__(self, file, observations, rows_at_once=2**17):
        self.dataset = hdf5.dataset(file, "next_observations")
        if self.dataset.shape != observations.shape:
            raise DataError(
                f"next_observations has shape {self.dataset.shape} and observations {observations.shape}; they "
                "must agree."
            )
        n = len(observations)
        self.breaks = np.zeros(n, bool)
        """Rows whose next observation is not that of the row after."""
        for begin in range(0, n - 1, rows_at_once):
            end = min(begin + rows_at_once, n - 1)
            near = np.isclose(self.dataset[begin:end], observations[begin + 1 : end + 1], equal_nan=True)
            self.breaks[begin:end] = ~near.all(axis=1)

    def read(self, rows, rows_at_once=2**17):
        """The next observations of a few rows, which must ascend."""
        out = np.empty((len(rows), self.dataset.shape[1]), np.float32)
        for begin in range(0, len(self.dataset), rows_at_once):
            here = (rows >= begin) & (rows < begin + rows_at_once)
            if here.any():
                out[here] = self.dataset[begin : begin + rows_at_once][rows[here] - begin]
        return out


# --- Files of our own ---


def save(
    path: str | Path,
    episodes: Episodes,
    *,
    resets: Resets = "ends",
    settings: Mapping[str, Any] | None = None,
    infos: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a set, whole or not at all, in D4RL's layout and not packed, so that it can be memory-mapped.

    **Arguments:**

    - `resets`: as in `load`, which reads it back.
    - `settings`: what the set was made with; anything JSON can hold.
    - `infos`: further arrays with one row per step.
    """
    arrays = {
        "observations": episodes.observations,
        "actions": episodes.actions,
        "rewards": episodes.rewards,
        "terminals": episodes.terminated,
        "timeouts": episodes.truncated,
        "metadata/stream_starts": np.asarray(episodes.streams)[:-1],
    }
    if episodes.final_observations is not None:
        following = np.concatenate([episodes.observations[1:], episodes.observations[-1:]])
        following[np.asarray(episodes.streams[1:]) - 1] = episodes.final_observations
        arrays["next_observations"] = following
    arrays |= {f"infos/{key}": value for key, value in (infos or {}).items()}
    arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items() if value is not None}
    own = {
        "format": 1,
        "name": episodes.name,
        "resets": resets,
        "scale": dataclasses.asdict(episodes.scale) if episodes.scale else None,
        "settings": dict(settings or {}),
        "provenance": provenance(),
        "sha256": _digest(arrays),
    }
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value)
        file.attrs["eqgen"] = json.dumps(own)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    content = hashlib.sha256()
    for key in sorted(arrays):
        content.update(f"{key} {arrays[key].dtype.str} {arrays[key].shape}".encode())
        content.update(np.ascontiguousarray(arrays[key]).data.cast("B"))
    return content.hexdigest()


def attributes(file: h5py.File) -> dict[str, Any]:
    """What the attribute `eqgen` says; empty for files of others.

    **Raises:** `DataError` when it is not JSON of the kind that `save` writes.
    """
    if "eqgen" not in file.attrs:
        return {}
    remedy = "Remove it (`del file.attrs['eqgen']`) to read the file as anyone's, or make the set anew."
    try:
        own = parse_json(cast(str, file.attrs["eqgen"]))
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"the attribute eqgen is not JSON: {error}. {remedy}") from error
    if not isinstance(own, dict) or own.get("format") != 1:
        raise DataError(f"the attribute eqgen is not of format 1. {remedy}")
    kinds = {"name": str, "sha256": str, "settings": dict, "provenance": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(own.get(key), kind)]
    wrong += [] if own.get("resets") in ("ends", "timeouts", "never") else ["resets"]
    if wrong:
        raise DataError(f"the attribute eqgen has no valid {', '.join(wrong)}. {remedy}")
    return own


def _scale(content):
    try:
        low, high = float(content["low"]), float(content["high"])
        return Scale(str(content["name"]), low, high, "eqgen", str(content["source"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the scale in the attribute eqgen cannot be used: {error}") from error


def provenance_of(path: str | Path) -> dict[str, Any]:
    """What eqgen noted about a file it made: settings, versions, hardware; empty for files of others.

    **Raises:** `DataError` when the arrays are not those that it wrote.
    """
    with hdf5.opened(path) as file:
        own = attributes(file)
        if own:
            arrays = {key: hdf5.dataset(file, key)[()] for key in hdf5.dataset_names(file)}
            if _digest(arrays) != own["sha256"]:
                raise DataError(
                    "its arrays are not those that were written: the checksum differs. Make it anew."
                )
        return own
