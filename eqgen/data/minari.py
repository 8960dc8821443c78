"""Minari's datasets: a folder with metadata.json and one group (HDF5) or table (Arrow) per episode.

    <root>/data/metadata.json          data_format, total_episodes, total_steps, spaces as JSON
    <root>/data/main_data.hdf5         episode_0/{observations (T + 1), actions, rewards, terminations, truncations}
    <root>/data/0/*.arrow, ...         the same as tables of T + 1 rows, the last without an action

(Minari 0.5, github.com/Farama-Foundation/Minari.) Observations that are dictionaries are laid side by side.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from eqgen.data import hdf5
from eqgen.data.episodes import DataError, Episodes, from_flat
from eqgen.data.reference import Scale
from eqgen.files import is_number, parse_json


_FIELDS = ("actions", "rewards", "terminations", "truncations")


def load(path: str | Path, *, keys: Sequence[str] | None = None) -> Episodes:
    """The episodes of one set; each is a stream, and the observation after its last step is known.

    **Arguments:**

    - `path`: the folder of the set, such as ~/.minari/datasets/D4RL/pointmaze/umaze-v2.
    - `keys`: which entries of observations that are dictionaries, in this order; a path with / for nested ones.
        None: "achieved_goal", if there is one, then "observation", as planners for AntMaze take them.

    **Raises:** `DataError` when the set is not what its metadata say; it names the episode.
    """
    folder = Path(path) / "data"
    about = _metadata(folder / "metadata.json")
    if about["data_format"] == "hdf5":
        with hdf5.opened(folder / "main_data.hdf5") as file:
            return _assemble(Path(path), about, _hdf5_episodes(file, about["total_episodes"], keys))
    return _assemble(Path(path), about, _arrow_episodes(folder, about["total_episodes"], keys))


def _metadata(path: Path) -> dict[str, Any]:
    try:
        about = parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Is this the folder of a Minari dataset?") from error
    except ValueError as error:  # also bytes that are no text
        raise DataError(f"{path} is not JSON: {error}. Copy the dataset again.") from error
    if not isinstance(about, dict):
        raise DataError(f"{path} holds no object but {type(about).__name__}. Copy the dataset again.")
    if about.get("data_format") not in ("hdf5", "arrow"):
        raise DataError(
            f"{path}: data_format is {about.get('data_format')!r}; eqgen reads hdf5 and arrow. Convert "
            "the set with Minari."
        )
    for key in ("total_episodes", "total_steps"):
        if type(about.get(key)) is not int or not 1 <= about[key] < 2**63:
            raise DataError(f"{path}: {key} is {about.get(key)!r}; a positive number is needed.")
    return about


def _assemble(path, about, episodes: Iterator[dict[str, np.ndarray]]) -> Episodes:
    """One flat array of each field, filled episode by episode: no more than twice an episode in memory beside."""
    n, arrays, finals, ends, row = about["total_steps"], {}, [], [], 0
    try:
        for number, episode in enumerate(episodes):
            observations, steps = episode.pop("observations"), len(episode["rewards"])
            _check_episode(number, observations, episode)
            fields = {"observations": observations[:-1], **episode}
            for key, value in fields.items():
                if key not in arrays:
                    # As many rows as there are, however many the metadata promise.
                    arrays[key] = np.empty((min(n, 2**16), *value.shape[1:]), value.dtype)
                if value.shape[1:] != arrays[key].shape[1:]:
                    raise DataError(
                        f"episode {number} has {key} of shape {value.shape[1:]}, earlier ones "
                        f"{arrays[key].shape[1:]}."
                    )
                arrays[key] = _with_room(arrays[key], row + steps, n)
                arrays[key][row : row + steps] = value
            finals.append(observations[-1])
            row += steps
            ends.append(row)
        if row != n:
            raise DataError(
                f"the episodes have {row} steps and metadata.json says {n}. Copy the dataset again."
            )
        truncated = arrays["truncations"][:row]
        return from_flat(
            arrays["observations"][:row],
            arrays["actions"][:row],
            arrays["rewards"][:row],
            arrays["terminations"][:row],
            truncated,
            streams=np.array([0, *ends]),
            final_observations=np.stack(finals),
            name=str(about.get("dataset_id") or path.name),
            scale=_scale(about),
        )
    except DataError as error:
        raise DataError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _with_room(array, rows, most):
    if rows <= len(array):
        return array
    grown = np.empty((max(rows, min(most, 2 * len(array))), *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown


def _check_episode(number, observations, episode):
    steps = len(episode["rewards"])
    if steps == 0:
        raise DataError(f"episode {number} has no steps. Drop it.")
    if len(observations) != steps + 1:
        raise DataError(
            f"episode {number} has {len(observations)} observations and {steps} rewards; one observation more than "
            "rewards is needed: was it cut?"
        )
    for key in ("actions", "terminations", "truncations"):
        if len(episode[key]) != steps:
            raise DataError(f"episode {number} has {len(episode[key])} {key} and {steps} rewards.")
    if (episode["terminations"] | episode["truncations"])[:-1].any():
        row = np.flatnonzero(episode["terminations"] | episode["truncations"])[0]
        raise DataError(
            f"episode {number} ends at step {row} and goes on to step {steps - 1}. Split it there."
        )


def _scale(about) -> Scale | None:
    low, high = about.get("ref_min_score"), about.get("ref_max_score")
    if not (is_number(low) and is_number(high) and low < high):
        return None
    return Scale(str(about.get("dataset_id")), float(low), float(high), "D4RL", "the set's metadata.json")


def _side_by_side(found: dict[str, np.ndarray], keys, number) -> np.ndarray:
    """A dictionary of (T + 1, ...) observations as one array."""
    if keys is None:
        keys = [key for key in ("achieved_goal", "observation") if key in found]
    missing = [key for key in keys if key not in found]
    if missing or not keys:
        raise DataError(
            f"the observations of episode {number} are a dictionary of {', '.join(sorted(found))}"
            f"{' without ' + ', '.join(missing) if missing else ''}. Choose: `load(path, keys=[...])`."
        )
    return np.concatenate([_flat(found[key]) for key in keys], axis=1)


def _flat(array):
    if array.size == 0:
        raise DataError(f"an array of shape {array.shape} holds nothing. Drop the episode.")
    return array.reshape(len(array), -1)


# --- HDF5 ---


def _hdf5_episodes(file: h5py.File, count: int, keys) -> Iterator[dict[str, np.ndarray]]:
    present = sorted(int(key[8:]) for key in hdf5.names(file) if re.fullmatch(r"episode_\d{1,9}", key))
    if len(present) != count or present != list(range(count)):
        raise DataError(
            f"it has {len(present)} episodes and metadata.json says {count}. Copy the dataset again."
        )
    for number in range(count):
        group = hdf5.child(file, f"episode_{number}")
        if not isinstance(group, h5py.Group):
            raise DataError(f"episode_{number} is no group.")
        try:
            node = hdf5.child(group, "observations")
            if isinstance(node, h5py.Group):
                wanted = [key for key in hdf5.dataset_names(node) if keys is None or key in keys]
                observations = _side_by_side({key: hdf5.read(node, key) for key in wanted}, keys, number)
            else:
                observations = _flat(hdf5.read(group, "observations"))
            yield {
                "observations": observations,
                "actions": _flat(hdf5.read(group, "actions")),
                "rewards": hdf5.read(group, "rewards").reshape(-1),
                "terminations": hdf5.read_flags(group, "terminations"),
                "truncations": hdf5.read_flags(group, "truncations"),
            }
        except DataError as error:
            raise DataError(f"episode_{number}: {error}") from error


# --- Arrow ---

# What pyarrow and NumPy raise for files that are not what they should be; its own errors are kinds of these.
_DAMAGE = (OSError, RuntimeError, LookupError, TypeError, ValueError, ArithmeticError, MemoryError)
_DAMAGE += (NotImplementedError,)


def _arrow_episodes(folder: Path, count: int, keys) -> Iterator[dict[str, np.ndarray]]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError:
        raise DataError(
            f"{folder.parent} is stored as Arrow tables, which need pyarrow: pip install 'pyarrow>=15'. Or "
            "convert the set to HDF5 with Minari."
        ) from None
    if int(pyarrow.__version__.split(".")[0]) < 15:
        raise DataError(
            f"pyarrow {pyarrow.__version__} runs code that a file may hold (CVE-2023-47248). Remedy: pip install "
            "'pyarrow>=15'."
        )
    for number in range(count):
        files = sorted((folder / str(number)).glob("*.arrow"))
        if len(files) != 1:
            raise DataError(f"{folder / str(number)} holds {len(files)} Arrow files; one is needed.")
        try:
            with pyarrow.memory_map(str(files[0])) as source:
                table = pyarrow.ipc.open_file(source).read_all().combine_chunks()
                table.validate(full=True)
                columns: dict[str, Any] = {
                    key: _column(table.column(key)) for key in ("observations", *_FIELDS)
                }
        except DataError as error:
            raise DataError(f"{files[0]}: {error}") from error
        except _DAMAGE as error:
            raise DataError(f"{files[0]} is damaged: {error}. Copy the dataset again.") from error
        if nested := [key for key in _FIELDS if isinstance(columns[key], dict)]:
            raise DataError(f"{files[0]}: {nested[0]} is a column of structures, not of numbers.")
        if isinstance(columns["observations"], dict):
            columns["observations"] = _side_by_side(columns["observations"], keys, number)
        # The last row holds the last observation; the rest of it is filling.
        steps = {key: columns[key][:-1] for key in _FIELDS}
        yield {
            "observations": columns["observations"],
            "actions": _flat(steps["actions"]),
            "rewards": steps["rewards"].reshape(-1),
            "terminations": steps["terminations"].reshape(-1) > 0,
            "truncations": steps["truncations"].reshape(-1) > 0,
        }


def _column(column) -> np.ndarray | dict[str, np.ndarray]:
    """A column as (rows, numbers); one of structures as a dictionary of its paths."""
    import pyarrow  # pyright: ignore[reportMissingImports]  # an extra

    array = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
    if pyarrow.types.is_struct(array.type):
        out = {}
        for field, values in zip(array.type, array.flatten()):
            inner = _column(values)
            nested = inner if isinstance(inner, dict) else {"": inner}
            out |= {f"{field.name}/{key}".rstrip("/"): value for key, value in nested.items()}
        return out
    vectors = pyarrow.types.is_fixed_size_list(array.type)
    values = (array.flatten() if vectors else array).to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "fiub":
        raise DataError(
            f"a column holds {array.type}, not vectors of one length. Convert the set to HDF5 with Minari."
        )
    return values.astype(np.float32).reshape(-1, array.type.list_size if vectors else 1)
