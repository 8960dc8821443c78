"""Experiments with planners on disk: train on a set, go on, evaluate; what command line and figure scripts call.

A run directory is as online (`eqgen.runs`), its clock the updates. A planner is trained on a set; what is learned
on top of a trained one (Prior Guidance's prior, a MeanFlow planner) takes that from a run of its own, seed for
seed, and carries it in its checkpoints from then on.
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key, PyTree

from eqgen.algorithms.base import AbstractPlanLearner
from eqgen.algorithms.meanflow_planner import MeanFlowPlanner
from eqgen.algorithms.planner import DiffusionPlanner
from eqgen.algorithms.prior_guidance import PriorGuidance
from eqgen.data import formats
from eqgen.data.episodes import Episodes
from eqgen.data.normalizer import Normalizer
from eqgen.data.planning import Family, PlanningData, Plans, WindowSettings, family_of, planning_data
from eqgen.data.windows import Window
from eqgen.envs import catalog
from eqgen.envs.base import AbstractEnv
from eqgen.evaluation import rollout_returns, rollout_rewards
from eqgen.experiments import seed_index, write_clip
from eqgen.guidance import AbstractGuidance
from eqgen.hyperparameters import HyperparametersError, build, from_json, to_json
from eqgen.offline import OfflineSettings, OfflineState, init_offline, train_offline
from eqgen.runs import Run
from eqgen.sessions import ExperimentError, check_seeds, drive, name_seeds
from eqgen.training import seed_slice


# --- What a run is of ---


@dataclasses.dataclass(frozen=True)
class PlanningExperiment:
    """What a run is of: a learner, a set, its windows, the loop, seeds. `settings.json` is its JSON form."""

    learner: AbstractPlanLearner
    data: str
    """The path of the set."""
    windows: WindowSettings
    settings: OfflineSettings
    seeds: tuple[int, ...]
    env: str
    """The name of the environment in which it is judged."""
    checksum: str = ""
    """Of the set's content: a run goes on with the data that it began with. Empty in runs of early versions."""

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "algorithm": type(self.learner).__name__,
            "clock": "update",
            "env": self.env,
            "data": self.data,
            "checksum": self.checksum,
            "windows": dataclasses.asdict(self.windows),
            "seeds": list(self.seeds),
            "settings": dataclasses.asdict(self.settings),
            "learner": to_json(self.learner),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "PlanningExperiment":
        """The experiment that `to_json` wrote down."""
        try:
            found = {
                "learner": from_json(content["learner"]),
                "data": content["data"],
                "windows": build(WindowSettings, content["windows"]),
                "settings": build(OfflineSettings, content["settings"]),
                "seeds": tuple(content["seeds"]),
                "env": content["env"],
                "checksum": content.get("checksum", ""),
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


def is_planning(out: str | Path) -> bool:
    """Whether there is a run, and it is of a planner."""
    return Path(out, "settings.json").exists() and "windows" in Run.open(out).settings


def environment_of(name: str) -> str:
    """The environment that a set is of, by its name: "maze2d/large" of "maze2d-large-v1" and of ours.

    **Raises:** `ExperimentError` when the name tells none.
    """
    short = name.removeprefix("eqgen/")
    for maze in catalog.MAZE_NAMES:
        if short.startswith(f"maze2d-{maze}"):
            return f"maze2d/{maze}"
    for task in catalog.MUJOCO_IDS:
        if short.startswith(f"mujoco-{task}"):
            return f"mujoco/{task}"
        if short.startswith(f"{task.split('-')[0].lower()}-") and task.endswith("-v4"):
            return f"mujoco/{task}"
    raise ExperimentError(
        f"The name {name!r} tells no environment. Say which by --env (`eqgen list` shows them)."
    )


# --- Training ---


def train(
    learner: DiffusionPlanner,
    data: str | Path,
    settings: OfflineSettings,
    *,
    seeds: Sequence[int],
    out: str | Path,
    family: Family | None = None,
    horizon: int | None = None,
    stride: int | None = None,
    env: str | None = None,
    verbose: bool = True,
) -> Run:
    """Trains a diffusion planner on a set, into the new run directory `out`.

    **Arguments:**

    - `data`: a file or folder that `eqgen.data.formats` can read.
    - `family`: whose rules cut the windows; None: as the name of the set says.
    - `horizon`, `stride`: states of a plan, and steps from one to the next; None: the family's.
    - `env`: where it is to be judged; None: as the name of the set says.

    **Raises:** `DataError` about the set, `ExperimentError`, `RunError` and `Interrupted` as
    `eqgen.experiments.train`.
    """
    episodes = formats.load(data)[1]
    windows = WindowSettings.of(family or family_of(episodes.name), horizon=horizon, stride=stride)
    experiment = PlanningExperiment(
        learner,
        str(data),
        windows,
        settings,
        check_seeds(seeds),
        env or environment_of(episodes.name),
        _checksums(episodes)[0],
    )
    _make_env(experiment.env)
    begin = lambda data, example, normalizer: _begin_planner(experiment, example, normalizer)
    return _train(experiment, episodes, begin, out, verbose)


def train_on_planner(
    learner: PriorGuidance | MeanFlowPlanner,
    planner: str | Path,
    settings: OfflineSettings,
    *,
    out: str | Path,
    data: str | Path | None = None,
    verbose: bool = True,
) -> Run:
    """Trains what is learned on top of the planners of a run, into the new run directory `out`.

    **Arguments:**

    - `learner`: its field `planner` or `teacher` is replaced by what the run trained.
    - `planner`: the run; its set, windows and seeds are taken over.
    - `data`: where the set lies now, if it was moved.
    """
    base, state = trained(planner)
    field = "teacher" if isinstance(learner, MeanFlowPlanner) else "planner"
    if field == "teacher" and not isinstance(base.learner, DiffusionPlanner):
        raise ExperimentError(
            f"{planner} is a run of {type(base.learner).__name__}; a MeanFlow planner is taught by a "
            "diffusion planner."
        )
    learner = dataclasses.replace(learner, **{field: base.learner})
    experiment = dataclasses.replace(base, learner=learner, settings=settings, data=str(data or base.data))
    make = getattr(learner, f"from_{field}")
    begin = lambda *_: init_offline(make, state, seeds=base.seeds)
    episodes = _load(experiment.data, planner, "give the same command --data PATH")
    experiment = dataclasses.replace(experiment, checksum=_same_set(experiment, episodes, planner))
    return _train(experiment, episodes, begin, out, verbose)


def resume(out: str | Path, *, data: str | Path | None = None, verbose: bool = True) -> Run:
    """Goes on from the newest good checkpoint, exactly as if training had never stopped. Without any checkpoint a
    planner's training begins anew.

    **Arguments:** `data`: where the set lies now, if it was moved. The run does not note it.

    **Raises:** `ExperimentError` when the set is missing or no longer the same, or nothing had been saved yet of
    what is learned on top of a planner, which only a checkpoint holds.
    """
    with Run.open(out, write=True) as run:
        experiment = PlanningExperiment.from_json(run.settings)
        if not run.checkpoints() and not isinstance(experiment.learner, DiffusionPlanner):
            raise ExperimentError(
                f"{run.path} stopped before its first checkpoint. Remove it and train again."
            )
        experiment = dataclasses.replace(experiment, data=str(data or experiment.data))
        episodes = _load(experiment.data, run.path, f"go on with: eqgen resume {run.path} --data PATH")
        _same_set(experiment, episodes, run.path)
        batches, example, normalizer = _prepare(experiment, episodes)
        if not run.checkpoints():
            run.rewind(-1)
            state = _begin_planner(experiment, example, normalizer)
            _drive(run, experiment, batches, state, {}, verbose)
            return Run.open(out)
        state, metadata = run.restore(_skeleton(experiment, example))
        if metadata["update"] == experiment.learner.total_updates:
            if verbose:
                print(f"{run.path} is complete: all {metadata['update']} updates are done.")
            return run
        run.rewind(metadata["update"])
        _drive(run, experiment, batches, state, metadata, verbose)
    return Run.open(out)


def _begin_planner(experiment, example, normalizer):
    make = lambda key: experiment.learner.init(example, key=key, normalizer=normalizer)
    return init_offline(make, seeds=experiment.seeds)


def _train(experiment, episodes, begin, out, verbose):
    prepared = _prepare(experiment, episodes)
    with Run.create(out, experiment.to_json()) as run:
        _drive(run, experiment, prepared[0], begin(*prepared), {}, verbose)
    return Run.open(out)


def _prepare(
    experiment: PlanningExperiment, episodes: Episodes
) -> tuple[Plans | PlanningData, PyTree, Normalizer]:
    """What batches are drawn from, one example of a window, and the units of observations."""
    learner = experiment.learner
    is_planner = isinstance(learner, DiffusionPlanner)
    state_values = is_planner and learner.plan_value != "critic"
    data = planning_data(episodes, experiment.windows, state_values=state_values)
    example = data.plans.windows.take(data.plans.episodes, jnp.zeros((), jnp.int32))
    return (data if is_planner else data.plans), example, Normalizer.fit(episodes.observations)


def _skeleton(experiment, example):
    """Shapes of the state of a run; what a checkpoint is read into."""
    make = lambda: init_offline(lambda key: experiment.learner.init(example, key=key), seeds=experiment.seeds)
    return eqx.filter_eval_shape(make)


def _drive(run, experiment, data, state, metadata, verbose):
    learner, settings, saved = experiment.learner, experiment.settings, metadata.get("update")
    if verbose:
        where = f"going on from update {saved} in" if saved is not None else "into"
        what = f"{type(learner).__name__} on {experiment.data}, {name_seeds(experiment.seeds)}"
        print(f"{what}, {learner.total_updates} updates, {where} {run.path}", flush=True)
    drive(
        run,
        train_offline(learner, data, settings, seeds=experiment.seeds, state=state),
        total=learner.total_updates,
        checkpoint_every=settings.checkpoint_every,
        metadata=metadata,
        parameters=lambda state: state.learner,
        summary=_summary,
        tensorboard=False,
        verbose=verbose,
    )


def _summary(records):
    names = [name for name in records[0] if "/" in name]
    means = {name: float(np.mean([record[name] for record in records])) for name in names}
    return {}, "  ".join(f"{name} {value:.4g}" for name, value in means.items())


# --- The set of a run ---


def _load(data: str, run: str | Path, remedy: str) -> Episodes:
    """The set on which a run was trained, from where it is said to lie."""
    if not Path(data).exists():
        seen = "" if Path(data).is_absolute() else f", seen from {Path.cwd()}"
        raise ExperimentError(
            f"{data} does not exist{seen}: the set that {run} was trained on. If it was moved, {remedy}"
        )
    return formats.load(data)[1]


def _same_set(experiment: PlanningExperiment, episodes: Episodes, run: str | Path) -> str:
    """The set's checksum, if it is the set that a run was trained on; of an early run that cannot be told."""
    checksums = _checksums(episodes)
    if not experiment.checksum:
        warnings.warn(
            f"{run} is of an early version, which noted no checksum of its set. {experiment.data} is taken for it "
            "if its observations and actions are as long.",
            stacklevel=3,
        )
    elif experiment.checksum not in checksums:
        raise ExperimentError(
            f"{experiment.data} is not the set that {run} was trained on: its content has another checksum. Say "
            "by --data PATH where that set lies."
        )
    return checksums[0]


def _checksums(episodes: Episodes) -> tuple[str, str]:
    """Of all that windows are cut from; and as early versions had it, without where episodes end."""
    digest = hashlib.sha256()

    def update(*arrays):
        for array in arrays:
            if array is not None:
                digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()

    early = update(episodes.observations, episodes.actions, episodes.rewards)
    ends = episodes.terminated, episodes.truncated, episodes.starts, episodes.streams
    return update(*ends, episodes.final_observations), early


# --- Trained planners ---


def trained(out: str | Path) -> tuple[PlanningExperiment, PyTree]:
    """What a run of a planner trained, at its newest good checkpoint.

    **Returns:** the experiment, and the learner's state, whose arrays have a leading axis of seeds
    (`eqgen.training.seed_slice` takes one).
    """
    run = Run.open(out)
    if not is_planning(out):
        raise ExperimentError(f"{out} is no run of a planner but of {run.settings.get('algorithm')}.")
    experiment = PlanningExperiment.from_json(run.settings)
    env = _make_env(experiment.env)
    obs, action = int(np.prod(env.obs_shape)), env.action_dim
    state: OfflineState = run.restore(_skeleton(experiment, _example(experiment.windows, obs, action)))[0]
    return experiment, state.learner


def evaluate(
    out: str | Path,
    episodes: int = 100,
    *,
    guidance: AbstractGuidance | None = None,
    replan_every: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Judges the planners of a run in its environment.

    **Arguments:**

    - `episodes`: per trained seed; all beside each other.
    - `guidance`: how plans are made; None: as the run's learner says.
    - `replan_every`: steps for which a plan is followed, at most its stride: the state aimed at stays the plan's
        second.
    - `seed`: of the episodes. Every trained seed and every scheme meets the same first states.

    **Returns:** what was evaluated and how, and per trained seed the returns, and for environments in JAX whose
    reward is 1 at a goal and 0 elsewhere also the steps to it (None where it was not reached).
    """
    experiment, states = trained(out)
    step = int(np.max(jax.tree.leaves(states.step)))
    env, learner = _make_env(experiment.env), experiment.learner
    guidance = guidance or learner.guidance
    if episodes < 1:
        raise ExperimentError(f"episodes is {episodes}; at least one is needed.")
    if not 1 <= replan_every <= experiment.windows.stride:
        raise ExperimentError(
            f"replan_every is {replan_every}; a plan's second state is {experiment.windows.stride} steps away, so "
            f"1 to {experiment.windows.stride} can be chosen."
        )
    if not isinstance(env, AbstractEnv) and replan_every != 1:
        raise ExperimentError(f"In {experiment.env}, which runs on the host, planners plan at every step.")
    results = []
    for i, trained_seed in enumerate(experiment.seeds):
        policy = PlannerPolicy(learner, seed_slice(states, i), guidance)
        result = {"seed": trained_seed}
        if isinstance(env, AbstractEnv):
            rewards = rollout_rewards(
                policy.plan, policy.act, env, episodes, replan_every=replan_every, key=jr.key(seed)
            )
            result |= goal_outcomes(np.asarray(rewards))
        else:
            returns, lengths = rollout_returns(policy, env, episodes, key=jr.key(seed))
            result |= {
                "returns": np.asarray(returns, float).tolist(),
                "lengths": np.asarray(lengths).tolist(),
            }
        results.append(result | {"return": float(np.mean(result["returns"]))})
    return {
        "algorithm": type(learner).__name__,
        "env": experiment.env,
        "step": step,
        "policy": f"plans by {type(guidance).__name__}, made every {replan_every} steps",
        "guidance": to_json(guidance),
        "replan_every": replan_every,
        "episodes": episodes,
        "episode_seed": seed,
        "seeds": results,
    }


def render(
    out: str | Path,
    path: str | Path | None = None,
    *,
    trained_seed: int | None = None,
    episodes: int | None = None,
    guidance: AbstractGuidance | None = None,
    seed: int = 0,
) -> tuple[Path, list[float]]:
    """Makes a clip of what a run's planner does, with a new plan at every step.

    **Arguments:** as `eqgen.experiments.render`, and `guidance`: how plans are made; None: as the learner says.

    **Returns:** the file written and the return of each episode as far as it is shown.
    """
    experiment, states = trained(out)
    index = seed_index(out, experiment.seeds, trained_seed)
    learner = experiment.learner
    policy = PlannerPolicy(learner, seed_slice(states, index), guidance or learner.guidance)
    path = path or Path(out) / "policy.gif"
    return write_clip(policy, _make_env(experiment.env), path, episodes=episodes, seed=seed)


class PlannerPolicy(eqx.Module):
    """A trained planner of one seed as a policy, `(obs, key) -> action`, and as the two halves of one."""

    planner: AbstractPlanLearner
    state: PyTree
    guidance: AbstractGuidance

    def __call__(self, obs: Array, key: Key[Array, ""]) -> Array:
        """The action of a new plan."""
        plan_key, action_key = jr.split(key)
        return self.act(self.plan(obs, plan_key), 0, obs, action_key)

    def plan(self, obs: Array, key: Key[Array, ""]) -> Array:
        """A plan, as z-scores."""
        return self.planner.plan(self.state, obs, key=key, guidance=self.guidance)

    def act(self, plan: Array, step: Any, obs: Array, key: Key[Array, ""]) -> Array:
        """The action towards the plan's second state."""
        return self.planner.action_towards(self.state, self.state.normalizer(obs), plan[1], key=key)


def goal_outcomes(rewards: np.ndarray) -> dict[str, list]:
    """What episodes came to whose reward is 1 at a goal and 0 elsewhere.

    **Arguments:** `rewards`, (episodes, steps).

    **Returns:** for each episode the return; the return if the goal, once reached, counted for all that follows, as
    Prior Guidance's code has it ("latched"); and the step at which it was first reached, or None.
    """
    reached = rewards > 0
    first = [int(np.argmax(row)) if row.any() else None for row in reached]
    return {
        "returns": rewards.sum(axis=1).astype(float).tolist(),
        "latched": [0.0 if step is None else float(rewards.shape[1] - step) for step in first],
        "steps_to_goal": [None if step is None else step + 1 for step in first],
    }


def _make_env(name):
    try:
        return catalog.make(name)
    except (ValueError, ImportError) as error:
        raise ExperimentError(str(error)) from error


def _example(windows, obs_size, action_size):
    shape = lambda *sizes: jnp.zeros(sizes)
    return Window(shape(windows.horizon, obs_size), shape(windows.horizon, action_size), shape(), shape())
