"""Sweeps: every combination of algorithms, environments, seeds and settings in a TOML file, each a run of its own.

    preset = "cpu"                                  # smoke, cpu or paper; "cpu" if not given
    algorithms = ["som", "sac", "som:paper"]        # "som:paper" for a profile
    envs = ["gymnax/Pendulum-v1"]
    seeds = [0, 1, 2]
    seeds_together = true                           # one run of all seeds, side by side; false: a run for each

    [settings]                                      # of the loop, the same in all runs
    total_steps = 20_000

    [agent]                                         # of every agent; all of them must have these fields
    hidden = [64, 64]

    [grid]                                          # each combination of these values is a run
    "agent.discount" = [0.97, 0.99]
    "settings.num_envs" = [1, 4]

    [resources]                                     # of one run, for `--engine ray`; 1 and 0 if not given
    cpus = 1
    gpus = 0

A run is a function of its settings alone: OUT/runs/NAME is made with them first, empty, and whoever comes by
resumes it. So it does not matter where a run is computed, how often it was interrupted, or who goes on with it, and
the same command does what is missing, also beside another that is at it. OUT/summary.json and summary.md hold what
all runs came to.

Engines: "local" runs them here, one after another or in `workers` processes; "ray" on a Ray cluster that is there
already (`ray start --head`, or `RAY_ADDRESS`), wherever the resources are free. When a node is lost, its runs go
on elsewhere from their last checkpoint. OUT must lie in a folder that all nodes share.
"""

import dataclasses
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from eqgen import experiments, studies
from eqgen.algorithms.base import Size
from eqgen.checkpoint import CheckpointError
from eqgen.experiments import Experiment
from eqgen.files import is_number, replacing, write_json
from eqgen.hyperparameters import HyperparametersError, check_type
from eqgen.runs import Run, RunError, RunIsBusyError
from eqgen.sessions import ExperimentError, Interrupted, StopOnSignal, check_seeds
from eqgen.training import OnlineSettings


ENGINES = ("local", "ray")
MOST_RUNS = 1_000
RETRIES = 5
"""How often Ray starts a run again whose node or process was lost."""
FAILURES = (ExperimentError, RunError, CheckpointError)
"""What ends one run, and leaves the others of a sweep as they are."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a file asks for; see the module."""

    algorithms: tuple[str, ...]
    envs: tuple[str, ...]
    seeds: tuple[int, ...]
    preset: Size = "cpu"
    seeds_together: bool = True
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    agent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    resources: Mapping[str, int | float] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "Sweep":
        """The sweep in a TOML file.

        **Raises:** `ExperimentError` when it is no TOML or asks for something that there is not.
        """
        try:
            content = tomllib.loads(Path(path).read_text())
        except ValueError as error:  # also bytes that are no text
            raise ExperimentError(f"{path} is not TOML: {error}.") from None
        except RecursionError:
            raise ExperimentError(f"{path} is nested too deeply.") from None
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := content.keys() - fields.keys():
            raise ExperimentError(f"{path}: no {_list(unknown)} in a sweep; it takes {_list(fields)}.")
        for name in ("algorithms", "envs", "seeds"):
            if not isinstance(content.get(name), list) or not content[name]:
                raise ExperimentError(f"{path}: {name} must be a list of at least one.")
        for name, kind in (("algorithms", str), ("envs", str), ("seeds", int)):
            if wrong := [value for value in content[name] if type(value) is not kind]:
                raise ExperimentError(f"{path}: {name} holds {wrong[0]!r}, which is no {kind.__name__}.")
        for name in ("settings", "agent", "grid", "resources"):
            if not isinstance(content.get(name, {}), dict):
                raise ExperimentError(f"{path}: {name} must be a table, [{name}].")
        if not isinstance(content.get("seeds_together", True), bool):
            raise ExperimentError(f"{path}: seeds_together must be true or false.")
        if content.get("preset", "cpu") not in get_args(Size):
            raise ExperimentError(f"{path}: preset must be one of {_list(get_args(Size))}.")
        for name, values in content.get("grid", {}).items():
            if (
                name.partition(".")[0] not in ("agent", "settings")
                or not isinstance(values, list)
                or not values
            ):
                raise ExperimentError(
                    f'{path}: grid takes lists for fields such as "agent.discount" or "settings.num_envs", not '
                    f"{name} = {values!r}."
                )
        if unknown := content.get("resources", {}).keys() - {"cpus", "gpus"}:
            raise ExperimentError(f"{path}: no {_list(unknown)} in resources; it takes cpus, gpus.")
        for name, value in content.get("resources", {}).items():
            if not is_number(value) or value < 0:
                raise ExperimentError(
                    f"{path}: resources.{name} is {value!r}; it must be a number, 0 or more."
                )
        number = len(content["algorithms"]) * len(content["envs"])
        number *= math.prod(map(len, content.get("grid", {}).values()))
        number *= 1 if content.get("seeds_together", True) else len(content["seeds"])
        if number > MOST_RUNS:
            raise ExperimentError(
                f"{path}: {number} combinations are more than the {MOST_RUNS} of one sweep. Split it."
            )
        lists: dict[str, Any] = {name: tuple(content[name]) for name in ("algorithms", "envs", "seeds")}
        return cls(**(content | lists))

    def runs(self) -> dict[str, Experiment]:
        """The experiments by name, which says in what they differ.

        **Raises:** `ExperimentError` as soon as one of them cannot be.
        """
        seeds = check_seeds(self.seeds)
        groups = [seeds] if self.seeds_together else [(seed,) for seed in seeds]
        found = {}
        for name, env, chosen, group in itertools.product(self.algorithms, self.envs, self._points(), groups):
            parts = [name.replace(":", "-"), env.replace("/", "-")]
            parts += [f"{key.rpartition('.')[2]}={_short(value)}" for key, value in chosen.items()]
            parts += [] if self.seeds_together else [f"seed{group[0]}"]
            if (label := "_".join(parts)) in found:
                raise ExperimentError(
                    f"Two runs are called {label}; name each algorithm, value and seed once."
                )
            experiment = self._experiment(name, env, chosen, group)
            experiment.make_env()
            found[label] = experiment
        return found

    def _points(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values))

    def _experiment(self, name, env, chosen, seeds):
        name, _, profile = name.partition(":")
        profiles = experiments.algorithm(name).profiles()
        if (profile or "default") not in profiles:
            raise ExperimentError(f"{name} has no profile {profile!r}; it has {_list(profiles)}.")
        agent = profiles[profile or "default"].resized(self.preset)
        settings = OnlineSettings.preset(self.preset, env, agent)
        of = lambda part: {
            key.partition(".")[2]: value for key, value in chosen.items() if key.startswith(f"{part}.")
        }
        agent = with_fields(agent, _flat(self.agent) | of("agent"))
        return Experiment(agent, env, with_fields(settings, dict(self.settings) | of("settings")), seeds)


def with_fields(module: Any, values: Mapping[str, Any]) -> Any:
    """A module or dataclass with other values in some fields, named by paths such as "noise.initial_std".

    **Raises:** `ExperimentError` when there is no such field, or when it holds a value of another type.
    """
    for path, value in values.items():
        name, _, rest = path.partition(".")
        known = {field.name for field in dataclasses.fields(module)}
        if name not in known:
            raise ExperimentError(f"{type(module).__name__} has no field {name!r}; it has {_list(known)}.")
        old = getattr(module, name)
        if rest and not dataclasses.is_dataclass(old):
            raise ExperimentError(f"{type(module).__name__}.{name} is {old!r}, which has no field {rest!r}.")
        try:
            if rest:
                new = with_fields(old, {rest: value})
            else:
                new = _as_type_of(old, value, f"{type(module).__name__}.{name}")
            check_type(type(module), name, new)
            module = dataclasses.replace(module, **{name: new})
        except (TypeError, ValueError, ArithmeticError, LookupError, HyperparametersError) as error:
            raise ExperimentError(str(error)) from error
    return module


def _as_type_of(old, value, name):
    value = tuple(value) if isinstance(value, list) else value
    if old is None or type(value) is type(old):
        return value
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if dataclasses.is_dataclass(old):
        raise ExperimentError(f"{name} is a module; set its fields, as in {name.rpartition('.')[2]}.FIELD.")
    raise ExperimentError(
        f"{name} is {old!r}, a {type(old).__name__}; {value!r} is a {type(value).__name__}."
    )


def _flat(table, prefix="", depth=20):
    """Nested tables as paths."""
    if depth == 0:
        raise ExperimentError(f"{prefix[:-1]} is nested too deeply.")
    flat = {}
    for name, value in table.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.", depth - 1) if inner else {prefix + name: value}
    return flat


def _short(value):
    return "x".join(map(str, value)) if isinstance(value, list) else str(value).replace("/", "-")


def _list(names):
    return ", ".join(sorted(map(str, names)))


# --- Running ---


def run_sweep(
    sweep: Sweep, out: str | Path, *, engine: str = "local", workers: int = 1, verbose: bool = True
) -> list[Path]:
    """Does what is missing of a sweep, and says what all of it came to.

    **Arguments:**

    - `workers`: processes beside each other, of the local engine; 1 is this one.

    **Returns:** the files summary.md and summary.json.

    **Raises:** `ExperimentError` when a run of that name in `out` has other settings, and after all others are
    done when runs failed, whose errors the summary holds; `Interrupted` after an interrupt.
    """
    if engine not in ENGINES:
        raise ExperimentError(f"There is no engine {engine!r}; choose one of {_list(ENGINES)}.")
    if workers < 1 or (engine == "ray" and workers > 1):
        raise ExperimentError(f"workers is {workers}; it must be at least 1, and Ray places runs itself.")
    folder, planned = Path(out), sweep.runs()
    for name, experiment in planned.items():
        _prepare(folder / "runs" / name, experiment)
    write = lambda errors: _summarise(folder, planned, errors)
    run_all = {"local": _run_here, "ray": _run_on_ray}[engine]
    if engine == "local" and workers > 1:
        run_all = _run_in_processes
    errors = run_all(folder, list(planned), sweep=sweep, workers=workers, verbose=verbose, written=write)
    written = write(errors)
    if errors:
        raise ExperimentError(
            f"{len(errors)} of {len(planned)} runs failed: {_list(errors)}. See {written[0]}."
        )
    return written


def _prepare(path, experiment):
    """Makes the run, empty, or sees that the one there is the same."""
    content = experiment.to_json()
    try:
        Run.create(path, content).close()
        return
    except RunError:
        if not (path / "settings.json").exists():
            raise
    found = Run.open(path).settings
    if differing := [name for name in content if found.get(name) != content[name]]:
        raise ExperimentError(
            f"{path} has another {_list(differing)} than the sweep asks for. Choose another --out."
        )


def complete(path: str | Path) -> bool:
    """Whether a run has been trained to its last step."""
    run = Run.open(path)
    steps = [int(file.stem.rpartition("_")[2]) for file in run.checkpoints()[:1]]
    return steps == [run.settings["settings"]["total_steps"]]


def _next_free(folder, waiting, verbose, told):
    """The first run to which nobody else is writing, taken off the list; None as long as there is none."""
    for name in waiting:
        if not Run.is_busy(folder / "runs" / name):
            waiting.remove(name)
            return name
        if name not in told:
            told.add(name)
            _say(verbose, name, "another process is writing to it")
    return None


def _run_here(folder, names, *, verbose, written, **_):
    waiting, errors, told = list(names), {}, set()
    while waiting:
        if (name := _next_free(folder, waiting, verbose, told)) is None:
            time.sleep(1)
            continue
        if complete(folder / "runs" / name):
            continue
        if verbose:
            print(f"[{names.index(name) + 1}/{len(names)}] {name}", flush=True)
        try:
            experiments.resume(folder / "runs" / name, verbose=verbose)
        except Interrupted as stop:
            raise Interrupted(f"{name} is saved. The same command goes on from there.", stop.signal) from stop
        except RunIsBusyError:  # since it was looked at
            waiting.append(name)
        except FAILURES as error:
            errors[name] = str(error)
        written(errors)
    return errors


_WORKER = """
import sys
from eqgen import sweeps
sweeps.stop_with(int(sys.argv[1]))
from eqgen import cli
sys.exit(cli.main(["resume", sys.argv[2]]))
"""


def stop_with(parent: int) -> None:
    """Interrupts this process, so that it saves, once it is no longer a child of `parent`.

    A sweep that is killed leaves no worker behind that would go on by itself.
    """

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _run_in_processes(folder, names, *, workers, verbose, written, **_):
    waiting = [name for name in names if not complete(folder / "runs" / name)]
    busy, errors, stopping, told = {}, {}, False, set()
    with StopOnSignal() as stop:
        while busy or (waiting and not stop.signal):
            while waiting and len(busy) < workers and not stop.signal:
                if (name := _next_free(folder, waiting, verbose, told)) is None:
                    break
                if complete(folder / "runs" / name):  # by whoever wrote to it
                    continue
                command = [sys.executable, "-c", _WORKER, str(os.getpid()), str(folder / "runs" / name)]
                with open(folder / "runs" / name / "log.txt", "ab") as log:
                    # A session of its own: Ctrl-C reaches this process alone, which passes one signal on.
                    busy[name] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                _say(verbose, name, "begun")
            time.sleep(0.2)
            if stop.signal and not stopping:
                stopping = True
                for process in busy.values():
                    process.terminate()
            for name, process in list(busy.items()):
                if (code := process.poll()) is None:
                    continue
                del busy[name]
                if code and not stop.signal and Run.is_busy(folder / "runs" / name):  # since it was looked at
                    waiting.append(name)
                    continue
                if code and not stop.signal:
                    lines = (folder / "runs" / name / "log.txt").read_text(errors="replace").split("\n")
                    errors[name] = next((line for line in reversed(lines) if line), f"exit code {code}")
                _say(verbose, name, "failed" if name in errors else "stopped" if code else "done")
                written(errors)
    if stop.signal:
        raise Interrupted("All runs are saved. The same command goes on from there.", stop.signal)
    return errors


def _run_on_ray(folder, names, *, sweep, verbose, written, **_):
    try:
        import ray  # pyright: ignore[reportMissingImports]  # an extra
        import ray.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ExperimentError("--engine ray needs Ray: pip install 'eqgen[ray]'.") from None
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False)
        except ConnectionError as error:
            raise ExperimentError(
                "There is no Ray cluster to be found. Start one with `ray start --head`, or name it in RAY_ADDRESS."
            ) from error
    resources = {"num_cpus": sweep.resources.get("cpus", 1), "num_gpus": sweep.resources.get("gpus", 0)}
    remote = ray.remote(**resources, max_retries=RETRIES)(_resume_remotely)
    paths = [(folder / "runs" / name).resolve() for name in names]
    tasks = {remote.remote(str(path)): name for name, path in zip(names, paths) if not complete(path)}
    errors, stopping = {}, False
    with StopOnSignal() as stop:
        while tasks:
            finished, _ = ray.wait(list(tasks), num_returns=1, timeout=1)
            if stop.signal and not stopping:
                stopping = True
                for task in tasks:
                    ray.cancel(task)  # an interrupt in the worker, which saves
            for task in finished:
                name = tasks.pop(task)
                try:
                    error = ray.get(task)
                except ray.exceptions.RayTaskError as failed:  # of the run itself, which no retry would mend
                    error = None if stopping else str(failed.cause)
                except ray.exceptions.RayError as lost:
                    error = None if stopping else f"{type(lost).__name__}, after {RETRIES} retries"
                if error is not None:
                    errors[name] = error
                _say(verbose, name, "failed" if name in errors else "stopped" if stopping else "done")
                written(errors)
    if stop.signal:
        raise Interrupted("All runs are saved. The same command goes on from there.", stop.signal)
    return errors


def _say(verbose, name, what):
    if verbose:
        print(f"{name}: {what}", flush=True)


def _resume_remotely(path: str) -> str | None:
    """In a worker: the error's message, if the run cannot be finished, so that it is not tried in vain again."""
    try:
        experiments.resume(path, verbose=False)
    except FAILURES as error:
        return str(error)
    return None


# --- What it came to ---


def _summarise(folder: Path, planned: Mapping[str, Experiment], errors: Mapping[str, str]) -> list[Path]:
    rows = {}
    for name, experiment in planned.items():
        run = Run.open(folder / "runs" / name)
        row = {"status": "failed" if name in errors else "finished" if complete(run.path) else "open"}
        records = studies.result(run)["records"]
        if name in errors:
            row["error"] = errors[name]
        if records:
            last = [record for record in records if record["env_step"] == records[-1]["env_step"]]
            returns = [record["eval/return"] for record in last]
            row |= {"env_step": records[-1]["env_step"], "seeds": list(experiment.seeds), "returns": returns}
        rows[name] = row
    write_json(folder / "summary.json", rows)
    lines = ["| run | status | step | last return: mean over seeds (least, greatest) |", "|---|---|---|---|"]
    for name, row in rows.items():
        values = row.get("returns")
        cell = f"{np.mean(values):.1f} ({min(values):.1f}, {max(values):.1f})" if values else "-"
        lines.append(f"| {name} | {row['status']} | {row.get('env_step', '-')} | {cell} |")
    lines += ["", *(f"{name}: {error}" for name, error in errors.items())] if errors else []
    with replacing(folder / "summary.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return [folder / "summary.md", folder / "summary.json"]
