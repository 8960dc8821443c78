"""The command line: what its flags make of the defaults, and errors of one line."""

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys

import pytest

import eqgen
from eqgen import cli, experiments, sessions
from eqgen.algorithms.sac import SAC
from eqgen.algorithms.som import SOM
from eqgen.schedules import VPLinear
from eqgen.training import OnlineSettings


# The settings of test_experiments.py, so that nothing is compiled twice.
TINY = "--preset smoke --settings.total-steps 60 --settings.warmup-steps 20 --settings.batch-size 8 ".split()
TINY += "--settings.log-every 10 --settings.eval-every 30 --settings.checkpoint-every 20".split()


@pytest.fixture
def asked(monkeypatch):
    """Runs `eqgen train ...` without training; returns what would have been trained."""

    def ask(*arguments):
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(experiments, "train", lambda *args, **kwargs: calls.append((args, kwargs)))
            assert cli.main(["train", *arguments]) == 0
        ((agent, env, settings), options) = calls[0]
        return agent, env, settings, options

    return ask


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two seeds, made by the command."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", "sac", "--env", "probe/both", "--seeds", "2", "--out", str(out), *TINY]) == 0
    return out


@pytest.fixture(autouse=True)
def keep_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())


def refused(capsys, *arguments):
    """The one line of a command that fails."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("eqgen: ") and error.count("\n") == 1, error
    return error


# --- train: the order of defaults ---


def test_defaults_are_the_cpu_preset_of_the_environment(asked):
    agent, env, settings, options = asked("som", "--env", "gymnax/Pendulum-v1")
    assert agent == SOM().resized("cpu") and env == "gymnax/Pendulum-v1"
    assert settings == OnlineSettings.preset("cpu", env)
    assert list(options["seeds"]) == [0] and str(options["out"]) == "runs/som-gymnax-Pendulum-v1"
    settings = asked("sac", "--env", "mujoco/Hopper-v5")[2]
    assert settings == OnlineSettings.preset("cpu", "mujoco/Hopper-v5")


def test_defaults_of_an_on_policy_agent_are_a_preset_of_their_own(asked):
    agent, env, settings, _ = asked("ppo", "--env", "mujoco/Hopper-v5", "--settings.num-envs", "16")
    preset = OnlineSettings.preset("cpu", env, agent)
    assert settings == dataclasses.replace(preset, num_envs=16)
    assert settings.batch_size is None and settings.warmup_steps == 0


@pytest.mark.parametrize("profile", ["default", "paper", "safe"])
@pytest.mark.parametrize("preset", ["smoke", "cpu", "paper"])
def test_profile_then_preset_then_flags(asked, profile, preset):
    flags = f"--env toy/ring --profile {profile} --preset {preset} --agent.discount 0.9".split()
    agent, _, settings, _ = asked("som", *flags, "--settings.batch-size", "7")
    expected = SOM.profiles()[profile].resized(preset)
    assert agent.discount == 0.9 and settings.batch_size == 7
    assert agent.score_mode == expected.score_mode and agent.hidden == expected.hidden
    assert settings.total_steps == OnlineSettings.preset(preset, "toy/ring").total_steps


def test_nested_fields_are_flags(asked):
    flags = (
        "--env toy/ring --agent.noise-schedule.beta-max 10 --agent.hidden 8 16 --agent.no-noisy-target-action"
    )
    agent, *_ = asked("som", *flags.split(), "--agent.target", "ode")
    assert agent.noise_schedule == VPLinear(0.1, 10.0)
    assert agent.hidden == (8, 16) and agent.noisy_target_action is False and agent.target == "ode"


def test_seeds_follow_each_other(asked, tmp_path):
    *_, options = asked(
        "sac", "--env", "toy/ring", "--seeds", "3", "--seed-start", "5", "--out", str(tmp_path)
    )
    assert list(options["seeds"]) == [5, 6, 7] and options["out"] == tmp_path


def test_help_lists_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as info:
        cli.main("train som --preset smoke --help".split())
    out = " ".join(capsys.readouterr().out.split())
    assert info.value.code == 0
    assert "--agent.noise-schedule.beta-max" in out and "--settings.total-steps" in out
    assert "--agent.num-score-samples INT" in out and "(default: 8)" in out


@pytest.mark.parametrize(
    "flags",
    [
        ["--agent.discont", "0.9"],
        ["--settings.batch-size", "0"],
        ["--agent.target", "x"],
        ["--seeds", "two"],
        ["--preset"],
    ],
)
def test_bad_flags_exit_with_2(capsys, flags):
    with pytest.raises(SystemExit) as info:
        cli.main(["train", "som", "--env", "toy/ring", *flags])
    message = capsys.readouterr().err
    assert info.value.code == 2 and "Traceback" not in message
    assert flags[0].lstrip("-") in message or "batch_size is 0" in message


@pytest.mark.parametrize(
    "flags, message",
    [
        ("sac --env toy/ring --settings.acting overlap", "toy/ring.*Remedy: acting='lockstep'"),
        ("ppo --env toy/ring --settings.batch-size 64", "PPO is on-policy.*Remedy: batch_size=None"),
    ],
)
def test_a_loop_that_does_not_suit_environment_or_agent_is_refused_in_a_line(
    capsys, tmp_path, flags, message
):
    assert re.search(message, refused(capsys, "train", *flags.split(), "--out", str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


# --- The commands on a run ---


def test_run_is_what_was_asked_for(run):
    settings = json.loads((run / "settings.json").read_text())
    assert settings["env"] == "probe/both" and settings["seeds"] == [0, 1]
    assert experiments.Experiment.from_json(settings).agent == SAC().resized("smoke")


def test_evaluate_prints_and_writes_the_returns(run, capsys, tmp_path):
    assert cli.main(["evaluate", str(run), "--episodes", "3", "--json", str(tmp_path / "e.json")]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "e.json").read_text())
    assert "SAC on probe/both at step 60: last parameters, greedy" in out
    for result in results["seeds"]:
        assert f"seed {result['seed']}: mean return {result['return']:.1f} over 3 episodes" in out
        assert len(result["returns"]) == 3


def test_resume_of_a_complete_run_says_so(run, capsys):
    assert cli.main(["resume", str(run)]) == 0
    assert "is complete: all 60 steps" in capsys.readouterr().out


def test_damaged_checkpoint_is_one_line_on_the_way(run, capsys):
    newest = experiments.Run.open(run).checkpoints()[0]
    whole = newest.read_bytes()
    newest.write_bytes(whole[:500])
    try:
        assert cli.main(["evaluate", str(run), "--episodes", "2"]) == 0
        printed = capsys.readouterr()
        assert "at step 40" in printed.out
        assert printed.err.count("\n") == 1 and "Using the previous one, step_0000000040.eqx" in printed.err
    finally:
        newest.write_bytes(whole)


def test_plot_writes_beside_the_run(run, capsys):
    assert cli.main(["plot", str(run)]) == 0
    assert (run / "learning_curve.png").exists() and "learning_curve.png" in capsys.readouterr().out


def test_a_data_set_is_for_planners_only(run, capsys):
    said = refused(capsys, "resume", str(run), "--data", "moved.hdf5")
    assert said == "eqgen: --data is for planners; this run is of an agent.\n"


def test_render_writes_beside_the_run(run, capsys):
    assert cli.main(["render", str(run), "--trained-seed", "1"]) == 0
    assert (run / "policy.gif").read_bytes().startswith(b"GIF89a")
    assert "policy.gif  (return" in capsys.readouterr().out


def test_interrupt_has_its_exit_code(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise sessions.Interrupted("Saved step 30. Go on with: eqgen resume runs/x", 15)

    monkeypatch.setattr(experiments, "resume", interrupted)
    assert cli.main(["resume", "runs/x"]) == 143
    assert capsys.readouterr().err == "Saved step 30. Go on with: eqgen resume runs/x\n"


# --- data ---


def test_data_is_made_and_checked(capsys, tmp_path):
    out = tmp_path / "random.hdf5"
    arguments = ["data", "make", "random", "--env", "probe/both", "--size", "40", "--out", str(out)]
    assert cli.main(arguments) == 0
    assert f"{out}  (40 steps, " in capsys.readouterr().out
    assert cli.main(["data", "check", str(out)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["name"] == "eqgen/probe-both-random" and lines["steps"] == "40"
    assert "already exists" in refused(capsys, *arguments)


def test_data_mistakes_are_one_line(capsys, tmp_path):
    whole = tmp_path / "cut.hdf5"
    whole.write_bytes(b"\x89HDF\r\n\x1a\n and no more")
    assert "cut.hdf5 is damaged" in refused(capsys, "data", "check", str(whole))
    assert "No such file" in refused(capsys, "data", "check", str(tmp_path / "none.hdf5"))
    assert "There is no set 'maze2d-tiny'" in refused(capsys, "data", "make", "maze2d-tiny")
    assert "needs --run" in refused(capsys, "data", "make", "medium")
    assert "size is 0" in refused(capsys, "data", "make", "maze2d-umaze", "--size", "0")
    assert "written as .hdf5" in refused(capsys, "data", "make", "random", "--out", "x.npz")
    assert "has no action 'list'" in refused(capsys, "data", "list")


# --- Errors and help ---


def test_mistakes_are_one_line(run, capsys, tmp_path):
    assert "Did you mean train?" in refused(capsys, "trian")
    assert "Did you mean sac" in refused(capsys, "train", "sca", "--env", "toy/ring")
    assert "SAC has no preset 'smok'. Choose one of smoke" in refused(
        capsys, "train", "sac", "--preset", "smok"
    )
    assert "SAC has no profile 'safe'" in refused(capsys, "train", "sac", "--profile", "safe")
    assert "probe/both" in refused(capsys, "train", "sac", "--env", "probe/bth", "--out", str(tmp_path / "x"))
    again = refused(capsys, "train", "sac", "--env", "probe/both", "--out", str(run), *TINY)
    assert f"eqgen resume {run}" in again
    assert "has no seed 7; it has 0, 1" in refused(capsys, "render", str(run), "--trained-seed", "7")
    assert "x.png: a clip is written as .gif" in refused(
        capsys, "render", str(run), "--out", str(tmp_path / "x.png")
    )
    for command in ("resume", "evaluate", "plot", "render"):
        assert "is not a run" in refused(capsys, command, str(tmp_path / "nothing"))
    assert "no values of 'loss'" in refused(capsys, "plot", str(run), "--metric", "loss")


def test_a_folder_that_cannot_be_made_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    error = refused(
        capsys, "train", "sac", "--env", "probe/both", "--out", str(tmp_path / "file" / "x"), *TINY
    )
    assert "Not a directory" in error


def test_train_without_algorithm_names_them(capsys):
    assert cli.main(["train"]) == 2
    assert "sac, sdac, som" in capsys.readouterr().out
    assert cli.main(["train", "--help"]) == 0


def test_defects_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(experiments, "resume", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["resume", "runs/x"])


def test_list_names_algorithms_and_environments(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("som", "sac", "gymnax/Pendulum-v1", "mujoco/HalfCheetah-v5", "toy/ring")
    )


def test_help_does_not_load_jax():
    code = "import sys; from eqgen.cli import main; main(['--help']); assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(
        f"  {name} " in done.stdout
        for name in ("train", "resume", "evaluate", "plot", "render", "data", "list")
    )


def test_compilation_cache_is_in_the_user_folder_and_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    cli._use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path / "eqgen" / "jax"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    cli._use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def test_what_is_trained_from_python_only_says_so(capsys):
    assert cli.main(["train", "diffusion", "--data", "x"]) == 2
    assert "diffusion is trained from Python" in capsys.readouterr().err


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["eqgen", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("eqgen", run_name="__main__")
    assert stop.value.code == 0 and capsys.readouterr().out.strip() == eqgen.__version__
