"""Whole experiments on disk: train, go on, evaluate, plot; what command line and figure scripts call.

A run directory holds all seeds of one experiment (see `eqgen.runs`), and its `settings.json` all that it
takes to build the agent, the environment and the loop again. However training stops, it can go on (see
`eqgen.sessions`). Here is what is online; planners are `eqgen.planning`'s.
"""

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np

from eqgen import algorithms as algorithms_package
from eqgen.algorithms.base import AbstractAgent
from eqgen.envs import catalog
from eqgen.envs.base import example_transition
from eqgen.evaluation import Policy, rollout_returns
from eqgen.hyperparameters import HyperparametersError, build, from_json, to_json
from eqgen.runs import Run
from eqgen.sessions import ExperimentError, check_seeds, drive, name_seeds
from eqgen.training import (
    OnlineSettings,
    OnlineState,
    greedy_policy,
    init_online,
    seed_slice,
    train_online,
)


def algorithms(base: type = AbstractAgent) -> dict[str, type[Any]]:
    """The classes in `eqgen.algorithms` that can be used and derive from `base`, by name ("som" for `SOM`)."""
    found = {}
    for info in pkgutil.iter_modules(algorithms_package.__path__):
        module = importlib.import_module(f"{algorithms_package.__name__}.{info.name}")
        for cls in vars(module).values():
            fits = inspect.isclass(cls) and issubclass(cls, base) and not inspect.isabstract(cls)
            if fits and cls.__module__ == module.__name__:
                found[re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()] = cls
    return found


def algorithm(name: str, base: type = AbstractAgent) -> type[Any]:
    """The class of that name."""
    found = algorithms(base)
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
            found = {
                "agent": from_json(content["agent"]),
                "env": content["env"],
                "settings": build(OnlineSettings, content["settings"]),
                "seeds": tuple(content["seeds"]),
                "tensorboard": content["tensorboard"],
            }
            check_seeds((experiment := build(cls, found)).seeds)
            return experiment
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            HyperparametersError,
            ExperimentError,
        ) as error:
            raise ExperimentError(f"settings.json cannot be used: {error}") from error

    def make_env(self) -> Any:
        """The environment; checks that agent and loop can be built for it."""
        try:
            env = catalog.make(self.env)
            self.settings.check(env, self.agent)
            example = example_transition(env.obs_shape, env.action_dim)
            eqx.filter_eval_shape(self.agent.init, example, key=jr.key(0))
        except (ValueError, TypeError, ArithmeticError, ImportError) as error:
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
    experiment = Experiment(agent, env, settings, check_seeds(seeds), tensorboard)
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
    settings, saved = experiment.settings, metadata.get("env_step")
    if verbose:
        where = f"going on from step {saved} in" if saved is not None else "into"
        what = f"{type(experiment.agent).__name__} on {experiment.env}, {name_seeds(experiment.seeds)}"
        print(f"{what}, {settings.total_steps} steps each, {where} {run.path}", flush=True)
    drive(
        run,
        train_online(experiment.agent, env, settings, seeds=experiment.seeds, state=state),
        total=settings.total_steps,
        checkpoint_every=settings.checkpoint_every,
        metadata=metadata,
        parameters=lambda state: state.agent,
        summary=_summary,
        tensorboard=experiment.tensorboard,
        verbose=verbose,
    )


def _summary(records):
    latest = [record["train/return"] for record in records if record.get("train/return") is not None]
    beside = {"return": f"{np.mean(latest):.1f}"} if latest else {}
    if "eval/return" not in records[0]:
        return beside, None
    returns = [record["eval/return"] for record in records]
    each = f"  ({', '.join(f'{x:.1f}' for x in returns)})" if len(returns) > 1 else ""
    line = f"updates {records[0]['updates']:>8}  evaluation return {np.mean(returns):9.1f}{each}"
    return beside, line


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
        "step": env_step,
        "policy": f"last parameters, {experiment.agent.evaluation_policy}",
        "episodes": episodes,
        "episode_seed": seed,
        "seeds": results,
    }


def plot(outs: Sequence[str | Path], path: str | Path, *, metric: str | None = None) -> list[Path]:
    """Draws a metric over environment steps or updates, one curve per run, and writes it as PNG and PDF.

    **Arguments:** `metric`: None is the return of evaluation episodes, or a planner's first loss.

    **Returns:** the files written.

    **Raises:** `ExperimentError` for runs on different clocks.
    """
    from eqgen import plotting

    runs = [Run.open(out) for out in outs]
    if len(clocks := {run.clock for run in runs}) > 1:
        raise ExperimentError(
            "Environment steps and updates share no axis. Plot runs that learn online apart from others."
        )
    online = clocks == {"env_step"}
    metric = metric or ("eval/return" if online else first_loss(runs[0]) or "loss")
    names = [run.settings["algorithm"] for run in runs]
    same = len(set(names)) < len(names)
    with plotting.style():
        fig, ax = plotting.subplots()
        captions = []
        for run, name in zip(runs, names):
            steps, values = run.curve(metric)
            label = f"{name} ({run.path.name})" if same else name
            show_seeds = len(values) < 5  # too few for an interval to mean much
            captions.append(plotting.learning_curve(ax, steps, values, label=label, show_seeds=show_seeds))
        envs = ", ".join(sorted({run.settings["env"] for run in runs}))
        ax.set_title(f"{envs}\n{'; '.join(dict.fromkeys(captions))}", loc="left", fontsize=7)
        ax.legend()
        xlabel = "environment steps" if online else "updates"
        ax.set(xlabel=xlabel, ylabel=metric.replace("eval/return", "evaluation return"))
        return plotting.save(fig, path)


def first_loss(run: Run) -> str | None:
    """The name of the first loss that a run logs, as every learner of its kind does; None before any."""
    names = (name for record in run.metrics() for name in record)
    return next((name for name in names if name.endswith("loss")), None)


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
    experiment, env, policies, _ = trained_policies(out)
    policy = policies[seed_index(out, experiment.seeds, trained_seed)]
    return write_clip(policy, env, path or Path(out) / "policy.gif", episodes=episodes, seed=seed)


def seed_index(out: str | Path, seeds: Sequence[int], trained_seed: int | None) -> int:
    """Where a seed stands among those of a run; None is the first.

    **Raises:** `ExperimentError` when the run has no such seed.
    """
    if trained_seed is None:
        return 0
    if trained_seed not in seeds:
        raise ExperimentError(f"{out} has no seed {trained_seed}; it has {', '.join(map(str, seeds))}.")
    return seeds.index(trained_seed)


def write_clip(
    policy: Policy, env: Any, path: str | Path, *, episodes: int | None, seed: int
) -> tuple[Path, list[float]]:
    """What `render` does with a policy.

    **Raises:** `ExperimentError` when there is no way to draw the environment here, or to write such a file.
    """
    from eqgen import rendering

    path = Path(path)
    try:
        returns = rendering.render_policy(policy, env, path=path, key=jr.key(seed), num_episodes=episodes)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ExperimentError(str(error)) from error
    return path, returns
