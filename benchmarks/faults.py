"""What becomes of runs whose process is killed, and of readers that are given broken files; tested by doing it.

    python benchmarks/faults.py                 all of it, writes benchmarks/results/faults.json (an hour)
    python benchmarks/faults.py kills           that part alone; the others are kept as they were
                                                (also: interrupts, files)
    python benchmarks/faults.py kills sweep     one kind of run, or one reader, alone

**Kills.** Each kind of run in `KINDS` is started by the command that a user would give, with checkpoints every few
updates, and its process gets SIGKILL: at a random moment of its start or of training, or while a file is being
written, which is seen by its temporary name. It is gone on with by the command that a user would give, and killed
again, some times; at last it may end. Then its log (but for wall times) and every array of its last checkpoint must
be those of a run that was never killed, to the last bit. What is not so is *lost*. Workers of a sweep are killed
with it, or left behind.

**Interrupts.** The same with SIGINT and SIGTERM; the exit codes are counted.

**Files.** `fuzzing.py`, at length.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from eqgen.provenance import provenance
from fuzzing import READERS, fuzz
from measure import RESULTS, write


KILLS = 10
"""At least, of each kind."""
INTERRUPTS = 4
FILES = 700
"""Of each reader."""
MOMENTS = ("starting", "training", "training", "writing", "writing")
PATIENCE = 600
"""Seconds after which a process counts as hung."""


class Kind(NamedTuple):
    """A kind of run: the command that begins one or goes on with it, and the run directories that it leaves."""

    command: Callable[[Path, Path], list[str]]
    """Of the folder of the run and of that with what all share."""
    runs: Callable[[Path], list[Path]]


def eqgen(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "eqgen", *map(str, arguments)]


def _begun_or(out: Path, begin: list[str]) -> list[str]:
    """What a user does: `eqgen resume`, once there is a run."""
    return eqgen("resume", out) if (out / "settings.json").exists() else begin


_LOOP = (
    "--settings.total-steps 800 --settings.warmup-steps 100 --settings.batch-size 16 --settings.log-every 40"
)
_LOOP += " --settings.eval-every 400 --settings.eval-episodes 2 --settings.checkpoint-every 40"


def _agent(env: str, *more: str) -> Callable[[Path, Path], list[str]]:
    def command(out, shared):
        flags = f"train sac --env {env} --preset smoke --agent.hidden 8 8 --seeds 2 {_LOOP}".split()
        return _begun_or(out, eqgen(*flags, *more, "--out", out))

    return command


def _planner(out: Path, shared: Path) -> list[str]:
    flags = "--horizon 4 --preset smoke --learner.total-updates 800 --settings.log-every 20".split()
    flags += ["--settings.checkpoint-every", "20", "--data", shared / "maze2d-umaze.hdf5"]
    return _begun_or(out, eqgen("train", "diffusion-planner", *flags, "--out", out))


def _adaptive(out: Path, shared: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "adaptive", str(out)]


SWEEP = """
preset = "smoke"
algorithms = ["sac"]
envs = ["probe/both"]
seeds = [0, 1]
seeds_together = false
[settings]
total_steps = 800
warmup_steps = 100
batch_size = 8
log_every = 40
eval_every = 400
checkpoint_every = 40
[agent]
hidden = [8]
"""


def _sweep(out: Path, shared: Path) -> list[str]:
    (shared / "sweep.toml").write_text(SWEEP)
    return eqgen("sweep", shared / "sweep.toml", "--out", out, "--workers", 2)


KINDS = {
    "online, JAX": Kind(_agent("gymnax/Pendulum-v1"), lambda out: [out]),
    "online, host": Kind(_agent("mujoco/InvertedPendulum-v5", "--settings.num-envs", "2"), lambda out: [out]),
    "offline": Kind(_planner, lambda out: [out]),
    "adaptive timesteps": Kind(_adaptive, lambda out: [out]),
    "sweep": Kind(_sweep, lambda out: sorted((out / "runs").iterdir())),
}


def adaptive(out: Path) -> None:
    """Trains a diffusion model with the adaptive sampler into the run directory `out`, or goes on there.

    Models alone have no command; this is what one does from Python.
    """
    import jax.random as jr

    from eqgen.algorithms.diffusion import Diffusion
    from eqgen.data.examples import ExampleData, Examples
    from eqgen.data.points import ring
    from eqgen.hyperparameters import to_json
    from eqgen.offline import OfflineSettings, init_offline, train_offline
    from eqgen.runs import Run
    from eqgen.sessions import drive
    from eqgen.timesteps.adaptive import AdaptiveTimesteps
    from eqgen.timesteps.times import DiffusionChain

    sampler = AdaptiveTimesteps(DiffusionChain(10), look_every=4, queue_length=4, min_rows=2)
    learner = Diffusion(timesteps=sampler, hidden=(8,), total_updates=1600)
    data, seeds = ExampleData(ring(256, key=jr.key(0))), (0, 1)
    settings = OfflineSettings(batch_size=16, log_every=40, checkpoint_every=40)
    content = {"algorithm": "Diffusion", "clock": "update", "seeds": list(seeds), "learner": to_json(learner)}
    made = (out / "settings.json").exists()
    with Run.open(out, write=True) if made else Run.create(out, content) as run:
        example = Examples(data.examples().x[0])
        state, metadata = init_offline(lambda key: learner.init(example, key=key), seeds=seeds), {}
        if run.checkpoints():
            state, metadata = run.restore(state)
        run.rewind(metadata.get("update", -1))
        drive(
            run,
            train_offline(learner, data, settings, seeds=seeds, state=state),
            total=learner.total_updates,
            checkpoint_every=settings.checkpoint_every,
            metadata=metadata,
            parameters=lambda state: state.learner,
            summary=lambda records: ({}, None),
            tensorboard=False,
            verbose=False,
        )


# --- What is compared ---


def content_of(run: Path) -> dict[str, str]:
    """A hash of the log without wall times, and of the arrays of the newest checkpoint."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in record.items() if key != "wall_time"} for record in records]
    newest = max((run / "checkpoints").glob("step_*.eqx"))
    header, arrays = newest.read_bytes().split(b"\n", 1)
    parts = {
        "log": json.dumps(log).encode(),
        "arrays": json.dumps(json.loads(header)["content"]["leaves"]).encode() + arrays,
    }
    return {"last": newest.name} | {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}


def contents(kind: Kind, out: Path) -> dict[str, dict[str, str]]:
    return {run.relative_to(out).as_posix(): content_of(run) for run in kind.runs(out)}


def half_written(out: Path) -> set[Path]:
    """Files under temporary names."""
    return set(out.rglob(".*.tmp*"))


# --- Lives of runs ---


class Life:
    """A run that is begun, hit by signals, gone on with, and let end."""

    def __init__(self, kind: Kind, out: Path, shared: Path, rng: random.Random, seconds: float):
        self.kind, self.out, self.shared, self.rng = kind, out, shared, rng
        self.seconds = seconds
        """How long a run takes that is left alone, compilation included."""
        self.noise = ""

    def start(self) -> subprocess.Popen:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            # Shared by all, so that what is killed while it compiles is met again.
            "JAX_COMPILATION_CACHE_DIR": str(self.shared / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        self.stderr = open(self.shared / "stderr.txt", "w+")
        command = self.kind.command(self.out, self.shared)
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=self.stderr, env=environment, start_new_session=True
        )

    def end(self, process: subprocess.Popen) -> int:
        code = process.wait(PATIENCE)
        self.stderr.seek(0)
        self.noise = self.stderr.read()
        self.stderr.close()
        return code

    def hit(self, number: signal.Signals, moment: str) -> dict[str, Any]:
        """Starts or goes on, and sends a signal, at a random moment of starting, of training, or while a file is
        written.

        **Returns:** whether it came in time, whether a file was half written then, and the exit code.
        """
        before, logged = half_written(self.out), self._logged()
        process, left, seen = self.start(), self.rng.randrange(1, 16), set()
        late = time.monotonic() + self.rng.uniform(0.01, 0.3) * self.seconds
        while process.poll() is None:
            if moment == "writing":
                seen |= self._being_written() - before
                if len(seen) >= left:
                    break
            elif moment == "training" and self._logged() >= logged + left:
                time.sleep(self.rng.uniform(0.0, 0.2))
                break
            elif moment == "starting" and time.monotonic() > late:
                break
            time.sleep(2e-4 if moment == "writing" else 2e-3)
        in_time = process.poll() is None
        if in_time and number == signal.SIGKILL:
            self._kill(process)
        elif in_time:
            process.send_signal(number)
        code = self.end(process)
        hit = {
            "in_time": in_time and code != 0,
            "code": code,
            "damaged": "Using the previous one" in self.noise,
        }
        return hit | {
            "half_written": len(half_written(self.out) - before),
        }

    def _logged(self):
        """Lines in all logs."""
        logs = self.out / "metrics.jsonl", *self.out.glob("runs/*/metrics.jsonl")
        return sum(log.read_bytes().count(b"\n") for log in logs if log.exists())

    def _being_written(self):
        """As `half_written`, but quick: of runs' own folders and their checkpoints."""
        found = set()
        for folder in (
            self.out,
            self.out / "checkpoints",
            *self.out.glob("runs/*"),
            *self.out.glob("runs/*/checkpoints"),
        ):
            try:
                found |= {Path(entry.path) for entry in os.scandir(folder) if ".tmp" in entry.name}
            except OSError:
                continue
        return found

    def _kill(self, process):
        """The process, and half of the time those that it started; the others must notice by themselves."""
        children = _children(process.pid) if self.rng.random() < 0.5 else []
        for pid in (process.pid, *children):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def finish(self) -> bool:
        """Lets it end; whether it did so in good order."""
        process = self.start()
        return self.end(process) == 0 and not half_written(self.out)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def whole(kind: Kind, shared: Path) -> tuple[dict, float]:
    """What a run leaves that nothing happens to, and how long it takes."""
    life, begun = Life(kind, shared / "whole", shared, random.Random(0), 0.0), time.monotonic()
    if not life.finish():
        raise RuntimeError(f"A run that was left alone failed: {life.noise[-2000:]}")
    return contents(kind, shared / "whole"), time.monotonic() - begun


def campaign(
    name: str, numbers: list[signal.Signals], count: int, root: Path, seed: int = 0, verbose: bool = True
) -> dict[str, Any]:
    """Runs of one kind are hit until `count` signals came in time; each ends after a few."""
    kind, rng = KINDS[name], random.Random(f"{name} {seed} {numbers}")
    shared = root / re.sub(r"\W+", "-", name)
    shared.mkdir(parents=True)
    if name == "offline":
        data = shared / "maze2d-umaze.hdf5"
        subprocess.run(eqgen("data", "make", "maze2d-umaze", "--size", 3000, "--out", data), check=True)
    expected, seconds = whole(kind, shared)
    found = dict.fromkeys(("signals", "half_written", "runs", "equal", "lost", "damaged"), 0)
    codes, number = {}, 0
    while found["signals"] < count:
        number += 1
        life = Life(kind, shared / f"life{number}", shared, rng, seconds)
        for _ in range(rng.randrange(4, 7)):
            hit = life.hit(chosen := rng.choice(numbers), rng.choice(MOMENTS))
            if not hit["in_time"]:
                break
            found["signals"] += 1
            found["half_written"] += bool(hit["half_written"])
            found["damaged"] += hit["damaged"]
            key = f"{chosen.name}: {hit['code']}"
            codes[key] = codes.get(key, 0) + 1
        found["runs"] += len(expected)
        ended = life.finish()
        found["damaged"] += "Using the previous one" in life.noise
        after = contents(kind, life.out) if ended else {}
        equal = sum(after.get(run) == content for run, content in expected.items())
        found["equal"] += equal
        found["lost"] += len(expected) - equal
        if equal < len(expected):
            print(f"LOST in {name}: {life.noise[-2000:]}", file=sys.stderr)
        shutil.rmtree(life.out)
        if verbose:
            print(f"{name}: {found}", flush=True)
    return found | {"exit_codes": codes, "seconds_undisturbed": round(seconds, 1)}


# --- The parts ---


def kills(names):
    return _signals([signal.SIGKILL], KILLS, names)


def interrupts(names):
    return _signals([signal.SIGINT, signal.SIGTERM], INTERRUPTS, names)


def _signals(numbers, count, names):
    for name in names or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            yield name, campaign(name, numbers, count, Path(folder))


def files(names):
    for name in names or READERS:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.monotonic()
            found = fuzz(name, FILES, Path(folder))
        print(f"{name}: {found}", flush=True)
        counted = {"defects": len(found["defects"]), "found": found["defects"]}
        yield name, found | counted | {"seconds": round(time.monotonic() - begun, 1)}


PARTS = {"kills": kills, "interrupts": interrupts, "files": files}


def main():
    path, names = RESULTS / "faults.json", sys.argv[2:]
    for part in sys.argv[1:2] or PARTS:
        made = provenance()
        for name, found in PARTS[part](names):  # kept as it comes: the whole takes long
            results = json.loads(path.read_text()) if path.exists() else {}
            kinds = results.get(part, {}).get("kinds", {}) | {name: found | {"commit": made["commit"]}}
            counts = [key for key, value in found.items() if type(value) is int and key != "ways"]
            total = {key: sum(kind[key] for kind in kinds.values()) for key in counts}
            write("faults", results | {part: {"provenance": made, "total": total, "kinds": kinds}})


if __name__ == "__main__":
    if sys.argv[1:2] == ["adaptive"]:
        try:
            adaptive(Path(sys.argv[2]))
        except KeyboardInterrupt as interrupt:  # as the command line answers it
            sys.exit(128 + getattr(interrupt, "signal", signal.SIGINT))
    else:
        main()
