"""Experiments on disk: settings that rebuild the agent, training that goes on as if it had never stopped."""

import dataclasses
import json
import os
import signal

import equinox as eqx
import numpy as np
import pytest

from eqgen import experiments, sessions
from eqgen.algorithms.sac import SAC
from eqgen.experiments import Experiment
from eqgen.hyperparameters import HyperparametersError, from_json, to_json
from eqgen.runs import Run, RunError
from eqgen.schedules import VPLinear
from eqgen.sessions import ExperimentError, Interrupted
from eqgen.training import OnlineSettings
from helpers import assert_trees_close


AGENT = SAC.tiny()
WITH_A_LIST = eqx.tree_at(lambda agent: agent.hidden, AGENT, [32], is_leaf=lambda x: type(x) is tuple)
ENV = "probe/both"
SETTINGS = OnlineSettings(
    total_steps=60,
    warmup_steps=20,
    batch_size=8,
    log_every=10,
    eval_every=30,
    eval_episodes=2,
    checkpoint_every=20,
)
SEEDS = (3, 4)


def train(out, **changes):
    arguments = {"agent": AGENT, "env": ENV, "settings": SETTINGS, "seeds": SEEDS, "verbose": False} | changes
    return experiments.train(out=out, **arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted."""
    return train(tmp_path_factory.mktemp("runs") / "whole")


def log_of(run):
    """The log without the one entry that depends on the clock."""
    return [{k: v for k, v in record.items() if k != "wall_time"} for record in run.metrics()]


def state_of(run):
    experiment = Experiment.from_json(run.settings)
    return experiments._restore(run, experiment, experiment.make_env())[0]


def assert_same_run(run, other):
    assert log_of(run) == log_of(other)
    assert_trees_close(state_of(run), state_of(other), rtol=0, atol=0)


def at_step(step, action):
    """A stand-in for `train_online` that does `action` with the progress at that step."""
    genuine = experiments.train_online

    def steps(*args, **kwargs):
        for progress in genuine(*args, **kwargs):
            yield (action(progress) or progress) if progress.env_step == step else progress

    return steps


# --- Hyperparameters ---


AGENTS = [
    (cls, profile, size)
    for cls in experiments.algorithms().values()
    for profile in cls.profiles()
    for size in cls.sizes
]


@pytest.mark.parametrize("cls, profile, size", AGENTS)
def test_agents_survive_json(cls, profile, size):
    agent = cls.profiles()[profile].resized(size)
    again = from_json(json.loads(json.dumps(to_json(agent), allow_nan=False)))
    assert again == agent and hash(again) == hash(agent)


def test_floats_survive_json_exactly():
    schedule = VPLinear(0.1 + 0.2, 1e-45)
    assert from_json(json.loads(json.dumps(to_json(schedule)))) == schedule


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "eqgen.runs.Run",
        "eqgen.cli.main",
        "eqgen.runs.os",
        "eqgen.experiments.SAC",
        "eqgen",
        "",
        None,
    ],
)
def test_only_modules_of_eqgen_are_built(name):
    with pytest.raises(HyperparametersError, match="is not a module"):
        from_json({"class": name, "fields": {}})


def test_fields_of_other_versions():
    content = to_json(AGENT)
    with pytest.raises(HyperparametersError, match="SAC has no field colour"):
        from_json(content | {"fields": content["fields"] | {"colour": 1}})
    less = {name: value for name, value in content["fields"].items() if name != "tau"}
    with pytest.warns(UserWarning, match="SAC: no tau"):
        assert from_json(content | {"fields": less}) == AGENT


def test_what_json_cannot_hold_is_named():
    with pytest.raises(HyperparametersError, match="SAC.hidden: a list has no exact form"):
        to_json(WITH_A_LIST)


def test_algorithm_names():
    assert experiments.algorithm("sac") is SAC
    with pytest.raises(ExperimentError, match="no algorithm 'sca'. Did you mean sac"):
        experiments.algorithm("sca")


# --- Training ---


def test_run_directory_holds_everything(finished):
    assert Experiment.from_json(finished.settings) == Experiment(AGENT, ENV, SETTINGS, SEEDS)
    logged = [(record["env_step"], record["seed"]) for record in finished.metrics()]
    assert logged == [(step, seed) for step in range(0, 61, 10) for seed in SEEDS]
    assert [path.name for path in finished.checkpoints()] == ["step_0000000060.eqx", "step_0000000040.eqx"]
    steps, values = finished.curve("eval/return")
    np.testing.assert_array_equal(steps, [0, 30, 60])
    assert values.shape == (2, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_goes_on_exactly(finished, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(experiments, "train_online", at_step(30, lambda _: os.kill(os.getpid(), number)))
        with pytest.raises(Interrupted, match="Saved step 30. Go on with: eqgen resume") as info:
            train(tmp_path / "x")
    assert info.value.signal == number
    run = Run.open(tmp_path / "x")
    assert [path.name for path in run.checkpoints()][0] == "step_0000000030.eqx"
    assert_same_run(experiments.resume(run.path, verbose=False), finished)


@pytest.mark.parametrize("step, first_kept", [(10, None), (50, 40)])
def test_killed_run_goes_on_exactly(finished, tmp_path, monkeypatch, step, first_kept):
    """The log is ahead of the checkpoint, or there is no checkpoint at all."""

    def die(_):
        raise SystemError

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "train_online", at_step(step + 10, die))
        with pytest.raises(SystemError):
            train(tmp_path / "x")
    run = Run.open(tmp_path / "x")
    assert run.metrics()[-1]["env_step"] == step
    assert (run.restore(state_of(finished))[1]["env_step"] if run.checkpoints() else None) == first_kept
    assert_same_run(experiments.resume(run.path, verbose=False), finished)
    assert all(np.diff([record["wall_time"] for record in run.metrics()[::2]]) > 0)


def test_damaged_checkpoint_costs_time_only(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(experiments, "train_online", at_step(40, lambda _: os.kill(os.getpid(), signal.SIGINT)))
        with pytest.raises(Interrupted):
            train(tmp_path / "x")
    newest = Run.open(tmp_path / "x").checkpoints()[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="Using the previous one, step_0000000020.eqx"):
        run = experiments.resume(tmp_path / "x", verbose=False)
    assert_same_run(run, finished)


def test_resuming_a_complete_run_changes_nothing(finished, capsys):
    before = finished.metrics()
    experiments.resume(finished.path)
    assert "is complete" in capsys.readouterr().out
    assert finished.metrics() == before


def spoil_metric(progress):
    progress.records[1]["critic/loss"] = float("nan")


def spoil_parameters(progress):
    where = lambda progress_state: progress_state.agent.log_temperature
    spoilt = where(progress.state).at[1].set(float("inf"))
    return dataclasses.replace(progress, state=eqx.tree_at(where, progress.state, spoilt))


@pytest.mark.parametrize(
    "spoil, what",
    [
        (spoil_metric, "The metric critic/loss of seed 4 is nan"),
        (spoil_parameters, "The array .log_temperature of seed 4 has NaN or infinite entries"),
    ],
)
def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch, spoil, what):
    monkeypatch.setattr(experiments, "train_online", at_step(40, spoil))
    with pytest.raises(
        ExperimentError, match=f"{what} at environment step 40.*The checkpoint of step 20 is kept"
    ):
        train(tmp_path / "x")
    run = Run.open(tmp_path / "x")
    assert [path.name for path in run.checkpoints()] == ["step_0000000020.eqx"]
    assert run.metrics()[-1]["env_step"] == 30


def test_bad_requests_leave_nothing_behind(finished, tmp_path):
    with pytest.raises(ExperimentError, match="no environment 'probe/bth'"):
        train(tmp_path / "x", env="probe/bth")
    for seeds in ((), (1, 1), (-1,)):
        with pytest.raises(ExperimentError, match="seeds are"):
            train(tmp_path / "x", seeds=seeds)
    with pytest.raises(HyperparametersError, match="SAC.hidden"):
        train(tmp_path / "x", agent=WITH_A_LIST)
    assert not (tmp_path / "x").exists()
    with pytest.raises(RunError, match="eqgen resume"):
        train(finished.path)


def test_settings_of_other_versions_are_refused(finished, tmp_path):
    content = finished.settings | {"settings": finished.settings["settings"] | {"colour": 1}}
    Run.create(tmp_path / "x", content).close()
    with pytest.raises(ExperimentError, match="settings.json cannot be used.*colour"):
        experiments.resume(tmp_path / "x")


def test_second_signal_interrupts_at_once(capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), sessions.StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        assert "Again: stop at once" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# --- What is done with a run ---


def test_evaluation_is_reproducible_and_says_what_it_is(finished):
    results = experiments.evaluate(finished.path, episodes=5)
    assert experiments.evaluate(finished.path, episodes=5) == results
    assert results["env_step"] == 60 and results["policy"] == f"last parameters, {AGENT.evaluation_policy}"
    for result, seed in zip(results["seeds"], SEEDS):
        assert result["seed"] == seed and len(result["returns"]) == len(result["lengths"]) == 5
        assert result["return"] == pytest.approx(np.mean(result["returns"]))
    fewer = experiments.evaluate(finished.path, episodes=2)
    assert fewer["seeds"][0]["returns"] == results["seeds"][0]["returns"][:2]
    json.dumps(results, allow_nan=False)


def test_plot_writes_both_formats(finished, tmp_path):
    paths = experiments.plot([finished.path, finished.path], tmp_path / "curve.png")
    assert sorted(path.name for path in paths) == ["curve.pdf", "curve.png"]
    with pytest.raises(RunError, match="no values of 'eval/retrun'"):
        experiments.plot([finished.path], tmp_path / "curve.png", metric="eval/retrun")


@pytest.mark.slow
def test_interrupted_run_on_the_host_goes_on_exactly(tmp_path, monkeypatch):
    """MuJoCo's simulators are restored from the checkpoint as well."""
    settings = dataclasses.replace(SETTINGS, num_envs=2)
    whole = train(tmp_path / "whole", env="mujoco/Hopper-v5", settings=settings)
    with monkeypatch.context() as patch:
        patch.setattr(experiments, "train_online", at_step(30, lambda _: os.kill(os.getpid(), signal.SIGINT)))
        with pytest.raises(Interrupted):
            train(tmp_path / "x", env="mujoco/Hopper-v5", settings=settings)
    assert_same_run(experiments.resume(tmp_path / "x", verbose=False), whole)


@pytest.mark.slow
def test_mjx_trains_with_advice_on_a_cpu(tmp_path):
    settings = dataclasses.replace(OnlineSettings.preset("smoke", "mjx/InvertedPendulum-v5"), eval_episodes=2)
    with pytest.warns(UserWarning, match="mujoco/InvertedPendulum-v5 is the same task"):
        run = experiments.train(
            SAC.tiny(), "mjx/InvertedPendulum-v5", settings, seeds=(0,), out=tmp_path / "run"
        )
    assert run.metrics()[-1]["env_step"] == settings.total_steps
