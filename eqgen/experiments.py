"""Whole experiments on disk: train, go on, evaluate, plot; what command line and figure scripts call.

A run directory holds all seeds of one experiment (see `eqgen.runs`), and its `settings.json` all that it
takes to build the agent, the environment and the loop again. However training stops, it can go on: at the
first interrupt the chunk under way is finished and saved, and a metric that is not finite leaves the last
good checkpoint in place.
"""

import dataclasses
import difflib
import importlib
import inspect
import math
import pkgutil
import re
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from tqdm import tqdm

from eqgen import algorithms as algorithms_package
from eqgen.algorithms.base import AbstractAgent
from eqgen.envs import catalog
from eqgen.envs.base import example_transition
from eqgen.evaluation import Policy, rollout_returns
from eqgen.hyperparameters import HyperparametersError, from_json, to_json
from eqgen.runs import Run, TensorBoard
from eqgen.training import (
    NonFiniteError,
    OnlineSettings,
    OnlineState,
    Progress,
    greedy_policy,
    init_online,
    seed_slice,
    train_online,
)


class ExperimentError(Exception):
    """Something that was asked for cannot be done; the message says what and why in a line."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and did, after saving; `signal` is what asked."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def algorithms() -> dict[str, type[AbstractAgent]]:
    """The agents of `eqgen.algorithms` by name ("som" for `SOM`): every final class in a module there."""
    found = {}
    for info in pkgutil.iter_modules(algorithms_package.__path__):
        module = importlib.import_module(f"{algorithms_package.__name__}.{info.name}")
        for cls in vars(module).values():
            is_agent = inspect.isclass(cls) and issubclass(cls, AbstractAgent)
            if is_agent and not inspect.isabstract(cls) and cls.__module__ == module.__name__:
                found[re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()] = cls
    return found


def algorithm(name: str) -> type[AbstractAgent]:
    """The agent class of that name."""
    found = algorithms()
    if name not in found:
        nearest = difflib.get_close_matches(name.lower(), found, n=3) or sorted(found)
        raise ExperimentError(f"There is no algorithm {name!r}. Did you mean {' or '.join(nearest)}?")
    return found[name]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run is of: agent, environment (by name), loop, seeds. `settings.json` is its JSON form."""

    agent: AbstractAgent
    env: str
    settings: OnlineSettings
    seeds: tuple[int, ...]
    tensorboard: bool = False

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "algorithm": type(self.agent).__name__,
            "env": self.env,
            "seeds": list(self.seeds),
            "tensorboard": self.tensorboard,
            "settings": dataclasses.asdict(self.settings),
            "agent": to_json(self.agent),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Experiment":
        """The experiment that `to_json` wrote down."""
        try:
            return cls(
                agent=from_json(content["agent"]),
                env=content["env"],
                settings=OnlineSettings(**content["settings"]),
                seeds=tuple(content["seeds"]),
                tensorboard=content["tensorboard"],
            )
        except (KeyError, TypeError, ValueError, HyperparametersError) as error:
            raise ExperimentError(f"settings.json cannot be used: {error}") from error

    def make_env(self) -> Any:
        """The environment; checks that agent and loop can be built for it."""
        try:
            env = catalog.make(self.env)
            self.settings.check(env)
            example = example_transition(env.obs_shape, env.action_dim)
            eqx.filter_eval_shape(self.agent.init, example, key=jr.key(0))
        except (ValueError, ImportError) as error:
            raise ExperimentError(str(error)) from error
        return env


def train(
    agent: AbstractAgent,
    env: str,
    settings: OnlineSettings,
    *,
    seeds: Sequence[int],
    out: str | Path,
    tensorboard: bool = False,
    verbose: bool = True,
) -> Run:
    """Trains from the beginning, into the new run directory `out`.

    **Arguments:**

    - `agent`, `settings`: hyperparameters of the algorithm and of the loop.
    - `env`: a name such as "gymnax/Pendulum-v1" (`eqgen.envs.catalog.available()` lists them).
    - `seeds`: one agent each, trained side by side.
    - `tensorboard`: also writes event files.
    - `verbose`: a progress bar on a terminal, and a line at every evaluation.

    **Returns:** the run, for reading: `train(...).curve("eval/return")`.

    **Raises:** `ExperimentError` when something does not fit or a metric is no longer finite; `RunError` when
    `out` is taken; `Interrupted` after an interrupt, once the state is saved.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ExperimentError(
            f"seeds are {list(seeds)}; one or more different ones are needed, none negative."
        )
    experiment = Experiment(agent, env, settings, tuple(seeds), tensorboard)
    content, built = experiment.to_json(), experiment.make_env()
    if env.startswith("mjx/") and jax.default_backend() == "cpu":
        same = env.replace("mjx/", "mujoco/")
        warnings.warn(
            f"{env} compiles for minutes and is slow on a CPU; {same} is the same task.", stacklevel=2
        )
    with Run.create(out, content) as run:
        _drive(run, experiment, built, state=None, metadata={}, verbose=verbose)
    return Run.open(out)


def resume(out: str | Path, *, verbose: bool = True) -> Run:
    """Goes on from the newest good checkpoint, exactly as if training had never stopped.

    Later log entries are dropped and written again. Without any checkpoint training begins anew; a complete
    run is left as it is.
    """
    with Run.open(out, write=True) as run:
        experiment = Experiment.from_json(run.settings)
        env = experiment.make_env()
        state, metadata = None, {}
        if run.checkpoints():
            state, metadata = _restore(run, experiment, env)
        if metadata.get("env_step") == experiment.settings.total_steps:
            if verbose:
                print(f"{run.path} is complete: all {experiment.settings.total_steps} steps are done.")
            return run
        run.rewind(metadata.get("env_step", -1))
        _drive(run, experiment, env, state, metadata, verbose)
    return Run.open(out)


def _restore(run, experiment, env):
    like = init_online(experiment.agent, env, experiment.settings, seeds=experiment.seeds)
    return run.restore(like)


def _drive(run, experiment, env, state, metadata, verbose):
    """The loop around the generator: log, save, report, until the end or an interrupt."""
    settings, first = experiment.settings, metadata.get("env_step", 0)
    total, saved = settings.total_steps, metadata.get("env_step")
    if verbose:
        print(_headline(run, experiment, saved), flush=True)
    with ExitStack() as stack:
        sinks = [run]
        if experiment.tensorboard:
            sinks.append(stack.enter_context(closing(TensorBoard(run.path, -1 if saved is None else saved))))
        hidden = None if verbose else True  # None: hidden unless on a terminal
        bar = stack.enter_context(tqdm(total=total, initial=first, unit="step", disable=hidden))
        stop = stack.enter_context(_StopOnSignal())
        steps = train_online(experiment.agent, env, settings, seeds=experiment.seeds, state=state)
        stack.enter_context(closing(steps))
        try:
            for progress in steps:
                step = progress.env_step
                for record in progress.records:
                    record["wall_time"] += metadata.get("wall_time", 0.0)
                _check_finite(progress)
                for sink in sinks:
                    sink.log(progress.records)
                _report(bar, progress, verbose)
                due = step > 0 and settings.checkpoint_every and step % settings.checkpoint_every == 0
                if due or step == total or stop.signal:
                    run.save_checkpoint(progress.state, step, wall_time=progress.records[0]["wall_time"])
                    saved = step
                if stop.signal and step < total:
                    raise Interrupted(f"Saved step {step}. Go on with: eqgen resume {run.path}", stop.signal)
        except NonFiniteError as error:
            kept = (
                "No checkpoint had been saved" if saved is None else f"The checkpoint of step {saved} is kept"
            )
            raise ExperimentError(f"{error} Training has stopped. {kept} in {run.path}.") from error


class _StopOnSignal:
    """While entered, the first Ctrl-C or SIGTERM only sets `signal`; the second interrupts at once."""

    def __init__(self):
        self.signal = None
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        message = "Stopping when this chunk is done and saved. Again: stop at once."
        print(f"\n{message}", file=sys.stderr, flush=True)


def _check_finite(progress: Progress) -> None:
    """What the loop does not check itself: evaluation results, and the parameters about to be saved."""
    step = progress.env_step
    for record in progress.records:
        for name, value in record.items():
            if not all(math.isfinite(x) for x in np.ravel(value) if isinstance(x, float)):
                raise NonFiniteError(
                    f"The metric {name} of seed {record['seed']} is {value} at environment step {step}."
                )
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(progress.state.agent, eqx.is_inexact_array))
    finite = _finite_by_seed([leaf for _, leaf in leaves])
    for (path, _), good in zip(leaves, np.asarray(finite)):
        if not good.all():
            seed = progress.records[int(np.argmin(good))]["seed"]
            name = jax.tree_util.keystr(path)
            raise NonFiniteError(
                f"The array {name} of seed {seed} has NaN or infinite entries at environment step {step}."
            )


@jax.jit
def _finite_by_seed(leaves):
    return jnp.stack([jnp.all(jnp.isfinite(leaf.reshape(len(leaf), -1)), axis=1) for leaf in leaves])


def _headline(run, experiment, saved):
    seeds = experiment.seeds
    consecutive = len(seeds) > 2 and seeds == tuple(range(seeds[0], seeds[0] + len(seeds)))
    listed = f"{seeds[0]} to {seeds[-1]}" if consecutive else ", ".join(map(str, seeds))
    names = f"seed{'s' if len(seeds) > 1 else ''} {listed}"
    where = f"going on from step {saved} in" if saved is not None else "into"
    name, steps = type(experiment.agent).__name__, experiment.settings.total_steps
    return f"{name} on {experiment.env}, {names}, {steps} steps each, {where} {run.path}"


def _report(bar, progress, verbose):
    records = progress.records
    bar.update(progress.env_step - bar.n)
    latest = [record["train/return"] for record in records if record.get("train/return") is not None]
    if latest:
        bar.set_postfix({"return": f"{np.mean(latest):.1f}"})
    if verbose and "eval/return" in records[0]:
        returns = [record["eval/return"] for record in records]
        each = f"  ({', '.join(f'{x:.1f}' for x in returns)})" if len(returns) > 1 else ""
        bar.write(
            f"step {progress.env_step:>8}  updates {progress.num_updates:>8}  "
            f"{records[0]['wall_time']:7.1f} s  evaluation return {np.mean(returns):9.1f}{each}"
        )
        sys.stdout.flush()


def trained_policies(out: str | Path) -> tuple[Experiment, Any, list[Policy], int]:
    """The policies of a run at its newest good checkpoint.

    **Returns:** the experiment, its environment, for each seed the policy `(obs, key) -> action` that
    `act(..., explore=False)` is, and the environment step of the checkpoint.
    """
    run = Run.open(out)
    experiment = Experiment.from_json(run.settings)
    env = experiment.make_env()
    state, metadata = _restore(run, experiment, env)
    agents: OnlineState = state.agent
    policies = [greedy_policy(experiment.agent, seed_slice(agents, i)) for i in range(len(experiment.seeds))]
    return experiment, env, policies, metadata["env_step"]


def evaluate(out: str | Path, episodes: int = 20, *, seed: int = 0) -> dict[str, Any]:
    """Judges a run at its newest good checkpoint by the protocol of `eqgen.evaluation`.

    **Arguments:**

    - `episodes`: per trained seed.
    - `seed`: of the episodes. Every trained seed meets the same ones, so returns may be compared in pairs.

    **Returns:** what was evaluated and how, and per trained seed the mean, all returns and all lengths.
    """
    experiment, env, policies, env_step = trained_policies(out)
    results = []
    for trained_seed, policy in zip(experiment.seeds, policies):
        returns, lengths = rollout_returns(policy, env, episodes, key=jr.key(seed))
        returns, lengths = np.asarray(returns, float).tolist(), np.asarray(lengths).tolist()
        mean = float(np.mean(returns))
        results.append({"seed": trained_seed, "return": mean, "returns": returns, "lengths": lengths})
    return {
        "algorithm": type(experiment.agent).__name__,
        "env": experiment.env,
        "env_step": env_step,
        "policy": f"last parameters, {experiment.agent.evaluation_policy}",
        "episodes": episodes,
        "episode_seed": seed,
        "seeds": results,
    }


def plot(outs: Sequence[str | Path], path: str | Path, *, metric: str = "eval/return") -> list[Path]:
    """Draws `metric` over environment steps, one curve per run, and writes it as PNG and PDF.

    **Returns:** the files written.
    """
    from eqgen import plotting

    runs = [Run.open(out) for out in outs]
    experiments = [Experiment.from_json(run.settings) for run in runs]
    names = [type(experiment.agent).__name__ for experiment in experiments]
    same = len(set(names)) < len(names)
    with plotting.style():
        fig, ax = plotting.subplots()
        captions = []
        for run, name in zip(runs, names):
            steps, values = run.curve(metric)
            label = f"{name} ({run.path.name})" if same else name
            show_seeds = len(values) < 5  # too few for an interval to mean much
            captions.append(plotting.learning_curve(ax, steps, values, label=label, show_seeds=show_seeds))
        envs = ", ".join(sorted({experiment.env for experiment in experiments}))
        ax.set_title(f"{envs}\n{'; '.join(dict.fromkeys(captions))}", loc="left", fontsize=7)
        ax.legend()
        ax.set(xlabel="environment steps", ylabel=metric.replace("eval/return", "evaluation return"))
        return plotting.save(fig, path)


def render(
    out: str | Path,
    path: str | Path | None = None,
    *,
    trained_seed: int | None = None,
    episodes: int | None = None,
    seed: int = 0,
) -> tuple[Path, list[float]]:
    """Makes a clip of what a run's policy does at its newest good checkpoint.

    **Arguments:**

    - `path`: a GIF or MP4; `policy.gif` in the run if None.
    - `trained_seed`: whose policy; the first if None.
    - `episodes`, `seed`: how many (None: one, or enough actions of a bandit), and their seed.

    **Returns:** the file written and the return of each episode as far as it is shown.
    """
    from eqgen import rendering

    experiment, env, policies, _ = trained_policies(out)
    trained_seed = experiment.seeds[0] if trained_seed is None else trained_seed
    if trained_seed not in experiment.seeds:
        raise ExperimentError(
            f"{out} has no seed {trained_seed}; it has {', '.join(map(str, experiment.seeds))}."
        )
    policy = policies[experiment.seeds.index(trained_seed)]
    path = Path(path or Path(out) / "policy.gif")
    try:
        returns = rendering.render_policy(policy, env, path=path, key=jr.key(seed), num_episodes=episodes)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ExperimentError(str(error)) from error
    return path, returns
