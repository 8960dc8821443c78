"""Benchmarks: every algorithm on every task of a suite under one protocol.

    OUT/rows/<algorithm>_<env>.json    one row: settings, versions, hardware, evaluations, returns, costs
    OUT/runs/<algorithm>_<env>/        the run behind it, all seeds side by side
    OUT/table.md, table.json           what the rows say together; OUT/curves.pdf, curves.png: the learning curves

A row is "open" until its run ends, then "finished" or, if a seed diverged, "failed", with the error and what had
been evaluated by then. The same command goes on with a suite that was interrupted; with more algorithms or tasks it
does what is missing. To try a failed row again, delete it and its run. What is made of
rows, `eqgen.comparison` says.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax
import jax.random as jr
import numpy as np

from eqgen import experiments, studies
from eqgen.algorithms.base import AbstractAgent, AbstractOnPolicyAgent, Size
from eqgen.comparison import Row, final_returns, read_rows, write_table
from eqgen.costs import agent_costs, forget_peak_memory, peak_memory
from eqgen.envs import catalog
from eqgen.evaluation import rollout_returns
from eqgen.experiments import Experiment
from eqgen.files import write_json
from eqgen.runs import Run
from eqgen.sessions import ExperimentError, Interrupted, check_seeds, name_seeds
from eqgen.training import OnlineSettings


PRESETS = ("smoke", "cpu", "paper")


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks, and in what loop and agents differ from those of a preset."""

    envs: tuple[str, ...]
    loop: Mapping[Size, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Fields of `OnlineSettings`."""
    agent: Mapping[Size, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Fields of every agent that has them."""
    at_most: Mapping[Size, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    """Upper bounds on fields of every agent that has them."""

    def experiment(self, algorithm: str, env: str, preset: Size, seeds: Sequence[int]) -> Experiment:
        """What one row is of; `algorithm` is "som", or "som:paper" for another profile than the default."""
        name, _, profile = algorithm.partition(":")
        profiles = experiments.algorithm(name).profiles()
        _check_names(f"profile of {name}", [profile or "default"], profiles)
        agent = profiles[profile or "default"].resized(preset)
        own = {field.name: getattr(agent, field.name) for field in dataclasses.fields(agent)}
        fields = {name: value for name, value in self.agent.get(preset, {}).items() if name in own}
        bounds = self.at_most.get(preset, {}).items()
        fields |= {name: min(own[name], bound) for name, bound in bounds if name in own}
        agent = dataclasses.replace(agent, **fields)
        return Experiment(agent, env, self.settings(agent, env, preset), check_seeds(seeds))

    def settings(self, agent: AbstractAgent, env: str, preset: Size) -> OnlineSettings:
        """The loop. On-policy agents have as many steps as the others, and all else as in their own preset."""
        settings = dataclasses.replace(OnlineSettings.preset(preset, env), **self.loop.get(preset, {}))
        if not isinstance(agent, AbstractOnPolicyAgent):
            return settings
        shared = ("total_steps", "log_every", "eval_every", "eval_episodes", "checkpoint_every")
        own = OnlineSettings.preset(preset, env, agent)
        return dataclasses.replace(own, **{name: getattr(settings, name) for name in shared})


_CLASSIC = Suite(
    ("gymnax/Pendulum-v1", "gymnax/MountainCarContinuous-v0"),
    loop={"cpu": dict(total_steps=50_000, num_envs=5, checkpoint_every=10_000)},
    agent={"cpu": dict(hidden=(64, 64))},
    at_most={"cpu": dict(num_candidates=4, num_eval_candidates=4, num_particles=4)},
)
SUITES = {
    # At "cpu" one update per five steps, as in the common code of the diffusion-policy papers, of small networks.
    "gymnax": _CLASSIC,
    # Is a method slow to learn, or is it lost? Three updates where the suite above has one.
    "gymnax-dense": dataclasses.replace(
        _CLASSIC, loop={"cpu": {**_CLASSIC.loop["cpu"], "updates_per_iteration": 3}}
    ),
    "mujoco": Suite(
        tuple(f"mujoco/{task}-v5" for task in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid"))
    ),
}


def run_suite(
    suite: str,
    preset: str,
    algorithms: Sequence[str] = (),
    *,
    seeds: Sequence[int],
    out: str | Path,
    envs: Sequence[str] = (),
) -> list[Path]:
    """Runs what has no row yet, task by task, and writes the table after every row.

    **Arguments:**

    - `suite`, `preset`: one of `SUITES` and one of `PRESETS`.
    - `algorithms`: such as "som" or "som:paper"; all agents if there are none.
    - `seeds`: trained side by side, in one run, which fails as a whole if one of them diverges.
    - `envs`: some of the suite's tasks; all if there are none.

    **Returns:** the files of the table.

    **Raises:** `ExperimentError` for names that do not exist, and when `out` holds rows or runs of other settings;
    `Interrupted` after an interrupt, once the run under way is saved.
    """
    out = Path(out)
    plan = _plan(suite, preset, algorithms, seeds, envs, out)
    for path, (row, _) in plan.items():
        if not path.exists():
            write_json(path, row)
    for number, (path, (row, experiment)) in enumerate(plan.items(), 1):
        what = f"{row['algorithm']} on {row['env']}"
        print(f"[{number}/{len(plan)}] {what}: {row['status']}", flush=True)
        if row["status"] == "open":
            try:
                row = finish_row(row, experiment, out / "runs" / path.stem)
            except Interrupted as stop:
                message = f"{what} is saved. The same command goes on from there."
                raise Interrupted(message, stop.signal) from stop
            write_json(path, row)
            write_table(out)
    return write_table(out)


def _plan(suite, preset, algorithms, seeds, envs, out) -> dict[Path, tuple[Row, Experiment]]:
    """For each row that is asked for its file, the row as it is, and what to run; all that can be checked is."""
    _check_names("suite", [suite], SUITES)
    _check_names("preset", [preset], PRESETS)
    _check_names(f"task in suite {suite}", envs, SUITES[suite].envs)
    rows, plan = read_rows(out), {}
    for row in rows.values():
        held = row["suite"], row["preset"], tuple(row["settings"]["seeds"])
        if held != (suite, preset, tuple(seeds)):
            about = f"suite {held[0]}, preset {held[1]}, {name_seeds(held[2])}"
            raise ExperimentError(f"{out} holds rows of {about}. Choose another --out.")
    for env in dict.fromkeys(envs or SUITES[suite].envs):
        for algorithm in dict.fromkeys(algorithms or experiments.algorithms()):
            experiment = SUITES[suite].experiment(algorithm, env, preset, seeds)
            settings = json.loads(json.dumps(experiment.to_json()))
            name = f"{algorithm}_{env}".translate(str.maketrans("/:", "--"))
            path, run = out / "rows" / f"{name}.json", out / "runs" / name
            names = dict(suite=suite, preset=preset, algorithm=algorithm, env=env)
            row = rows.get(path, names | {"status": "open", "settings": settings})
            _check_settings(path, row["settings"], settings)
            if _is_run(run):
                _check_settings(run, Run.open(run).settings, settings)
            if row["status"] == "open":
                experiment.make_env()
            plan[path] = row, experiment
    return plan


def _check_names(kind, names, known):
    for name in names:
        if name not in known:
            raise ExperimentError(f"There is no {kind} {name!r}. Choose from {', '.join(known)}.")


def _check_settings(path, found, asked):
    if differing := [name for name in asked if found.get(name) != asked[name]]:
        raise ExperimentError(
            f"{path} is of another {', '.join(differing)} than this version of eqgen would now take. "
            "Choose another --out, or delete that row and its run."
        )


def _is_run(path):
    return (path / "settings.json").exists()


def finish_row(row: Row, experiment: Experiment, out: Path) -> Row:
    """Trains in the run directory `out`, or goes on there.

    **Returns:** the row with what a result file of `eqgen.studies` holds, and, if all went well, `final_return` by
    seed, `train_seconds` of all seeds, `random_return` and its number of episodes, `eqgen.costs`; else the `error`.
    """
    forget_peak_memory()
    agent, settings, env = experiment.agent, experiment.settings, experiment.make_env()
    on_policy = isinstance(agent, AbstractOnPolicyAgent)
    batch = (agent.rollout_length, settings.num_envs) if on_policy else (settings.batch_size,)
    try:
        if _is_run(out):
            run = experiments.resume(out)
        else:
            run = experiments.train(agent, row["env"], settings, seeds=experiment.seeds, out=out)
        costs = peak_memory() | agent_costs(
            agent, env.obs_shape, env.action_dim, *cast(tuple[int, ...], batch)
        )
    except (ExperimentError, jax.errors.JaxRuntimeError) as error:  # diverged, or out of the device's memory
        print(f"failed: {error}", file=sys.stderr)
        message = str(error).replace(str(out), f"runs/{out.name}")  # the folder may be moved
        return row | studies.result(Run.open(out)) | {"status": "failed", "error": message}
    episodes = 10 * settings.eval_episodes
    measured = {
        "status": "finished",
        "final_return": final_returns(*run.curve("eval/return"), settings.total_steps),
        "train_seconds": run.metrics()[-1]["wall_time"],
        "random_return": random_return(row["env"], episodes),
        "random_episodes": episodes,
    }
    return row | studies.result(run) | measured | costs


@cache
def random_return(env: str, episodes: int) -> float:
    """The mean return of the uniform policy, over the same episodes at every call."""
    made = catalog.make(env)
    policy = eqx.Partial(_uniform_action, made.action_dim)
    return float(np.mean(rollout_returns(policy, made, episodes, key=jr.key(0))[0]))


def _uniform_action(action_dim, obs, key):
    return jr.uniform(key, (action_dim,), minval=-1.0, maxval=1.0)
