"""Run directories: everything needed to resume, evaluate and plot a run, in plain files.

    settings.json          what was asked for: algorithm, environment, seeds, hyperparameters
    provenance.json        one entry per session: versions, hardware, commit
    metrics.jsonl          one flat JSON object per seed and logging step
    checkpoints/           step_0000005000.eqx, ... the last few
    tensorboard/           event files, if asked for

Any number of processes may read a run; one may write to it. What a crash leaves is always a run that can be
resumed: files are replaced whole, and `rewind` cuts the log back to the checkpoint.
"""

import fcntl
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from eqgen import checkpoint
from eqgen.checkpoint import CheckpointError, DamagedCheckpointError
from eqgen.files import replacing, write_json
from eqgen.provenance import provenance


Tree = TypeVar("Tree")
Records = Iterable[dict[str, Any]]


class RunError(Exception):
    """A run directory cannot be used as asked; the message says why and what to do."""


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
        if (path / "settings.json").exists():
            raise RunError(
                f"{path} already holds a run. Go on with `eqgen resume {path}`, or choose another folder."
            )
        if path.exists() and (not path.is_dir() or any(child.name != ".lock" for child in path.iterdir())):
            raise RunError(f"{path} exists and is not empty. Choose another folder.")
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, settings, keep)
        run._begin_writing()
        write_json(path / "settings.json", settings)
        return run

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False, keep: int = 2) -> "Run":
        """An existing run, for reading or, one process at a time, for writing."""
        path = Path(path)
        try:
            settings = json.loads((path / "settings.json").read_text())
        except OSError:
            raise RunError(f"{path} is not a run: it has no settings.json.") from None
        except ValueError as error:
            raise RunError(f"{path / 'settings.json'} is not valid JSON: {error}.") from None
        run = cls(path, settings, keep)
        if write:
            run._begin_writing()
        return run

    def _begin_writing(self):
        lock = open(self.path / ".lock", "a+")
        try:
            # The system drops the lock with the process, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise RunError(
                f"Another process (id {owner}) is writing to {self.path}. Wait for it or stop it."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        self._log = open(self.path / "metrics.jsonl", "a")
        sessions = self.path / "provenance.json"
        earlier = json.loads(sessions.read_text()) if sessions.exists() else []
        write_json(sessions, [*earlier, provenance()])

    def close(self) -> None:
        """Ends writing and lets others write."""
        for file in (self._log, self._lock):
            if file is not None:
                file.close()
        self._log = self._lock = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- Metrics ---

    def log(self, records: Records) -> None:
        """Appends records: flat dicts of what JSON can hold (no NaN), with `seed` and the run's clock."""
        self._log.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
        self._log.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """All records so far. A last line that a crash left unfinished is not there."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}.") from None

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The metric `name` over time.

        **Returns:** environment steps or updates, of shape (times,), and values, of shape (seeds, times), at the
        steps where every seed has one.
        """
        seeds: dict[int, dict[int, float]] = {}
        for record in self.metrics():
            values = seeds.setdefault(record["seed"], {})
            if record.get(name) is not None:
                values[record[self.clock]] = record[name]
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
        self._log.close()
        with replacing(self.path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._log = open(self.path / "metrics.jsonl", "a")
        for path in self.checkpoints():
            if _step(path) > step:
                path.rename(path.with_suffix(".eqx.damaged"))

    # --- Checkpoints ---

    def checkpoints(self) -> list[Path]:
        """The checkpoint files, newest first."""
        return sorted((self.path / "checkpoints").glob("step_*.eqx"), key=_step, reverse=True)

    def save_checkpoint(self, tree: Any, step: int, **metadata: Any) -> Path:
        """Saves `tree` and drops all but the last `keep` checkpoints; the log reaches the disk first."""
        os.fsync(self._log.fileno())
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
            except DamagedCheckpointError as error:
                errors.append(str(error))
                continue
            if errors:
                warnings.warn(f"{' '.join(errors)} Using the previous one, {path.name}.", stacklevel=2)
            return tree, metadata
        raise CheckpointError(" ".join(errors) or f"{self.path} has no checkpoint yet.")


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
