"""Faults, tested by doing them: what is killed, full, read-only, broken, not a number, or run twice at once."""

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import equinox as eqx
import gymnasium
import h5py
import jax.numpy as jnp
import numpy as np
import pytest

from eqgen import checkpoint, cli, experiments, reporting
from eqgen.algorithms import sac
from eqgen.algorithms.sac import SAC
from eqgen.checkpoint import CheckpointError
from eqgen.data import d4rl, hdf5, images, ogbench
from eqgen.data.episodes import DataError
from eqgen.deployment import load_policy
from eqgen.files import DEEPEST, parse_json
from eqgen.hyperparameters import HyperparametersError, build
from eqgen.runs import Run, RunError
from eqgen.sessions import ExperimentError
from eqgen.sweeps import Sweep
from eqgen.training import OnlineSettings


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import faults
import fuzzing


SETTINGS = OnlineSettings(
    total_steps=60,
    warmup_steps=20,
    batch_size=8,
    log_every=10,
    eval_every=30,
    eval_episodes=2,
    checkpoint_every=20,
)


def train(out, env="probe/both", settings=SETTINGS):
    return experiments.train(SAC.tiny(), env, settings, seeds=(3,), out=out, verbose=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run leaves to which nothing happens."""
    return train(tmp_path_factory.mktemp("whole") / "run").path


def interpreter(code, *arguments, **options):
    """A process that runs this code, with the arguments in `sys.argv`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        **options,
    )


# --- Killed ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", faults.KINDS)
def test_killed_runs_go_on_to_the_same_end(kind, tmp_path):
    found = faults.campaign(kind, [signal.SIGKILL], 3, tmp_path, seed=1)
    assert found["signals"] >= 3 and found["lost"] == found["damaged"] == 0, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["online, JAX", "offline"])
def test_interrupted_commands_save_and_leave(kind, tmp_path):
    """By exit code 128 + the signal; before the command has begun, by the signal itself."""
    found = faults.campaign(kind, [signal.SIGINT, signal.SIGTERM], 3, tmp_path, seed=1)
    assert found["signals"] >= 3 and found["lost"] == found["half_written"] == 0, found
    assert found["exit_codes"].keys() <= {"SIGINT: 130", "SIGTERM: 143", "SIGINT: -2", "SIGTERM: -15"}


@pytest.mark.slow
def test_ctrl_c_in_the_middle_saves(tmp_path):
    kind, out = faults.KINDS["online, JAX"], tmp_path / "run"
    expected, seconds = faults.whole(kind, tmp_path)
    life = faults.Life(kind, out, tmp_path, random.Random(0), seconds)
    process = life.start()
    while process.poll() is None and len(list(out.glob("checkpoints/step_*"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert life.end(process) == 130
    assert "Stopping when this chunk is done" in life.noise and "Go on with: eqgen resume" in life.noise
    assert f"Saved step {int(max(out.glob('checkpoints/step_*.eqx')).stem[5:])}." in life.noise
    assert life.finish() and faults.contents(kind, out) == expected


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_workers(tmp_path):
    kind, out = faults.KINDS["sweep"], tmp_path / "out"
    life = faults.Life(kind, out, tmp_path, random.Random(0), 0.0)
    process = life.start()
    while process.poll() is None and not life._logged():
        time.sleep(0.01)
    workers = faults._children(process.pid)
    assert len(workers) == 2
    process.kill()
    life.end(process)
    deadline = time.monotonic() + 120
    alive = lambda pid: (
        Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
    )
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert life.finish()


@pytest.mark.slow
def test_two_sweeps_share_the_work(tmp_path):
    kind, out = faults.KINDS["sweep"], tmp_path / "out"
    expected, _ = faults.whole(kind, tmp_path)
    lives = [faults.Life(kind, out, tmp_path, random.Random(0), 0.0) for _ in range(2)]
    processes = [life.start() for life in lives]
    codes = [life.end(process) for life, process in zip(lives, processes)]
    assert codes == [0, 0], [life.noise for life in lives]
    assert faults.contents(kind, out) == expected


def test_what_a_killed_writer_left_half_written_is_removed(tmp_path):
    with Run.create(tmp_path / "run", {"a": 1}) as run:
        run.save_checkpoint({"x": jnp.zeros(3)}, 5)
    left = [run.path / ".metrics.99.tmp.jsonl", run.path / "checkpoints" / ".step_0000000009.99.tmp.eqx"]
    other = run.path / ".learning_curve.99.tmp.png"  # of a process that draws it now, for all we know
    for path in (*left, other):
        path.write_text("half")
    Run.open(run.path)
    assert all(path.exists() for path in left)
    Run.open(run.path, write=True).close()
    assert not any(path.exists() for path in left) and other.exists() and len(run.checkpoints()) == 1


def test_a_run_whose_making_was_cut_short_is_made_anew(tmp_path):
    (tmp_path / ".lock").write_text("99")
    (tmp_path / ".settings.99.tmp.json").write_text("{")
    Run.create(tmp_path, {"a": 1}).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", "metrics.jsonl", "provenance.json", "settings.json"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_planner_that_was_stopped_before_its_first_checkpoint_begins_anew(tmp_path):
    from eqgen import planning
    from eqgen.algorithms.planner import DiffusionPlanner
    from eqgen.offline import OfflineSettings

    data = tmp_path / "maze2d-umaze.hdf5"
    assert cli.main(["data", "make", "maze2d-umaze", "--size", "3000", "--out", str(data)]) == 0
    learner = dataclasses.replace(DiffusionPlanner.tiny(), total_updates=4)
    loop = OfflineSettings(batch_size=8, log_every=2, checkpoint_every=2)
    run = planning.train(learner, data, loop, seeds=(0,), out=tmp_path / "run", horizon=4, verbose=False)
    expected = faults.content_of(run.path)
    shutil.rmtree(run.path / "checkpoints")
    assert faults.content_of(planning.resume(run.path, verbose=False).path) == expected


# --- Two at once ---


HOLD = """
import sys, time
from eqgen.runs import Run
run = Run.open(sys.argv[1], write=True)
print("held", flush=True)
time.sleep(600)
"""


def test_a_run_that_another_process_writes_to_is_refused_until_that_is_killed(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    other = interpreter(HOLD, tmp_path / "run")
    try:
        assert other.stdout.readline() == "held\n"
        before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        assert cli.main(["resume", str(tmp_path / "run")]) == 2
        assert f"Another process (id {other.pid}) is writing to" in capsys.readouterr().err
        assert cli.main(["evaluate", str(tmp_path / "run"), "--episodes", "1"]) == 0  # reading is for all
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before and Run.is_busy(tmp_path / "run")
    finally:
        other.kill()
        other.communicate()
    assert not Run.is_busy(tmp_path / "run")
    assert cli.main(["resume", str(tmp_path / "run")]) == 0


RACE = """
import sys, pathlib
from eqgen.hyperparameters import HyperparametersError, build
from eqgen.runs import Run, RunError
print("ready", flush=True)
sys.stdin.readline()
for i in range(30):
    path = pathlib.Path(sys.argv[1], str(i))
    try:
        Run.create(path, {"winner": sys.argv[2]}).close()
        print(i, flush=True)
    except RunError as error:
        assert "already holds a run" in str(error) or "is writing to" in str(error), error
"""


def test_of_two_processes_that_make_one_run_one_does(tmp_path):
    racers = {name: interpreter(RACE, tmp_path, name, stdin=subprocess.PIPE) for name in "ab"}
    assert all(racer.stdout.readline() == "ready\n" for racer in racers.values())
    for racer in racers.values():
        racer.stdin.write("go\n")
        racer.stdin.flush()
    outcomes = {name: racer.communicate(timeout=120) for name, racer in racers.items()}
    assert not any(racer.returncode for racer in racers.values()), outcomes
    won = {name: set(map(int, out.split())) for name, (out, _) in outcomes.items()}
    assert won["a"] | won["b"] == set(range(30)) and not won["a"] & won["b"]
    for name, numbers in won.items():
        assert all(Run.open(tmp_path / str(i)).settings == {"winner": name} for i in numbers)


# --- Full and read-only disks ---


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, and a function that mounts it again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = lambda *arguments: (
        subprocess.run(["mount", *arguments, str(folder)], capture_output=True).returncode
    )
    if sys.platform != "linux" or mount("-t", "tmpfs", "-o", "size=8m", "tmpfs"):
        pytest.skip("mounting a file system takes Linux and root")
    try:
        yield folder, lambda options: mount("-o", f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, free):
    """Leaves so many bytes."""
    with open(folder / "filling", "wb") as file:
        stats = os.statvfs(folder)
        file.write(bytes(max(0, stats.f_bavail * stats.f_frsize - free)))


@pytest.mark.parametrize("free", [0, 4096, 12288, 24576, 49152])
def test_a_full_disk_costs_time_only(disk, whole, free):
    """Wherever the room ends: in settings, provenance, the log or a checkpoint."""
    folder, _ = disk
    fill(folder, free)
    with pytest.raises((CheckpointError, RunError, OSError), match="No space left on device") as info:
        train(folder / "run")
    assert str(folder / "run") in str(info.value)
    (folder / "filling").unlink()
    began = (folder / "run" / "settings.json").exists()
    run = experiments.resume(folder / "run", verbose=False) if began else train(folder / "run")
    assert faults.content_of(run.path) == faults.content_of(whole) and not faults.half_written(folder)


def test_a_full_disk_is_one_line(disk, capsys):
    folder, _ = disk
    fill(folder, 20_000)
    flags = "train sac --env probe/both --preset smoke --agent.hidden 8".split()
    assert cli.main([*flags, "--out", str(folder / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("eqgen: Could not write") and "Free some space" in error


def test_a_log_that_cannot_be_written_stays_whole(disk):
    folder, _ = disk
    with Run.create(folder / "run", {}) as run:
        run.log([{"seed": 0, "env_step": 0}])
        fill(folder, 0)
        with pytest.raises(RunError, match="No space left on device.*untouched.*eqgen resume"):
            run.log([{"seed": 0, "env_step": 1, "text": "x" * 10_000}])
        assert run.metrics() == [{"seed": 0, "env_step": 0}]
    assert (run.path / "metrics.jsonl").read_bytes().endswith(b"}\n") and not Run.is_busy(run.path)


def test_what_cannot_be_written_to_can_be_read(disk, whole, tmp_path, capsys):
    folder, again = disk
    shutil.copytree(whole, folder / "run")
    again("ro")
    assert cli.main(["evaluate", str(folder / "run"), "--episodes", "1"]) == 0
    assert cli.main(["watch", str(folder / "run"), "--once"]) == 0
    assert cli.main(["plot", str(folder / "run"), "--out", str(tmp_path / "curve.png")]) == 0
    capsys.readouterr()
    for command in (
        ["resume", str(folder / "run")],
        "train sac --env probe/both --preset smoke --out".split() + [str(folder / "new")],
        ["plot", str(folder / "run")],
    ):
        assert cli.main(command) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and "Read-only file system" in error[0] and str(folder) in error[0]
    again("rw")
    assert cli.main(["resume", str(folder / "run")]) == 0


# --- Clocks ---


def test_clocks_that_jump_change_nothing(whole, tmp_path, monkeypatch):
    """By a day, back and forth, at every look; and the machine sleeps for a week in the middle."""
    genuine, looks = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: genuine() + 86400 * (-1) ** next(looks))
    steady, asleep = time.perf_counter, [0]

    def after_sleep():
        asleep[0] += 1
        return steady() + (7 * 86400 if asleep[0] > 5 else 0)

    monkeypatch.setattr(time, "perf_counter", after_sleep)
    run = train(tmp_path / "run")
    assert faults.content_of(run.path) == faults.content_of(whole)
    assert all(np.diff([record["wall_time"] for record in run.metrics()]) > 0)
    for path in run.path.rglob("*"):
        os.utime(path, (1e9 * random.random(),) * 2)  # what is newest is told by its name
    assert experiments.evaluate(run.path, episodes=1)["env_step"] == 60


# --- What is not a number, and what raises ---

FAULT = {}
"""`kind`, and at which call of `step` or `reset` in this process; empty: the environment is in order."""


class Faulty(gymnasium.Env):
    """A point that is pushed about, until something goes wrong."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-2, 2, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=2).astype(np.float32)
        return self._observed("reset"), {}

    def step(self, action):
        self.state = np.float32(0.9) * self.state + np.float32(action)
        obs = self._observed("step")
        reward = {"reward": np.nan, "large reward": 1e3}.get(self.wrong, -float(self.state @ self.state))
        return obs, reward, False, False, {}

    def _observed(self, where):
        FAULT["calls"] = FAULT.get("calls", 0) + (where == "step")
        here = FAULT.get("where", "step") == where and FAULT.get("calls") >= FAULT.get("at", 10**9)
        self.wrong = FAULT["kind"] if here else None
        if self.wrong == "raises":
            raise ZeroDivisionError("the spring broke")
        return self.state * np.float32(np.nan if self.wrong == "observation" else 1)


gymnasium.register("eqgen-test/Faulty-v0", Faulty, max_episode_steps=7)
ENV = "gymnasium/eqgen-test/Faulty-v0"
HOST = dataclasses.replace(SETTINGS, eval_every=0)


@pytest.fixture(scope="module")
def whole_on_host(tmp_path_factory):
    FAULT.clear()
    return train(tmp_path_factory.mktemp("host") / "run", ENV, HOST).path


@pytest.fixture
def fault():
    FAULT.clear()
    yield FAULT.update
    FAULT.clear()


@pytest.mark.parametrize(
    "kind, where, at, message",
    [
        ("reward", "step", 15, "A reward of seed 3 was NaN or infinite at environment step 20"),
        ("observation", "reset", 44, "An observation of seed 3 was NaN or infinite and a reward"),
        (
            "raises",
            "step",
            45,
            r"Faulty-v0: environment 0 \(seed \d+\) raised ZeroDivisionError in step 3 of its",
        ),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("reward", "step", 45, "and a reward of seed 3 was NaN or infinite at environment step 50"),
                (
                    "observation",
                    "step",
                    15,
                    "An observation of seed 3 was NaN or infinite at environment step 20",
                ),
                ("raises", "reset", 44, "raised ZeroDivisionError as it was reset: the spring broke"),
            ]
        ),
    ],
)
def test_what_goes_wrong_in_an_environment_is_named_and_gone_on_from(
    fault, whole_on_host, tmp_path, kind, where, at, message
):
    fault({"kind": kind, "where": where, "at": at})
    kept = "No checkpoint had been saved" if at < 20 else "The checkpoint of step 40 is kept"
    with pytest.raises(ExperimentError, match=f"{message}.*Training has stopped. {kept} in") as info:
        train(tmp_path / "run", ENV, HOST)
    assert ("When it is mended, go on with: eqgen resume" in str(info.value)) == (kind == "raises")
    FAULT.clear()
    run = experiments.resume(tmp_path / "run", verbose=False)
    assert faults.content_of(run.path) == faults.content_of(whole_on_host)


def test_a_failing_environment_is_one_line_of_the_command_line(fault, whole_on_host, capsys):
    fault({"kind": "raises", "at": 3})
    assert cli.main(["evaluate", str(whole_on_host), "--episodes", "1"]) == 2
    assert "raised ZeroDivisionError" in capsys.readouterr().err


@eqx.filter_custom_vjp
def _poisoned(x, poison):
    return x


@_poisoned.def_fwd
def _forward(perturbed, x, poison):
    return x, poison


@_poisoned.def_bwd
def _backward(poison, grad, perturbed, x, _):
    return jnp.where(poison, jnp.nan, grad)


def test_a_gradient_that_is_no_number_is_found_before_anything_is_saved(fault, tmp_path, monkeypatch):
    """The loss stays finite; its gradient is NaN once a certain reward is in the batch."""
    genuine = sac.critic_loss

    def loss(critics, batch, target):
        value, metrics = genuine(critics, batch, target)
        return _poisoned(value, jnp.max(batch.reward) > 500), metrics

    with monkeypatch.context() as patch:
        patch.setattr(sac, "critic_loss", loss)
        fault({"kind": "large reward", "at": 48})
        settings = dataclasses.replace(HOST, log_every=1)
        message = (
            r"(has NaN or infinite|of seed 3 is nan).* at environment step \d+.*The checkpoint of step 40"
        )
        with pytest.raises(ExperimentError, match=message):
            train(tmp_path / "run", ENV, settings)
    FAULT.clear()
    assert [path.name for path in Run.open(tmp_path / "run").checkpoints()][0] == "step_0000000040.eqx"
    assert experiments.resume(tmp_path / "run", verbose=False).metrics()[-1]["env_step"] == 60


# --- Files of strangers ---


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    """The good file of each kind, made once."""
    made, folder = {}, tmp_path_factory.mktemp("good")

    def good(name):
        if name not in made:
            made[name] = folder / str(len(made))
            made[name].mkdir()
            fuzzing.READERS[name].make(made[name])
        return made[name]

    return good


LONG = ("policies", "reports about runs")  # to make one, or to draw the curves of one


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in fuzzing.READERS]
)
@pytest.mark.filterwarnings("ignore")
def test_broken_files_are_refused_by_name_or_read_as_they_should_be(name, good_files, tmp_path, monkeypatch):
    if name == "Minari, Arrow":
        pytest.importorskip("pyarrow", reason="pip install -e '.[offline]'")
    good, reader = good_files(name), fuzzing.READERS[name]
    monkeypatch.chdir(tmp_path)  # where a canary would sing
    outcomes = set()
    for number in range(8 if name in (*LONG, "sweeps") else 25):
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        kind = reader.spoil(folder, random.Random(f"{name} {number}"))
        result, error = fuzzing.outcome(reader, folder)
        assert result != "defect", f"number {number}, {kind}: {error}"
        outcomes.add(result)
        shutil.rmtree(folder)
    assert not (tmp_path / "canary").exists()
    assert "refused" in outcomes or name == "provenance of runs"  # that is set aside


@pytest.mark.slow
def test_broken_files_are_read_in_a_process_of_their_own(tmp_path):
    found = fuzzing.fuzz("checkpoints", 200, tmp_path)
    assert found["accepted"] + found["refused"] == 200 and not found["defects"]


def test_fuzzing_would_notice(tmp_path):
    (tmp_path / "file").write_text("x")

    def raising(error):
        def read(folder):
            raise error

        return fuzzing.Reader(lambda folder: None, lambda folder, rng: "", read)

    assert fuzzing.outcome(raising(KeyError("a")), tmp_path)[0] == "defect"
    assert fuzzing.outcome(raising(DataError("bad")), tmp_path)[0] == "defect"  # which file?
    assert fuzzing.outcome(raising(DataError("file is bad")), tmp_path)[0] == "refused"
    assert fuzzing.outcome(raising(OSError(errno.EIO, "bad")), tmp_path)[0] == "defect"


def test_the_canary_would_sing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzzing.pickle.loads(fuzzing.CANARY)
    assert (tmp_path / "canary").exists()


def test_sweeps_without_end_are_refused(tmp_path):
    text = fuzzing.SWEEP.replace("seeds_together = true", "seeds_together = false")
    many = f'"agent.tau" = {[1 / (i + 2) for i in range(300)]}'
    (tmp_path / "sweep.toml").write_text(text.replace("[grid]", f"[grid]\n{many}"))
    with pytest.raises(ExperimentError, match="sweep.toml: 2400 combinations are more than the 1000"):
        Sweep.read(tmp_path / "sweep.toml")


def test_numbers_that_no_float_can_hold_are_refused(tmp_path):
    (tmp_path / "sweep.toml").write_text(fuzzing.SWEEP.replace("[0.9, 0.99]", f"[{10**400}]"))
    with pytest.raises(ExperimentError, match="int too large to convert to float"):
        Sweep.read(tmp_path / "sweep.toml").runs()
    with pytest.raises(HyperparametersError, match="SAC.discount is 1000.*float is needed"):
        build(SAC, {"discount": 10**400})


def test_json_without_end_is_no_json():
    assert parse_json("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1))
    for depth in (DEEPEST + 1, 500, 200_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json("[" * depth + "]" * depth)
    with pytest.raises(ValueError):
        parse_json('"\\ud800"')


def test_damaged_provenance_is_set_aside(tmp_path):
    with Run.create(tmp_path / "run", {}) as run:
        pass
    (run.path / "provenance.json").write_text('{"half')
    with pytest.warns(UserWarning, match="provenance.json is damaged.*kept as provenance.json.damaged"):
        Run.open(run.path, write=True).close()
    assert len(run.sessions()) == 1 and (run.path / "provenance.json.damaged").read_text() == '{"half'


def test_a_checkpoint_under_another_step_is_not_gone_on_from(tmp_path):
    with Run.create(tmp_path / "run", {}) as run:
        for step in (5, 10):
            run.save_checkpoint({"x": jnp.float32(step)}, step)
        run.checkpoints()[0].rename(run.path / "checkpoints" / "step_0000000011.eqx")
        (run.path / "checkpoints" / "step_last.eqx").write_text("")
        with pytest.warns(UserWarning, match="is not of the step in its name.*Using.*step_0000000005"):
            tree, _ = run.restore({"x": jnp.zeros(())})
    assert tree["x"] == 5


def test_a_checkpoint_that_lies_with_a_matching_checksum_is_refused(tmp_path):
    path = tmp_path / "x.eqx"
    checkpoint.save(path, {"x": jnp.zeros(3)}, {})
    first, payload = path.read_bytes().split(b"\n", 1)
    lie = payload.replace(b"'shape': (3,)", b"'shape': (9" + b"0" * 15 + b",)")[: len(payload)]
    header = json.loads(first)
    canonical = json.dumps(header["content"], sort_keys=True).encode()
    header["sha256"] = checkpoint.hashlib.sha256(canonical + lie).hexdigest()
    path.write_bytes(json.dumps(header).encode() + b"\n" + lie)
    with pytest.raises(CheckpointError, match="is not what its first line says"):
        checkpoint.load(path, {"x": jnp.zeros(3)})


@pytest.mark.parametrize("kind", ["array", "chunk"])
def test_hdf5_bombs_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(hdf5, "_LARGE", 2**20)
    fuzzing.READERS["D4RL, of others"].make(tmp_path)
    with h5py.File(tmp_path / "hopper-medium-v2.hdf5", "a") as file:
        del file["rewards"]
        if kind == "array":
            file.create_dataset(
                "rewards", data=np.zeros(2**22, np.float32), compression="gzip", chunks=(2**22,)
            )
        else:
            packed = file.create_dataset(
                "rewards", (40,), "f4", maxshape=(None,), chunks=(2**22,), compression="gzip"
            )
            packed[:] = 0
    with pytest.raises(DataError, match="rewards would unpack from .* which data never do"):
        d4rl.load(tmp_path / "hopper-medium-v2.hdf5")


def test_bombs_in_archives_are_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("observations.npy", bytes(300 * 2**20))
    with pytest.raises(DataError, match="observations.npy would unpack from .* to 314572800 bytes"):
        ogbench.load(tmp_path / "a.npz")
    fuzzing.READERS["CIFAR-10"].make(tmp_path)
    monkeypatch.setattr(images, "_LARGEST_ARCHIVE", 10_000)
    with pytest.raises(DataError, match="python.tar.gz unpacks to more than 10000 bytes"):
        images.cifar10(tmp_path / "python.tar.gz")


@pytest.mark.parametrize("bomb", ["policy.json", "policy.bin"])
def test_bombs_that_look_like_policies_are_refused(tmp_path, bomb):
    with zipfile.ZipFile(tmp_path / "policy.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("policy.json", "policy.bin"):
            file.writestr(name, bytes(100 * 2**20) if name == bomb else b"{}")
    with pytest.raises(ExperimentError, match=f"{bomb} would unpack from .* to 104857600 bytes"):
        load_policy(tmp_path / "policy.zip")


@pytest.mark.parametrize(
    "code, message",
    [
        ("input(); import time; time.sleep(60)", "HDF5 does not come to an end in it within 2 seconds"),
        ("input(); import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "HDF5 crashes in it"),
    ],
)
def test_files_in_which_hdf5_hangs_or_crashes_are_refused(tmp_path, monkeypatch, code, message):
    """By the process that looks at them first; here one that does so with every file."""
    fuzzing.READERS["D4RL, of others"].make(tmp_path)
    monkeypatch.setattr(hdf5, "_prober", hdf5._Prober())
    monkeypatch.setattr(hdf5, "PATIENCE", 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(hdf5, "_PROBE", code)
        with pytest.raises(DataError, match=f"hopper-medium-v2.hdf5: it is damaged: {message}"):
            d4rl.load(tmp_path / "hopper-medium-v2.hdf5")
    monkeypatch.setattr(hdf5, "PATIENCE", 60.0)
    assert len(d4rl.load(tmp_path / "hopper-medium-v2.hdf5")) == 40  # the next one looks again


def test_pages_about_runs_take_no_formulas_from_names(tmp_path):
    fuzzing.READERS["reports about runs"].make(tmp_path)
    for name in ("a$\\frac$", "b"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    assert "frac" in reporting.write_report([tmp_path], tmp_path / "page.html").read_text()
