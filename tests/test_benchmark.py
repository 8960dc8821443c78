"""Benchmarks: a suite from end to end by the command, its table against arithmetic by hand, costs."""

import json
import os
import signal
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen import benchmark, cli, comparison, experiments
from eqgen.algorithms.base import AbstractAgent
from eqgen.algorithms.ppo import PPO
from eqgen.algorithms.sac import SAC
from eqgen.algorithms.som import SOM
from eqgen.algorithms.td3 import TD3
from eqgen.benchmark import SUITES
from eqgen.costs import agent_costs, forget_peak_memory, num_learned, peak_memory, random_transitions
from eqgen.envs.base import example_transition
from eqgen.loops import NonFiniteError
from eqgen.runs import Run
from eqgen.training import OnlineSettings, train_online


ENV = "gymnax/Pendulum-v1"
ALGORITHMS = ("sac", "td3", "sac:broken")
BROKEN = SAC(hidden=(32, 32), discount=0.5)


def command(out, *flags, algorithms=ALGORITHMS):
    """The command line of the suite that is run here."""
    fixed = f"benchmark --suite gymnax --preset smoke --seeds 2 --seed-start 3 --envs {ENV} --out {out}"
    return [*fixed.split(), "--algorithms", *algorithms, *flags]


def train_with_accidents(agent, *args, **kwargs):
    """`train_online`, but `sac:broken` diverges at once, and a signal comes behind step 100 of TD3."""
    for progress in train_online(SAC().resized("smoke") if agent == BROKEN else agent, *args, **kwargs):
        yield progress
        if agent == BROKEN:
            raise NonFiniteError("The metric critic/loss of seed 3 is inf at environment step 100.")
        if isinstance(agent, TD3) and progress.step == 100 and kwargs["state"] is None:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """What is compiled is kept from row to row, and the broken agent has the program of the good one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        patch.setattr(benchmark, "forget_peak_memory", lambda: None)
        profiles = {"default": SAC(), "broken": BROKEN}
        patch.setattr(SAC, "profiles", classmethod(lambda cls: profiles))
        patch.setattr(experiments, "train_online", train_with_accidents)
        yield


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A suite that was interrupted in its second run, and then went on; what its first row was in between."""
    out = tmp_path_factory.mktemp("benchmark")
    assert cli.main(command(out)) == 128 + signal.SIGTERM
    rows = {row["algorithm"]: (path, row) for path, row in comparison.read_rows(out).items()}
    assert {name: row["status"] for name, (_, row) in rows.items()} == {
        "sac": "finished",
        "td3": "open",
        "sac:broken": "open",
    }
    assert "td3 on gymnax/Pendulum-v1: open" in (out / "table.md").read_text()
    first = rows["sac"][0]
    before = first.stat().st_mtime_ns, first.read_bytes()
    assert cli.main(command(out)) == 0
    return out, before


@pytest.fixture
def rows(suite):
    return {row["algorithm"]: row for row in comparison.read_rows(suite[0]).values()}


def refused(capsys, *arguments):
    """The one line of a command that fails."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("eqgen: ") and error.count("\n") == 1, error
    return error


# --- From end to end ---


def test_row_holds_what_was_run_on_what_and_how_it_went(suite, rows):
    row, run = rows["sac"], Run.open(suite[0] / "runs" / "sac_gymnax-Pendulum-v1")
    assert (row["suite"], row["preset"], row["env"], row["status"]) == ("gymnax", "smoke", ENV, "finished")
    assert row["settings"] == run.settings and row["settings"]["seeds"] == [3, 4]
    assert {"commit", "cpu", "packages"} <= row["provenance"][0].keys()
    assert [(record["env_step"], record["seed"]) for record in row["records"]] == [
        (step, seed) for step in (0, 300) for seed in (3, 4)
    ]
    # 300 is the only evaluation in the last tenth of 300 steps.
    assert row["final_return"] == [record["eval/return"] for record in row["records"][2:]]
    assert row["train_seconds"] == run.metrics()[-1]["wall_time"]
    assert row["random_episodes"] == 20 and row["random_return"] == rows["td3"]["random_return"]
    for name in ("update_cpu_ms", "action_cpu_ms", "compile_cpu_s", "parameters", "update_mb", "process_mb"):
        assert row[name] > 0, name


def test_interrupted_suite_goes_on_where_it_was(suite, rows):
    out, (when, content) = suite
    path = out / "rows" / "sac_gymnax-Pendulum-v1.json"
    assert (path.stat().st_mtime_ns, path.read_bytes()) == (when, content)
    assert len(rows["sac"]["provenance"]) == 1  # one session
    assert len(rows["td3"]["provenance"]) == 2
    steps = [record["env_step"] for record in Run.open(out / "runs" / "td3_gymnax-Pendulum-v1").metrics()]
    assert steps == [0, 0, 100, 100, 200, 200, 300, 300]


def test_diverged_run_is_a_row_and_is_reported(suite, rows):
    row, table = rows["sac:broken"], (suite[0] / "table.md").read_text()
    assert row["status"] == "failed" and "critic/loss of seed 3 is inf" in row["error"]
    assert row["error"].endswith("in runs/sac-broken_gymnax-Pendulum-v1.")
    assert [record["env_step"] for record in row["records"]] == [0, 0]
    assert "| sac:broken | failed | - |" in table
    assert f"- sac:broken on {ENV}: failed: {row['error']}" in table
    assert "| sac:broken | - | 0 of 1 |" in table


def test_second_call_runs_nothing_and_more_algorithms_only_what_is_missing(suite, monkeypatch):
    out, trained = suite[0], []
    files = [*(out / "rows").iterdir(), *(out / "runs").glob("*/*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    monkeypatch.setattr(benchmark, "finish_row", lambda row, *_: trained.append(row["algorithm"]) or row)
    assert cli.main(command(out)) == 0 and not trained
    assert cli.main(command(out, algorithms=("sac", "ppo"))) == 0 and trained == ["ppo"]
    assert {path: path.stat().st_mtime_ns for path in files} == before
    (out / "rows" / "ppo_gymnax-Pendulum-v1.json").unlink()


def test_table_is_made_again_from_the_rows(suite, capsys):
    written = [suite[0] / name for name in ("table.md", "table.json", "curves.pdf", "curves.png")]
    assert cli.main(["benchmark", "--table", str(suite[0])]) == 0
    before = {path: path.read_bytes() for path in written}
    for path in written:
        path.unlink()
    capsys.readouterr()
    assert cli.main(["benchmark", "--table", str(suite[0])]) == 0
    assert {path: path.read_bytes() for path in written} == before
    shown = capsys.readouterr().out
    assert shown.startswith("# Suite gymnax, preset smoke, seeds 3, 4") and str(written[3]) in shown


def test_mistakes_are_one_line_that_names_what_there_is(suite, capsys, tmp_path):
    start = ("benchmark", "--out", str(tmp_path / "x"), "--suite")
    assert "no suite 'gymnas'. Choose from gymnax, gymnax-dense, mujoco" in refused(capsys, *start, "gymnas")
    assert "Choose from smoke, cpu, paper" in refused(capsys, *start, "gymnax", "--preset", "big")
    assert f"Choose from {ENV}, gymnax/MountainCar" in refused(capsys, *start, "gymnax", "--envs", "Pendulum")
    assert "Did you mean sac" in refused(capsys, *start, "gymnax", "--algorithms", "sca")
    assert "no profile of td3 'x'. Choose from default" in refused(
        capsys, *start, "gymnax", "--algorithms", "td3:x"
    )
    assert "one or more" in refused(capsys, *start, "gymnax", "--seeds", "0")
    assert "needs --suite" in refused(capsys, "benchmark")
    assert "stands alone" in refused(capsys, "benchmark", "--table", str(suite[0]), "--seeds", "3")
    assert "no rows" in refused(capsys, "benchmark", "--table", str(tmp_path))
    assert not (tmp_path / "x").exists()


def test_folder_of_other_settings_is_refused(suite, capsys, monkeypatch):
    flags = command(suite[0])
    assert "of suite gymnax, preset smoke, seeds 3, 4. Choose another --out" in refused(
        capsys, *flags, "--seeds", "5"
    )
    other = benchmark.Suite(SUITES["gymnax"].envs, agent={"smoke": dict(discount=0.9)})
    monkeypatch.setitem(SUITES, "gymnax", other)
    assert "rows/sac_gymnax-Pendulum-v1.json is of another agent" in refused(capsys, *flags)


# --- What is run ---


def test_presets_of_the_suites():
    gymnax, mujoco = SUITES["gymnax"], SUITES["mujoco"]
    som = gymnax.experiment("som", ENV, "cpu", [0])
    assert (som.settings.total_steps, som.settings.num_envs, som.settings.warmup_steps) == (50_000, 5, 1_000)
    assert (som.settings.updates_per_iteration, som.settings.batch_size) == (1, 256)
    assert (som.settings.eval_every, som.settings.eval_episodes) == (5_000, 10)
    assert som.agent.hidden == (64, 64) and som.agent.num_candidates == 4
    assert gymnax.experiment("td3", ENV, "cpu", [0]).agent.num_candidates == 1
    paper = gymnax.experiment("som:paper", ENV, "cpu", [0]).agent
    assert paper.score_mode == SOM.paper().score_mode != som.agent.score_mode
    for preset in benchmark.PRESETS:
        plain = mujoco.experiment("sac", "mujoco/Hopper-v5", preset, [0])
        assert plain.agent == SAC().resized(preset)
        assert plain.settings == OnlineSettings.preset(preset, "mujoco/Hopper-v5")


def test_on_policy_agents_have_as_many_steps_and_evaluations():
    of = lambda name: SUITES["gymnax"].experiment(name, ENV, "cpu", [0]).settings
    own = OnlineSettings.preset("cpu", ENV, PPO())
    for name in ("total_steps", "eval_every", "eval_episodes"):
        assert getattr(of("ppo"), name) == getattr(of("sac"), name)
    for name in ("num_envs", "batch_size", "warmup_steps"):
        assert getattr(of("ppo"), name) == getattr(own, name)


def test_every_agent_can_be_run_by_every_preset():
    for suite in SUITES.values():
        for name in experiments.algorithms():
            for preset in benchmark.PRESETS:
                agent = suite.experiment(name, suite.envs[0], preset, [0])
                agent.settings.check(None, agent.agent)


def test_random_return_is_that_of_uniform_actions():
    """The probe has episodes of one step with the reward -(a - 1/2)^2, on average -(1/3 + 1/4)."""
    # Its standard deviation is 0.65, and that of the mean of 2000 of them 0.015.
    assert benchmark.random_return("probe/action", 2000) == pytest.approx(-7 / 12, abs=0.05)


# --- What is made of rows ---


def row_of(algorithm, env, final, random=0.0):
    settings = {"seeds": list(range(len(final))), "settings": {"total_steps": 100}}
    names = dict(suite="gymnax", preset="cpu", algorithm=algorithm, env=env, status="finished")
    return names | dict(settings=settings, final_return=list(final), random_return=random)


def test_scores_by_hand():
    rows = [
        row_of("a", "one", [-100.0, -300.0], random=-1200.0),
        row_of("b", "one", [-700.0, -700.0], random=-1200.0),
        row_of("a", "two", [5.0, 15.0], random=0.0),
        row_of("b", "two", [20.0, 60.0], random=0.0),
        row_of("c", "two", [0.0, 20.0], random=0.0),
        {"algorithm": "c", "env": "one", "status": "open"},
    ]
    summary = comparison.summarise(rows)
    one, two = summary["tasks"]["one"], summary["tasks"]["two"]
    assert (one["random"], one["best"], two["best"]) == (-1200.0, -200.0, 40.0)
    assert list(one["algorithms"]) == ["a", "b"] and list(two["algorithms"]) == ["b", "a", "c"]
    assert one["algorithms"]["a"]["scores"] == [1.1, 0.9]
    assert one["algorithms"]["b"] == {"mean": -700.0, "interval": (-700.0, -700.0), "scores": [0.5, 0.5]}
    assert two["algorithms"]["a"]["scores"] == [0.125, 0.375]
    assert two["algorithms"]["a"]["interval"] == (5.0, 15.0)  # of 2 draws from 2: a quarter of the mass each
    # a: the mean of .375 and .9, the middle half of its scores; b: that of .5, .5, .5, 1.5.
    assert list(summary["overall"]) == ["a", "b", "c"]
    assert summary["overall"]["a"]["iqm"] == pytest.approx(0.6375)
    assert summary["overall"]["b"]["iqm"] == pytest.approx(0.5)
    assert summary["overall"]["c"] is None


def test_without_anything_better_than_random_there_is_no_scale():
    summary = comparison.summarise([row_of("a", "one", [-3.0, -1.0], random=-2.0)])
    assert summary["tasks"]["one"]["algorithms"]["a"]["scores"] is None
    assert summary["tasks"]["one"]["algorithms"]["a"]["mean"] == -2.0
    assert summary["overall"] == {"a": None}


def test_table_agrees_with_rliable():
    library = pytest.importorskip("rliable.library")
    metrics = pytest.importorskip("rliable.metrics")
    rng = np.random.default_rng(0)
    returns = {name: rng.normal(loc, 30.0, size=(10, 3)) for name, loc in (("a", 400.0), ("b", 300.0))}
    rows = [
        row_of(name, env, table[:, i], random=50.0 * i)
        for name, table in returns.items()
        for i, env in enumerate(("x", "y", "z"))
    ]
    overall = comparison.summarise(rows)["overall"]
    random, best = 50.0 * np.arange(3), np.max([table.mean(0) for table in returns.values()], axis=0)
    scores = {name: (table - random) / (best - random) for name, table in returns.items()}
    aggregate = lambda table: np.array([metrics.aggregate_iqm(table)])
    state = np.random.RandomState(0)
    points, intervals = library.get_interval_estimates(scores, aggregate, reps=3000, random_state=state)
    for name, entry in overall.items():
        assert entry["iqm"] == pytest.approx(points[name][0])
        # Two Monte Carlo estimates of the same quantiles; each has a standard error of about 0.001.
        np.testing.assert_allclose(entry["interval"], intervals[name].ravel(), atol=0.006)


def test_final_return_is_over_the_last_tenth():
    returns = np.array([[0.0, 1.0, 2.0, 6.0], [9.0, 9.0, 4.0, 4.0]])
    assert comparison.final_returns(np.array([0, 89, 90, 100]), returns, 100) == [4.0, 4.0]


def test_damaged_row_is_named(tmp_path):
    Path(tmp_path, "rows").mkdir()
    Path(tmp_path, "rows", "x.json").write_text('{"env": ')
    with pytest.raises(experiments.ExperimentError, match="x.json is damaged"):
        comparison.read_rows(tmp_path)


# --- Costs ---


def test_costs_are_of_the_agent(rows):
    row, agent = rows["sac"], SAC().resized("smoke")
    state = eqx.filter_eval_shape(agent.init, example_transition((3,), 1), key=jr.key(0))
    size = lambda *trees: sum(x.size for x in jax.tree.leaves(trees) if isinstance(x, jax.ShapeDtypeStruct))
    learned = size(state.actor, state.critics) + 1  # and the temperature
    assert row["parameters"] == num_learned(state) == learned
    # Each parameter in 4 bytes, with Adam's two moments and a copy of the critics, before and after the update.
    floor = 2 * 4 * (3 * learned + size(state.target_critics)) / 1e6
    assert floor - 0.005 < row["update_mb"] < 20 * floor


def test_random_transitions_are_of_the_shapes_and_end_no_episode():
    batch = random_transitions(example_transition((3,), 2), (5, 4), key=jr.key(0))
    assert batch.obs.shape == (5, 4, 3) and batch.action.shape == (5, 4, 2) and batch.reward.shape == (5, 4)
    assert not (batch.terminated | batch.truncated).any()
    assert not np.array_equal(batch.obs, batch.next_obs) and np.abs(batch.obs).max() <= 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks cannot be reset here")
def test_peak_memory_can_be_forgotten():
    held = np.ones(40_000_000)  # 320 MB
    del held
    before = peak_memory()["process_mb"]
    forget_peak_memory()
    assert peak_memory()["process_mb"] < before - 200


class Still(AbstractAgent):
    """Neither moves nor learns, and compiles in no time."""

    sizes = {"smoke": {}}
    evaluation_policy = "none"

    def act(self, state, obs, *, key, explore):
        return jnp.zeros(state["action_size"].shape)

    def init(self, example, *, key):
        return {"action_size": jnp.zeros(example.action.shape)}

    def update(self, state, batch, *, key):
        return {"action_size": state["action_size"] + 1}, {"loss": jnp.mean(batch.reward)}


def test_a_device_that_does_not_tell_its_memory_leaves_a_dash(monkeypatch, rows, tmp_path):
    """JAX then says None, which must not cost the row of a run that took hours."""
    assert agent_costs(Still(), (3,), 1, 8, repeats=1)["update_mb"] is not None
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    assert agent_costs(Still(), (3,), 1, 8, repeats=1)["update_mb"] is None
    dashes = lambda row: comparison.markdown([row], comparison.summarise([row])).count("| - ")
    row = rows["sac"] | {"update_mb": None}
    assert dashes(row) == dashes(rows["sac"]) + 1
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "sac.json").write_text(json.dumps(row))
    assert list(comparison.read_rows(tmp_path).values()) == [row]
