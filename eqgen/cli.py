"""The command `eqgen`.

Nothing heavy is imported before the arguments say that it is needed, so help is quick. Errors that a user can
mend are one line and exit code 2; a traceback is a defect of eqgen.

`train` reads its arguments twice: first the algorithm, `--env`, `--preset` and `--profile`, which decide the
defaults of everything else, then all of them, with every field of the agent and of the loop as a flag.
"""

import argparse
import dataclasses
import difflib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from eqgen import __version__
from eqgen.files import write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    **Returns:** the exit code: 0, 2 for an error that the user can mend, 128 + n after signal n.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in _COMMANDS:
        nearest = difflib.get_close_matches(name, _COMMANDS, n=1) or sorted(_COMMANDS)
        return _fail(f"There is no command {name!r}. Did you mean {' or '.join(nearest)}?")
    _use_compilation_cache()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"eqgen: {message}", file=sys.stderr)
            command = _COMMANDS[name]
            if command in (train, data):
                command(arguments[1:])
            else:
                _parse(command, name, arguments[1:])
        return 0
    except KeyboardInterrupt as interrupt:
        print(interrupt if interrupt.args else "Interrupted.", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", 2)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        if _is_expected(error):
            return _fail(str(error))
        raise


def _is_expected(error: Exception) -> bool:
    """Whether the error's message is enough for the user: no permission, a full disk, or one of our own."""
    from eqgen.checkpoint import CheckpointError
    from eqgen.data.episodes import DataError
    from eqgen.envs.base import EnvironmentFailedError
    from eqgen.hyperparameters import HyperparametersError
    from eqgen.runs import RunError
    from eqgen.sessions import ExperimentError

    ours = (
        CheckpointError
        | DataError
        | EnvironmentFailedError
        | ExperimentError
        | HyperparametersError
        | RunError
    )
    return isinstance(error, ours | OSError)


def _fail(message: str) -> int:
    print(f"eqgen: {message}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = ["usage: eqgen COMMAND ...", "", inspect.cleandoc(_ABOUT), "", "commands:"]
    for name, command in _COMMANDS.items():
        lines.append(f"  {name:<10}{_first_line(command)}")
    return "\n".join([*lines, "", inspect.cleandoc(_NOTES)])


def _first_line(thing: Any) -> str:
    """Of its docstring; empty under `python -OO`, which drops them."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


_ABOUT = """
    Generative decision-making in JAX: train, resume, judge and picture agents.
"""
_NOTES = """
    `eqgen COMMAND --help` explains a command, `eqgen train ALGORITHM --help` lists every hyperparameter.

    example:
      eqgen train som --env gymnax/Pendulum-v1 --seeds 3 --out runs/pendulum
      eqgen evaluate runs/pendulum --episodes 20
      eqgen plot runs/pendulum

    Compiled programs are kept in the user's cache folder; JAX_ENABLE_COMPILATION_CACHE=0 turns that off.
"""


def _use_compilation_cache() -> None:
    """Keeps compiled programs between commands, unless the environment says where or not to."""
    try:
        cpu = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0]
    except OSError:
        cpu = ""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # Programs for the CPU use its instruction set, and a home folder may be shared by unlike machines.
    folder = base / "eqgen" / "jax" / sha256(cpu.encode()).hexdigest()[:8]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _parse(options: Callable[..., Any], command: str, arguments: list[str]) -> Any:
    """Calls a function, or makes a dataclass, of the arguments."""
    # Of what may be a module or None the flags are those of its default: a module is chosen by its profile.
    config = (tyro.conf.HelptextFromCommentsOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(options, prog=f"eqgen {command}", args=arguments, config=config)


# --- train ---


def train(arguments: list[str]) -> None:
    """Train an agent into a new run directory."""
    from eqgen import experiments
    from eqgen.algorithms.base import AbstractAgent, AbstractLearner

    if not arguments or arguments[0].startswith("-"):
        print("usage: eqgen train ALGORITHM --env ENV [--out RUN] [...]     (agents)")
        print("       eqgen train ALGORITHM --data FILE [--out RUN] [...]   (diffusion-planner)")
        print("       eqgen train ALGORITHM --planner RUN [--out RUN] [...] (on top of a trained planner)")
        print(f"\nalgorithms: {', '.join(experiments.algorithms() | _planners())}\n")
        print("`eqgen train ALGORITHM --help` lists all options; `eqgen list` the environments.")
        if not {"-h", "--help"} & set(arguments):
            raise experiments.ExperimentError("train needs an algorithm first.")
        return
    name = arguments[0]
    cls = experiments.algorithm(name, AbstractLearner)
    if not issubclass(cls, AbstractAgent):
        if name not in _planners():
            raise experiments.ExperimentError(
                f"{name} is trained from Python, with eqgen.offline.train_offline; here are agents and planners."
            )
        _train_planner(name, cls, arguments[1:])
        return
    chosen = _parse(_train_options(cls, arguments[1:]), f"train {name}", arguments[1:])
    experiments.train(
        chosen.agent,
        chosen.env,
        chosen.settings,
        seeds=range(chosen.seed_start, chosen.seed_start + chosen.seeds),
        out=chosen.out or Path("runs", f"{name}-{chosen.env.replace('/', '-')}"),
        tensorboard=chosen.tensorboard,
    )


def _planners() -> dict[str, type]:
    """The planners and what is learned on top of them, by name."""
    from eqgen import experiments
    from eqgen.guidance import AbstractPlanner

    return experiments.algorithms(AbstractPlanner)


def _train_planner(name: str, cls: type, arguments: list[str]) -> None:
    from eqgen import planning
    from eqgen.algorithms.planner import DiffusionPlanner
    from eqgen.sessions import ExperimentError

    on_data = cls is DiffusionPlanner
    options, default = _planner_options(cls, on_data, arguments)
    chosen = _parse(options, f"train {name}", arguments)
    out = chosen.out or Path("runs", f"{name}-{(chosen.data if on_data else chosen.planner).stem}")
    if on_data:
        seeds = range(chosen.seed_start, chosen.seed_start + chosen.seeds)
        about = {name: getattr(chosen, name) for name in ("family", "horizon", "stride", "env")}
        planning.train(chosen.learner, chosen.data, chosen.settings, seeds=seeds, out=out, **about)
        return
    for field in ("planner", "teacher"):
        if getattr(chosen.learner, field, None) != getattr(default, field, None):
            raise ExperimentError(
                f"--learner.{field} is what --planner trained, and cannot be changed any more. Leave it out."
            )
    planning.train_on_planner(chosen.learner, chosen.planner, chosen.settings, out=out, data=chosen.data)


def _planner_options(cls: type, on_data: bool, arguments: list[str]) -> tuple[type, Any]:
    """The options of `train` for planners, and the learner that preset and profile lead to."""
    from eqgen.offline import OfflineSettings

    preset_name, profile_name, profiles, _ = _preset_and_profile(cls, arguments)
    learner = profiles[profile_name].resized(preset_name)
    loop = OfflineSettings.preset(preset_name)

    @dataclasses.dataclass(frozen=True)
    class Source:
        data: Path
        """The set: a file of D4RL's layout (`eqgen data make` writes some), OGBench's npz, a folder of Minari's."""
        family: Literal["maze2d", "antmaze", "kitchen", "mujoco"] | None = None
        """Whose rules cut the windows; as the set's name says if not given."""
        horizon: int | None = None
        """States of a plan; the family's if not given."""
        stride: int | None = None
        """Steps from one of them to the next; the family's if not given."""
        env: str | None = None
        """Where the planner is to be judged; as the set's name says if not given."""
        seeds: int = 1
        """How many planners to train side by side, each with a seed of its own."""
        seed_start: int = 0
        """The first seed; the others follow it."""

    @dataclasses.dataclass(frozen=True)
    class Below:
        planner: Path
        """The run of the trained planner, whose set, windows and seeds are taken over."""
        data: Path | None = None
        """Where the set lies now, if it was moved."""

    # Base and annotations are chosen here and read at run time, by tyro; a checker wants to know them before.
    @dataclasses.dataclass(frozen=True)
    class Train(Source if on_data else Below):  # pyright: ignore[reportGeneralTypeIssues]
        out: Path | None = None
        """The new run directory; runs/ALGORITHM-NAME if not given."""
        preset: Literal[tuple(cls.sizes)] = preset_name  # pyright: ignore[reportInvalidTypeForm]
        """How much computation: seconds, two CPU cores for up to about an hour, or one GPU."""
        profile: Literal[tuple(profiles)] = profile_name  # pyright: ignore[reportInvalidTypeForm]
        """Named settings of the algorithm, on top of which preset and flags apply."""
        learner: cls = dataclasses.field(default_factory=lambda: learner)  # pyright: ignore[reportInvalidTypeForm]
        settings: OfflineSettings = loop

    Train.__doc__ = inspect.getdoc(cls)
    return Train, learner


def _preset_and_profile(cls: type[Any], arguments: list[str]) -> tuple[Any, str, Mapping[str, Any], str]:
    """The names of preset and profile that were chosen, the profiles there are, and the environment."""
    from eqgen.sessions import ExperimentError

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--env", "--preset", "--profile"):
        first.add_argument(flag, nargs="?")  # that it has a value is for the full parser to check
    known, _ = first.parse_known_args(arguments)
    profiles = cls.profiles()
    preset, profile = known.preset or "cpu", known.profile or "default"
    for kind, name, choices in (("preset", preset, cls.sizes), ("profile", profile, profiles)):
        if name not in choices:
            raise ExperimentError(
                f"{cls.__name__} has no {kind} {name!r}. Choose one of {', '.join(choices)}."
            )
    return preset, profile, profiles, known.env or ""


def _train_options(cls: type, arguments: list[str]) -> type:
    """The options of `train`, with the defaults that preset, profile and environment lead to."""
    from eqgen.training import OnlineSettings

    preset_name, profile_name, profiles, env_name = _preset_and_profile(cls, arguments)
    chosen_agent = profiles[profile_name].resized(preset_name)
    chosen_settings = OnlineSettings.preset(preset_name, env_name, chosen_agent)

    @dataclasses.dataclass(frozen=True)
    class Train:
        env: str
        """Name of the environment, such as gymnax/Pendulum-v1 (`eqgen list` shows them)."""
        out: Path | None = None
        """The new run directory; runs/ALGORITHM-ENV if not given."""
        seeds: int = 1
        """How many agents to train side by side, each with a seed of its own."""
        seed_start: int = 0
        """The first seed; the others follow it."""
        preset: Literal[tuple(cls.sizes)] = preset_name  # pyright: ignore[reportInvalidTypeForm]
        """How much computation: seconds, two CPU cores for up to about an hour, or one GPU."""
        profile: Literal[tuple(profiles)] = profile_name  # pyright: ignore[reportInvalidTypeForm]
        """Named settings of the algorithm, on top of which preset and flags apply."""
        tensorboard: bool = False
        """Also write event files for TensorBoard."""
        agent: cls = dataclasses.field(default_factory=lambda: chosen_agent)  # pyright: ignore[reportInvalidTypeForm]
        settings: OnlineSettings = chosen_settings

    Train.__doc__ = inspect.getdoc(cls)
    return Train


# --- data ---


def data(arguments: list[str]) -> None:
    """Make a dataset, or check one in a file."""
    from eqgen.data.episodes import DataError

    actions = {"make": _make_data, "check": _check_data}
    if not arguments or arguments[0] not in actions:
        print("usage: eqgen data make NAME [--size N] [--out FILE] [...]\n       eqgen data check FILE\n")
        print("`eqgen data make --help` and `eqgen data check --help` explain them.")
        if not {"-h", "--help"} & set(arguments):
            raise DataError(
                f"data has no action {arguments[0]!r}." if arguments else "data needs an action first."
            )
        return
    _parse(actions[arguments[0]], f"data {arguments[0]}", arguments[1:])


def _make_data(
    name: Positional[str],
    size: int | None = None,
    out: Path | None = None,
    seed: int = 0,
    noise: float | None = None,
    env: str | None = None,
    run: Path | None = None,
    expert: Path | None = None,
) -> None:
    """Make a dataset of eqgen's own, in D4RL's layout.

    Mazes, by a controller: maze2d-umaze, maze2d-medium, maze2d-large, each also with -navigate.
    From agents: random (of --env); medium, expert, medium-replay (of --run); medium-expert (of --run and --expert).

    Args:
        name: Which; see above.
        size: Steps; as many as D4RL's set has if not given.
        out: The file; data/NAME.hdf5 if not given.
        seed: Of everything random.
        noise: Standard deviation of the noise on the controller's actions; 0.5 if not given.
        env: The environment of the set random.
        run: The run directory whose policy or replay it is.
        expert: The run directory whose policy scores 100.
    """
    from eqgen import collection
    from eqgen.data import d4rl
    from eqgen.data.episodes import DataError

    out = out or Path("data", f"{name}.hdf5")
    if out.suffix != ".hdf5":
        raise DataError(f"{out}: datasets are written as .hdf5 files.")
    if out.exists():
        raise DataError(f"{out} already exists. Choose another --out, or remove it.")
    made = collection.make(name, size=size, seed=seed, noise=noise, env=env, run=run, expert=expert)
    d4rl.save(out, **made)
    episodes = made["episodes"]
    print(f"{out}  ({len(episodes)} steps, {episodes.num_episodes} episodes)")


def _check_data(path: Positional[Path]) -> None:
    """Say what a dataset holds, or what is wrong with it: D4RL's HDF5, OGBench's npz, a folder of Minari's.

    Args:
        path: The file or folder.
    """
    from eqgen.data import formats

    for name, value in formats.summary(path).items():
        print(f"{name:<14}{value}")


# --- The other commands ---


def resume(run: Positional[Path], data: Path | None = None) -> None:
    """Go on with an interrupted run, exactly where its last checkpoint was made.

    Args:
        run: The run directory.
        data: Where a planner's set lies now, if it was moved.
    """
    from eqgen import experiments, planning

    if planning.is_planning(run):
        planning.resume(run, data=data)
    elif data is not None:
        raise experiments.ExperimentError("--data is for planners; this run is of an agent.")
    else:
        experiments.resume(run)


def evaluate(
    run: Positional[Path],
    episodes: int | None = None,
    seed: int = 0,
    json: Path | None = None,
    guidance: str | None = None,
    replan_every: int | None = None,
) -> None:
    """Judge a run's newest checkpoint by fresh episodes.

    Args:
        run: The run directory.
        episodes: How many, for each trained seed; 20 of an agent, 100 of a planner if not given.
        seed: Of the episodes, which are the same for each trained seed.
        json: Where to write all returns and lengths, if anywhere.
        guidance: How a planner makes plans: unconditional, held, zero, mcss:50, cg:0.1, cfg:1.2:1, prior,
            prior-sampled.
        replan_every: Steps for which a planner's plan is followed; 1 if not given.
    """
    from eqgen import experiments, planning

    if planning.is_planning(run):
        given = {"episodes": episodes, "guidance": _guidance(guidance), "replan_every": replan_every}
        given = {name: value for name, value in given.items() if value is not None}
        results = planning.evaluate(run, seed=seed, **given)
    elif guidance is not None or replan_every is not None:
        raise experiments.ExperimentError(
            "--guidance and --replan-every are for planners; this run is of an agent."
        )
    else:
        results = experiments.evaluate(run, 20 if episodes is None else episodes, seed=seed)
    if json is not None:
        write_json(json, results)
    step = results["step" if "step" in results else "env_step"]
    print("{algorithm} on {env} at step {step}: {policy}".format(**{"step": step} | results))
    for result in results["seeds"]:
        returns = result["returns"]
        low, high = min(returns), max(returns)
        line = f"mean return {result['return']:.1f} over {len(returns)} episodes, {low:.1f} to {high:.1f}"
        if steps := result.get("steps_to_goal"):
            reached = [step for step in steps if step is not None]
            after = f" after {sum(reached) / len(reached):.0f} steps" if reached else ""
            line += f"; goal reached in {len(reached)} of them{after}"
        print(f"  seed {result['seed']}: {line}")


def plot(runs: Positional[tuple[Path, ...]], out: Path | None = None, metric: str | None = None) -> None:
    """Draw the learning curves of one or several runs, as PNG and PDF.

    Args:
        runs: The run directories, one curve each.
        out: The picture; learning_curve.png in the first run if not given.
        metric: Which of the logged metrics; if not given the return of evaluation episodes, or a planner's loss.
    """
    from eqgen import experiments

    for path in experiments.plot(runs, out or runs[0] / "learning_curve.png", metric=metric):
        print(path)


def render(
    run: Positional[Path],
    out: Path | None = None,
    trained_seed: int | None = None,
    episodes: int | None = None,
    seed: int = 0,
    guidance: str | None = None,
) -> None:
    """Make a clip of what a run's policy does, as GIF or MP4.

    Args:
        run: The run directory.
        out: The clip, *.gif or *.mp4; policy.gif in the run if not given.
        trained_seed: Whose policy; the first of the run if not given.
        episodes: How many; one if not given.
        seed: Of the episodes.
        guidance: How a planner makes plans, as for `eqgen evaluate`.
    """
    from eqgen import experiments, planning

    options: dict[str, Any] = dict(trained_seed=trained_seed, episodes=episodes, seed=seed)
    if planning.is_planning(run):
        path, returns = planning.render(run, out, guidance=_guidance(guidance), **options)
    elif guidance is not None:
        raise experiments.ExperimentError("--guidance is for planners; this run is of an agent.")
    else:
        path, returns = experiments.render(run, out, **options)
    print(f"{path}  (return {', '.join(f'{x:.1f}' for x in returns)})")


def _guidance(name: str | None) -> Any:
    """The scheme of that name."""
    from eqgen.guidance import scheme
    from eqgen.sessions import ExperimentError

    try:
        return None if name is None else scheme(name)
    except ValueError as error:
        raise ExperimentError(str(error)) from error


def benchmark(
    suite: str | None = None,
    preset: str | None = None,
    algorithms: tuple[str, ...] = (),
    seeds: int | None = None,
    seed_start: int | None = None,
    envs: tuple[str, ...] = (),
    out: Path | None = None,
    table: Path | None = None,
) -> None:
    """Compare algorithms on a suite of tasks, or go on with that.

    Every finished run leaves a row (settings, versions, hardware, learning curve, costs) in OUT/rows, from which
    OUT/table.md and OUT/curves.pdf are made. What is finished is not run again.

    Args:
        suite: Which tasks: gymnax (two, for two CPU cores), gymnax-dense (the same, three times the updates) or
            mujoco (five).
        preset: How much computation: smoke (seconds), cpu, paper (one GPU); cpu if not given.
        algorithms: Which, as "som" or "som:paper" for a profile; all agents if not given.
        seeds: How many agents to train side by side for each row; 3 if not given.
        seed_start: The first seed; 0 if not given. The others follow it.
        envs: Some of the suite's tasks; all if not given.
        out: The folder, new or to go on with; runs/benchmark-SUITE-PRESET if not given.
        table: Such a folder: makes its table and figure again from the rows, and runs nothing.
    """
    from eqgen.benchmark import run_suite
    from eqgen.comparison import write_table
    from eqgen.sessions import ExperimentError

    if table is not None:
        if any((suite, preset, algorithms, seeds is not None, seed_start is not None, envs, out)):
            raise ExperimentError("--table FOLDER stands alone: all else is in the folder's rows.")
        written = write_table(table)
    elif suite is None:
        raise ExperimentError("benchmark needs --suite gymnax, gymnax-dense or mujoco, or --table FOLDER.")
    else:
        preset, first = preset or "cpu", seed_start or 0
        out = out or Path("runs", f"benchmark-{suite}-{preset}")
        wanted = range(first, first + (3 if seeds is None else seeds))
        written = run_suite(suite, preset, algorithms, seeds=wanted, out=out, envs=envs)
    print(written[0].read_text())
    for path in written:
        print(path)


def export(
    run: Positional[Path],
    out: Path | None = None,
    trained_seed: int | None = None,
    batch: int | None = None,
    platforms: tuple[str, ...] = ("cpu", "cuda"),
) -> None:
    """Write a run's policy as one file that runs without eqgen.

    How to act by it, `eqgen.deployment` says: five lines of JAX.

    Args:
        run: The run directory.
        out: The file; policy.zip in the run if not given.
        trained_seed: Whose policy; the first of the run if not given.
        batch: How many observations at once; one, without a batch axis, if not given.
        platforms: Where it is to run, of cpu, cuda, rocm, tpu.
    """
    from eqgen import deployment

    options: dict[str, Any] = dict(trained_seed=trained_seed, batch=batch, platforms=platforms)
    print(deployment.export_policy(run, out or run / "policy.zip", **options))


def report(paths: Positional[tuple[Path, ...]] = (Path("runs"),), out: Path = Path("report.html")) -> None:
    """Write one page of HTML about runs: curves, a table, in what settings differ, clips.

    The page holds all it shows and opens offline.

    Args:
        paths: Runs, or folders with runs somewhere below; runs/ if not given.
        out: The page.
    """
    from eqgen import reporting

    print(reporting.write_report(paths, out))


def watch(run: Positional[Path], every: float = 2.0, once: bool = False) -> None:
    """Follow a run in the terminal, until it is complete.

    Args:
        run: The run directory.
        every: Seconds between looks.
        once: Look once.
    """
    from eqgen import reporting

    reporting.watch(run, every=every, once=once)


def sweep(
    file: Positional[Path],
    out: Path | None = None,
    engine: str = "local",
    workers: int = 1,
    dry_run: bool = False,
) -> None:
    """Run every combination in a TOML file, or go on with that.

    What FILE holds, `eqgen.sweeps` explains by an example. Each combination is a run in OUT/runs; what is complete
    is not run again. OUT/summary.md says what came out.

    Args:
        file: The sweep, *.toml.
        out: The folder, new or to go on with; runs/FILE's name if not given.
        engine: local, or ray: a Ray cluster that is running already.
        workers: Processes beside each other, of the local engine.
        dry_run: Only lists the runs.
    """
    from eqgen import sweeps

    wanted = sweeps.Sweep.read(file)
    if dry_run:
        print("\n".join(wanted.runs()))
        return
    written = sweeps.run_sweep(wanted, out or Path("runs", file.stem), engine=engine, workers=workers)
    print(written[0].read_text())
    for path in written:
        print(path)


def list_() -> None:
    """List algorithms and environments."""
    from eqgen import experiments
    from eqgen.envs import catalog

    print("algorithms")
    for name, cls in (experiments.algorithms() | _planners()).items():
        about = _first_line(inspect.getmodule(cls))
        print(f"  {name:<19}{about} Profiles: {', '.join(cls.profiles())}")
    print("\nenvironments")
    print("\n".join(f"  {name}" for name in catalog.available()))


_COMMANDS = {
    "train": train,
    "resume": resume,
    "evaluate": evaluate,
    "plot": plot,
    "render": render,
    "data": data,
    "benchmark": benchmark,
    "export": export,
    "sweep": sweep,
    "report": report,
    "watch": watch,
    "list": list_,
}
