"""Run directories: everything needed to resume, evaluate and plot a run, in plain files.

    settings.json          what was asked for: algorithm, environment, seeds, hyperparameters
    provenance.json        one entry per session: versions, hardware, commit
    metrics.jsonl          one flat JSON object per seed and logging step
    checkpoints/           step_0000005000.eqx, ... the last few
    tensorboard/           event files, if asked for

Any number of processes may read a run; one may write to it. What a crash leaves is always a run that can be
resumed: files are replaced whole, `rewind` cuts the log back to the checkpoint, and who begins to write tidies up
the half-written files of a killed writer. What is read may be damaged or anyone's: then there is a `RunError` with
the file's name, and no other exception.
"""

import fcntl
import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from eqgen import checkpoint
from eqgen.checkpoint import CheckpointError, DamagedCheckpointError
from eqgen.files import is_number, leftovers, parse_json, replacing, write_json
from eqgen.provenance import provenance


Tree = TypeVar("Tree")
Records = Iterable[dict[str, Any]]


CLOCKS = ("env_step", "update")


class RunError(Exception):
    """A run directory cannot be used as asked; the message says why and what to do."""


class RunIsBusyError(RunError):
    """Another process is writing to the run."""


class Run:
    """One run directory. Get one from `Run.create` or `Run.open`; close it, or use it in a `with` block."""

    def __init__(self, path: Path, settings: dict[str, Any], keep: int):
        self.path, self.settings, self.keep = path, settings, keep
        self.clock: str = settings.get("clock", "env_step")
        """What counts a run's steps in records and checkpoints: "env_step" online, "update" offline."""
        self._lock: Any = None  # files, while it is open for writing
        self._log: Any = None

    @classmethod
    def create(cls, path: str | Path, settings: dict[str, Any], *, keep: int = 2) -> "Run":
        """A new run, open for writing.

        **Arguments:**

        - `settings`: what JSON can hold; written once and never changed.
        - `keep`: how many checkpoints are kept, so that a damaged one leaves another.

        **Raises:** `RunError` when the folder already holds something.
        """
        path = Path(path)
        taken = f"{path} already holds a run. Go on with `eqgen resume {path}`, or choose another folder."
        if (path / "settings.json").exists():
            raise RunError(taken)
        # What a process leaves that was killed while it made a run is no run yet. Another may be making one now.
        found = {path} if path.exists() and not path.is_dir() else set(path.glob("*"))
        if found - {path / ".lock", *leftovers(path / "settings.json")}:
            made = (path / "settings.json").exists()
            raise RunError(taken if made else f"{path} exists and is not empty. Choose another folder.")
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, settings, keep)
        run._take_lock()
        try:
            if (path / "settings.json").exists():  # of a process that was faster
                raise RunError(taken)
            write_json(path / "settings.json", settings)
            run._begin_writing()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False, keep: int = 2) -> "Run":
        """An existing run, for reading or, one process at a time, for writing."""
        path = Path(path)
        try:
            settings = parse_json((path / "settings.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"{path} is not a run: it has no settings.json.") from None
        except OSError as error:
            raise RunError(f"{path / 'settings.json'} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise RunError(f"{path / 'settings.json'} is not valid JSON: {error}.") from None
        if not isinstance(settings, dict):
            raise RunError(f"{path / 'settings.json'} holds no object but a {type(settings).__name__}.")
        if (clock := settings.get("clock", "env_step")) not in CLOCKS:
            raise RunError(f"{path / 'settings.json'}: clock is {clock!r}, not one of {', '.join(CLOCKS)}.")
        run = cls(path, settings, keep)
        if write:
            run._take_lock()
            try:
                run._begin_writing()
            except BaseException:
                run.close()
                raise
        return run

    @staticmethod
    def is_busy(path: str | Path) -> bool:
        """Whether some process, this one included, is writing to the run at `path`."""
        try:
            with open(Path(path, ".lock")) as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False

    def _take_lock(self):
        lock = open(self.path / ".lock", "a+")
        try:
            # The system drops the lock with the process, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise RunIsBusyError(
                f"Another process (id {owner}) is writing to {self.path}. Wait for it or stop it."
            ) from None
        except BaseException:
            lock.close()
            raise
        self._lock = lock
        lock.truncate(0)
        try:
            os.write(lock.fileno(), str(os.getpid()).encode())
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, str(self.path / ".lock")) from error

    def _begin_writing(self):
        """With the lock taken: tidies up after a killed writer, opens the log, notes the session."""
        names = ("settings.json", "provenance.json", "metrics.jsonl", "checkpoints/step_*.eqx")
        for name in names:
            for file in leftovers(self.path / name):
                file.unlink(missing_ok=True)
        sessions = self.path / "provenance.json"
        try:
            earlier = self.sessions()
        except RunError as error:
            aside = sessions.with_suffix(".json.damaged")
            sessions.replace(aside)
            warnings.warn(f"{error} It is kept as {aside.name}, and a new one begun.", stacklevel=3)
            earlier = []
        write_json(sessions, [*earlier, provenance()])
        self._open_log()

    def _open_log(self):
        # Without a buffer: what a full disk refuses must not be tried again when the file is closed.
        self._log = open(self.path / "metrics.jsonl", "ab", buffering=0)

    def close(self) -> None:
        """Ends writing and lets others write."""
        log, lock, self._log, self._lock = self._log, self._lock, None, None
        try:
            if log is not None:
                log.close()
        finally:
            if lock is not None:
                lock.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def sessions(self) -> list[dict[str, Any]]:
        """The provenance of every session that wrote to the run, oldest first; none if the file is not there.

        **Raises:** `RunError` when it is damaged.
        """
        path = self.path / "provenance.json"
        try:
            found = parse_json(path.read_bytes())
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}.") from None
        if not isinstance(found, list) or not all(isinstance(session, dict) for session in found):
            raise RunError(f"{path} is damaged: it holds no list of sessions.")
        return found

    # --- Metrics ---

    def log(self, records: Records) -> None:
        """Appends records: flat dicts of what JSON can hold (no NaN), with `seed` and the run's clock.

        **Raises:** `RunError` when they cannot be written; what was there before is as it was.
        """
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
        log, begin = self._writing(), os.fstat(self._writing().fileno()).st_size
        try:
            written = 0
            while written < len(lines):
                written += log.write(lines[written:])
        except OSError as error:
            os.ftruncate(log.fileno(), begin)
            raise RunError(
                f"Could not write {self.path / 'metrics.jsonl'}: {error.strerror}. What was there before is "
                f"untouched. Free some space, then go on with: eqgen resume {self.path}"
            ) from error

    def _writing(self):
        if self._log is None:
            raise RunError(
                f"{self.path} is open for reading only. Open it with `Run.open(path, write=True)`."
            )
        return self._log

    def metrics(self) -> list[dict[str, Any]]:
        """All records so far. A last line that a crash left unfinished is not there.

        **Raises:** `RunError` when a line is no record.
        """
        path = self.path / "metrics.jsonl"
        try:
            lines = path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = parse_json(line)
            except ValueError as error:
                raise RunError(
                    f"{path} is damaged in line {number}: {error}. Mend or remove that line."
                ) from None
            counted = isinstance(record, dict) and all(
                type(record.get(key)) is int and 0 <= record[key] < 2**63 for key in ("seed", self.clock)
            )
            if not counted:
                raise RunError(
                    f"{path} is damaged in line {number}: a record has whole numbers for seed and {self.clock}. "
                    "Mend or remove that line."
                )
            records.append(record)
        return records

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The metric `name` over time.

        **Returns:** environment steps or updates, of shape (times,), and values, of shape (seeds, times), at the
        steps where every seed has one.
        """
        seeds: dict[int, dict[int, float]] = {}
        for record in self.metrics():
            values = seeds.setdefault(record["seed"], {})
            if (value := record.get(name)) is not None:
                if not is_number(value):
                    raise RunError(f"{name!r} in {self.path} is {value!r}, no number, and has no curve.")
                values[record[self.clock]] = value
        steps = sorted(set.intersection(*map(set, seeds.values()))) if seeds else []
        if not steps:
            known = sorted({key for record in self.metrics() for key in record})
            raise RunError(
                f"{self.path} has no values of {name!r} yet. It has: {', '.join(known) or 'nothing'}."
            )
        return np.array(steps), np.array([[values[step] for step in steps] for values in seeds.values()])

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`, so that going on from there writes the log of one piece.

        Checkpoints of later steps, which can only be damaged ones, are set aside as `*.damaged`.
        """
        kept = [record for record in self.metrics() if record[self.clock] <= step]
        self._writing().close()
        with replacing(self.path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._open_log()
        for path in self.checkpoints():
            if _step(path) > step:
                path.rename(path.with_suffix(".eqx.damaged"))

    # --- Checkpoints ---

    def checkpoints(self) -> list[Path]:
        """The checkpoint files, newest first."""
        files = (self.path / "checkpoints").glob("step_*.eqx")
        return sorted((file for file in files if _STEP.fullmatch(file.name)), key=_step, reverse=True)

    def save_checkpoint(self, tree: Any, step: int, **metadata: Any) -> Path:
        """Saves `tree` and drops all but the last `keep` checkpoints; the log reaches the disk first."""
        os.fsync(self._writing().fileno())
        path = self.path / "checkpoints" / f"step_{step:010d}.eqx"
        checkpoint.save(path, tree, {self.clock: step} | metadata)
        for old in self.checkpoints()[self.keep :]:
            old.unlink()
        return path

    def restore(self, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """The newest checkpoint that is whole, as `checkpoint.load` returns it; warns about damaged ones.

        **Raises:** `CheckpointError` when there is none, or when it does not fit `like`.
        """
        errors = []
        for path in self.checkpoints():
            try:
                tree, metadata = checkpoint.load(path, like)
                clock, wall_time = metadata.get(self.clock), metadata.get("wall_time", 0.0)
                if type(clock) is not int or clock != _step(path) or not is_number(wall_time):
                    raise DamagedCheckpointError(f"The checkpoint {path} is not of the step in its name.")
            except DamagedCheckpointError as error:
                errors.append(str(error))
                continue
            if errors:
                warnings.warn(f"{' '.join(errors)} Using the previous one, {path.name}.", stacklevel=2)
            return tree, metadata
        raise CheckpointError(" ".join(errors) or f"{self.path} has no checkpoint yet.")


_STEP = re.compile(r"step_(\d{1,18})\.eqx", re.ASCII)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


class TensorBoard:
    """Writes records as TensorBoard scalars, one run per seed, beside the log.

    **Arguments:**

    - `path`: the run directory; event files go to `tensorboard/seed_0`, ...
    - `step`: where the run stands; what earlier sessions wrote beyond it is hidden.
    """

    def __init__(self, path: str | Path, step: int = 0, clock: str = "env_step"):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise RunError("TensorBoard files need tensorboardX: pip install 'eqgen[log]'.") from None
        self._open = lambda seed: SummaryWriter(
            str(Path(path, "tensorboard", f"seed_{seed}")), purge_step=step + 1
        )
        self._writers, self._clock = {}, clock

    def log(self, records: Records) -> None:
        """Writes every number of every record."""
        for record in records:
            if record["seed"] not in self._writers:
                self._writers[record["seed"]] = self._open(record["seed"])
            writer = self._writers[record["seed"]]
            for name, value in record.items():
                if isinstance(value, int | float) and name not in ("seed", self._clock):
                    writer.add_scalar(name, value, record[self._clock])
            writer.flush()

    def close(self) -> None:
        """Closes the event files."""
        for writer in self._writers.values():
            writer.close()
