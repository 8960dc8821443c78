"""Planners on disk: sets, runs, what is learned on top, and how they are judged."""

import dataclasses
import hashlib
import json
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen import cli, planning
from eqgen.algorithms.meanflow_planner import MeanFlowPlanner
from eqgen.algorithms.planner import DiffusionPlanner
from eqgen.algorithms.prior_guidance import PriorGuidance
from eqgen.data import d4rl
from eqgen.data.episodes import DataError
from eqgen.data.mazes import collect_maze2d
from eqgen.data.planning import WindowSettings, family_of, planning_data
from eqgen.envs.base import AbstractEnv
from eqgen.envs.maze import MAZES
from eqgen.evaluation import rollout_rewards
from eqgen.guidance import CFG, CG, MCSS, Prior, Unconditional, scheme
from eqgen.offline import OfflineSettings
from eqgen.planning import PlanningExperiment, environment_of, goal_outcomes
from eqgen.runs import Run
from eqgen.sessions import ExperimentError
from eqgen.training import seed_slice
from eqgen.types import TimeStep
from helpers import assert_trees_close


WINDOWS = WindowSettings("maze2d", 4, 15)
SETTINGS = OfflineSettings(batch_size=8, log_every=2, checkpoint_every=2)
SHORT = dict(total_updates=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of a small set of umaze."""
    path = tmp_path_factory.mktemp("data") / "maze2d-umaze.hdf5"
    episodes, _ = collect_maze2d(MAZES["umaze"](), size=3000, stream_length=1000)
    d4rl.save(
        path, episodes=dataclasses.replace(episodes, name="eqgen/maze2d-umaze"), resets="never", settings={}
    )
    return path


@pytest.fixture(scope="module")
def planner(data, tmp_path_factory):
    """A finished run of a tiny planner, two seeds."""
    learner = dataclasses.replace(DiffusionPlanner.tiny(), **SHORT)
    out = tmp_path_factory.mktemp("runs") / "planner"
    return planning.train(learner, data, SETTINGS, seeds=(0, 3), out=out, horizon=4, verbose=False)


@pytest.fixture(scope="module")
def prior(planner, tmp_path_factory):
    """A finished run of Prior Guidance on it."""
    learner = dataclasses.replace(PriorGuidance.tiny(), **SHORT)
    out = tmp_path_factory.mktemp("runs") / "prior"
    return planning.train_on_planner(learner, planner.path, SETTINGS, out=out, verbose=False)


def log_of(run):
    return [{k: v for k, v in record.items() if k != "wall_time"} for record in run.metrics()]


# --- Training ---


def test_a_run_says_what_it_is_of(planner, data):
    experiment = PlanningExperiment.from_json(planner.settings)
    assert experiment.learner == dataclasses.replace(DiffusionPlanner.tiny(), **SHORT)
    assert (experiment.env, experiment.windows, experiment.seeds) == ("maze2d/umaze", WINDOWS, (0, 3))
    assert planner.clock == "update" and [r["update"] for r in planner.metrics()] == [2, 2, 4, 4]


def stopped(whole, out, **changes):
    """A copy of a run as if it had been stopped after the first of two checkpoints (the later one is damaged)."""
    for path in whole.path.rglob("*"):
        if path.is_file() and path.name != ".lock":
            (out / path.relative_to(whole.path)).parent.mkdir(exist_ok=True, parents=True)
            (out / path.relative_to(whole.path)).write_bytes(path.read_bytes())
    newest = Run.open(out).checkpoints()[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    settings = {name: value for name, value in (whole.settings | changes).items() if value is not None}
    (out / "settings.json").write_text(json.dumps(settings))
    return out


@pytest.mark.parametrize("which", ["planner", pytest.param("prior", marks=pytest.mark.slow)])
def test_resumed_runs_equal_whole_ones(which, request, tmp_path):
    whole = request.getfixturevalue(which)
    out = stopped(whole, tmp_path / "again")
    with pytest.warns(UserWarning, match="Using the previous one"):
        again = planning.resume(out, verbose=False)
    assert log_of(again) == log_of(whole)
    assert_trees_close(planning.trained(out)[1], planning.trained(whole.path)[1], rtol=0, atol=0)


def test_a_set_that_was_moved_is_asked_for_and_training_goes_on_with_it(
    planner, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = stopped(planner, tmp_path / "run", data="sets/gone.hdf5")
    assert cli.main(["resume", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"sets/gone.hdf5 does not exist, seen from {tmp_path}" in said
    assert f"eqgen resume {out} --data PATH" in said
    assert cli.main(["resume", str(out), "--data", str(data)]) == 0
    assert f"DiffusionPlanner on {data}" in capsys.readouterr().out
    assert log_of(Run.open(out)) == log_of(planner)
    with pytest.raises(ExperimentError, match="gone.hdf5 does not exist.*give the same command --data PATH"):
        planning.train_on_planner(PriorGuidance.tiny(), out, SETTINGS, out=tmp_path / "prior")
    assert not (tmp_path / "prior").exists()


def test_a_run_goes_on_only_with_the_set_that_it_began_with(planner, data, tmp_path):
    """Though observations, actions and rewards are the same: an episode ends elsewhere."""
    episodes = d4rl.load(data)
    ends = episodes.truncated.copy()
    ends[1] = True
    starts = np.unique([*episodes.starts, 2])
    other = dataclasses.replace(episodes, truncated=ends, starts=starts)
    d4rl.save(tmp_path / "maze2d-umaze.hdf5", episodes=other, resets="never", settings={})
    out = stopped(planner, tmp_path / "run")
    with pytest.raises(ExperimentError, match="is not the set that .*run was trained on.*--data PATH"):
        planning.resume(out, data=tmp_path / "maze2d-umaze.hdf5", verbose=False)


def test_sets_of_early_runs_are_known_by_what_was_noted_then(planner, data, tmp_path):
    """First a checksum of the arrays alone, before that none."""
    experiment = PlanningExperiment.from_json(planner.settings)
    episodes = d4rl.load(data)
    digest = hashlib.sha256()
    for array in (episodes.observations, episodes.actions, episodes.rewards):
        digest.update(np.ascontiguousarray(array).tobytes())
    assert experiment.checksum != digest.hexdigest()
    out = stopped(planner, tmp_path / "arrays", checksum=digest.hexdigest())
    with pytest.warns(UserWarning, match="Using the previous one"):
        assert log_of(planning.resume(out, verbose=False)) == log_of(planner)
    out = stopped(planner, tmp_path / "nothing", checksum=None)
    with pytest.warns(UserWarning) as warned:
        planning.resume(out, verbose=False)
    assert "noted no checksum" in str(warned[0].message)


def test_the_planner_below_stays_as_it_was_seed_for_seed(planner, prior):
    below, above = planning.trained(planner.path)[1], planning.trained(prior.path)[1]
    assert_trees_close(above.planner, below, rtol=0, atol=0)
    assert not eqx.tree_equal(seed_slice(above.prior, 0), seed_slice(above.prior, 1))


def test_a_set_that_changed_is_refused(planner, tmp_path):
    other = tmp_path / "maze2d-umaze.hdf5"
    episodes, _ = collect_maze2d(MAZES["umaze"](), size=3000, stream_length=1000, seed=1)
    d4rl.save(
        other, episodes=dataclasses.replace(episodes, name="eqgen/maze2d-umaze"), resets="never", settings={}
    )
    with pytest.raises(ExperimentError, match="not the set that .* was trained on"):
        planning.train_on_planner(
            PriorGuidance.tiny(), planner.path, SETTINGS, out=tmp_path / "out", data=other, verbose=False
        )
    assert not (tmp_path / "out").exists()


def test_a_meanflow_planner_needs_a_diffusion_planner(prior, tmp_path):
    with pytest.raises(ExperimentError, match="is a run of PriorGuidance; a MeanFlow planner is taught by"):
        planning.train_on_planner(MeanFlowPlanner.tiny(), prior.path, SETTINGS, out=tmp_path / "out")


@pytest.mark.slow
def test_priors_on_a_distilled_planner(planner, tmp_path):
    flow = dataclasses.replace(MeanFlowPlanner.tiny(), **SHORT)
    planning.train_on_planner(flow, planner.path, SETTINGS, out=tmp_path / "flow", verbose=False)
    learner = dataclasses.replace(PriorGuidance.tiny(), **SHORT)
    planning.train_on_planner(learner, tmp_path / "flow", SETTINGS, out=tmp_path / "prior", verbose=False)
    results = planning.evaluate(tmp_path / "prior", 2, replan_every=15)
    assert [len(result["returns"]) for result in results["seeds"]] == [2, 2]


# --- What was recorded ---

RESULTS = Path(__file__).parent.parent / "paper_figures" / "prior_guidance" / "results"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recorded_priors_beat_what_they_are_learned_on(seed):
    """T21, on the committed results of umaze: the share of 100 episodes that reach the goal."""
    rows = json.loads((RESULTS / f"umaze-cpu_seed{seed}.json").read_text())["rows"]

    def success(name):
        (outcome,) = rows[f"{name} 5"]["seeds"]
        return np.mean([step is not None for step in outcome["steps_to_goal"]])

    assert success("planner unconditional") <= 0.4 and success("pg-corrected prior") >= 0.9
    assert success("planner unconditional") < success("planner zero") <= success("pg-corrected prior")
    assert success("pg-corrected prior") >= success("planner mcss:50")


def test_recorded_priors_leave_further_the_less_that_costs():
    """T21: the divergence in the end falls with alpha, its weight."""
    runs = json.loads((RESULTS / "umaze-cpu_seed0_sweeps.json").read_text())["runs"]
    ends = {
        float(name.removeprefix("pg-alpha-")): run["records"][-1]["prior/divergence"]
        for name, run in runs.items()
        if name.startswith("pg-alpha-")
    }
    assert len(ends) == 6
    by_alpha = [ends[alpha] for alpha in sorted(ends)]
    assert all(a > b for a, b in zip(by_alpha, by_alpha[1:]))


# --- Judging ---


class Counter(AbstractEnv):
    """The reward is the action; ends after six steps, or when the action is negative."""

    name: str = "counter"
    obs_shape: tuple[int, ...] = (1,)
    action_dim: int = 1
    max_steps: int = 7

    def reset(self, *, key):
        return jnp.int32(0), jnp.zeros(1)

    def step(self, state, action, *, key):
        done = action[0] < 0
        return state + 1, TimeStep(jnp.full(1, state + 1.0), action[0], done, ~done & (state + 1 >= 7))


def test_plans_are_followed_for_as_long_as_asked():
    """The plan is the time at which it was made; the action tells it and the steps since."""
    rewards = rollout_rewards(
        lambda obs, key: obs[0],
        lambda plan, step, obs, key: jnp.stack([10 * plan + step]),
        Counter(),
        2,
        replan_every=3,
        key=jr.key(0),
    )
    np.testing.assert_array_equal(rewards, [[0, 1, 2, 30, 31, 32, 60]] * 2)


def test_nothing_is_rewarded_after_the_end():
    act = lambda plan, step, obs, key: 2.0 - obs
    rewards = rollout_rewards(lambda obs, key: obs, act, Counter(), 1, replan_every=2, key=jr.key(0))
    np.testing.assert_array_equal(rewards, [[2, 1, 0, -1, 0, 0, 0]])


def test_outcomes_of_goal_episodes():
    rewards = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]], float)
    assert goal_outcomes(rewards) == {
        "returns": [2.0, 0.0, 2.0],
        "latched": [3.0, 0.0, 4.0],
        "steps_to_goal": [2, None, 1],
    }


def test_schemes_and_seeds_meet_the_same_first_states(planner):
    once = planning.evaluate(planner.path, 3, guidance=Unconditional("zero"), replan_every=15)
    assert once == planning.evaluate(planner.path, 3, guidance=Unconditional("zero"), replan_every=15)
    assert once["step"] == 4 and [result["seed"] for result in once["seeds"]] == [0, 3]
    for result in once["seeds"]:
        assert len(result["returns"]) == 3 and result["return"] == np.mean(result["returns"])
        # A start at the goal is rewarded at once, whatever the planner does.
        assert [step == 1 for step in result["steps_to_goal"]] == [
            step == 1 for step in once["seeds"][0]["steps_to_goal"]
        ]


def test_plans_end_where_their_second_state_is(planner):
    with pytest.raises(ExperimentError, match="replan_every is 16.*1 to 15"):
        planning.evaluate(planner.path, 1, replan_every=16)


def test_nought_is_refused_and_not_taken_for_a_default(planner, data, tmp_path, capsys):
    for flags in (["--episodes", "0"], ["--replan-every", "0"]):
        assert cli.main(["evaluate", str(planner.path), *flags]) == 2
        assert " is 0" in capsys.readouterr().err
    for flags in (["--horizon", "0"], ["--stride", "0"]):
        assert (
            cli.main(
                ["train", "diffusion-planner", "--data", str(data), "--out", str(tmp_path / "x"), *flags]
            )
            == 2
        )
        assert " 0" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("unconditional", Unconditional()),
        ("held", Unconditional("held")),
        ("zero", Unconditional("zero")),
        ("mcss:16", MCSS(16)),
        ("mcss:16:0.5", MCSS(16, 0.5)),
        ("cg:0.3", CG(0.3)),
        ("cfg:1.5:0.9", CFG(1.5, 0.9)),
        ("prior", Prior()),
        ("prior-sampled", Prior(sample=True)),
    ],
)
def test_schemes_by_name(text, expected):
    assert scheme(text) == expected


@pytest.mark.parametrize(
    "text, says",
    [("msc", "no scheme 'msc'"), ("mcss:many", "mcss:NUM_CANDIDATES"), ("zero:1", "the form is zero")],
)
def test_schemes_that_are_not(text, says):
    with pytest.raises(ValueError, match=says):
        scheme(text)


# --- Sets ---


def test_names_tell_family_and_environment():
    assert (
        family_of("eqgen/maze2d-umaze") == "maze2d" and environment_of("eqgen/maze2d-umaze") == "maze2d/umaze"
    )
    assert environment_of("maze2d-large-v1") == "maze2d/large"
    assert (
        family_of("halfcheetah-medium-v2") == "mujoco"
        and environment_of("hopper-expert-v2") == "mujoco/Hopper-v4"
    )
    assert environment_of("eqgen/mujoco-HalfCheetah-v5-medium") == "mujoco/HalfCheetah-v5"
    with pytest.raises(DataError, match="tells no family"):
        family_of("mine")
    with pytest.raises(ExperimentError, match="tells no environment"):
        environment_of("mine")


def test_planning_data_draws_what_each_part_learns_from(data):
    episodes = d4rl.load(data)
    drawn = planning_data(episodes, WINDOWS, state_values=False).sample(64, key=jr.key(0))
    assert drawn.plans.states.shape == (64, 4, 4) and drawn.transitions is None
    assert float(jnp.min(drawn.plans.label)) >= -1 and bool(jnp.all(drawn.actions.label == 0))
    scaled = planning_data(episodes, WINDOWS, state_values=True)
    assert scaled.sample(8, key=jr.key(0)).transitions.reward.shape == (8,)
    assert scaled.transitions.episodes is scaled.plans.episodes is scaled.actions.episodes


# --- The command ---


def test_command_line(planner, capsys):
    assert cli.main(["resume", str(planner.path)]) == 0
    assert "is complete: all 4 updates" in capsys.readouterr().out
    assert (
        cli.main(
            ["evaluate", str(planner.path), "--episodes", "3", "--guidance", "zero", "--replan-every", "15"]
        )
        == 0
    )
    assert "DiffusionPlanner on maze2d/umaze at step 4: plans by Unconditional" in capsys.readouterr().out
    assert cli.main(["evaluate", str(planner.path), "--guidance", "best"]) == 2
    assert "no scheme 'best'" in capsys.readouterr().err
    assert cli.main(["plot", str(planner.path)]) == 0
    assert (planner.path / "learning_curve.png").exists()


def test_command_line_refuses_flags_of_what_is_trained_already(planner, capsys):
    flags = ["--planner", str(planner.path), "--learner.planner.width", "8", "--preset", "smoke"]
    assert cli.main(["train", "prior-guidance", *flags]) == 2
    assert "--learner.planner is what --planner trained" in capsys.readouterr().err


# --- Clips ---


@pytest.mark.slow
def test_a_planner_is_drawn_in_its_maze(planner, tmp_path, capsys):
    out = tmp_path / "clip.gif"
    command = ["render", str(planner.path), "--trained-seed", "3", "--guidance", "zero", "--out", str(out)]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith(f"{out}  (return ") and out.read_bytes()[:6] == b"GIF89a"


def test_clips_that_cannot_be_are_refused(planner, capsys):
    assert cli.main(["render", str(planner.path), "--trained-seed", "1"]) == 2
    assert "has no seed 1; it has 0, 3" in capsys.readouterr().err
    assert cli.main(["render", str(planner.path), "--guidance", "mcs:3"]) == 2
    assert "mcs" in capsys.readouterr().err
