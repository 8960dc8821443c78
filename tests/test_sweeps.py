"""Sweeps: what a file expands to, and that it does not matter by whom, where and in how many pieces it is run."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from eqgen import cli, sweeps
from eqgen.algorithms.ppo import PPO
from eqgen.algorithms.sac import SAC
from eqgen.algorithms.som import SOM
from eqgen.runs import Run
from eqgen.sessions import ExperimentError
from eqgen.sweeps import Sweep, run_sweep, with_fields


TOML = """
preset = "smoke"
algorithms = ["sac"]
envs = ["probe/both"]
seeds = [0, 1]
[settings]
total_steps = 60
warmup_steps = 20
batch_size = 8
log_every = 10
eval_every = 30
checkpoint_every = 20
"""


def sweep_of(tmp_path, text):
    (tmp_path / "sweep.toml").write_text(text)
    return Sweep.read(tmp_path / "sweep.toml")


# --- Expansion ---


def test_every_combination_is_a_run_and_its_name_says_which(tmp_path):
    text = (
        TOML.replace('["sac"]', '["sac", "som:paper"]')
        + """
    [agent]
    hidden = [8, 8]
    [grid]
    "agent.discount" = [0.9, 0.99]
    "settings.num_envs" = [1, 2]
    """
    )
    runs = sweep_of(tmp_path, text).runs()
    assert len(runs) == 8 and list(runs)[0] == "sac_probe-both_discount=0.9_num_envs=1"
    last = runs["som-paper_probe-both_discount=0.99_num_envs=2"]
    paper = SOM.profiles()["paper"].resized("smoke")
    assert last.agent == dataclasses.replace(paper, hidden=(8, 8), discount=0.99)
    assert (last.settings.num_envs, last.settings.total_steps, last.seeds) == (2, 60, (0, 1))


def test_seeds_may_be_runs_of_their_own(tmp_path):
    runs = sweep_of(tmp_path, TOML.replace("[settings]", "seeds_together = false\n[settings]")).runs()
    assert [(name, run.seeds) for name, run in runs.items()] == [
        ("sac_probe-both_seed0", (0,)),
        ("sac_probe-both_seed1", (1,)),
    ]


def test_fields_are_set_by_path():
    assert with_fields(SOM(), {"noise.initial_std": 1}).noise.initial_std == 1.0
    assert with_fields(SAC(), {"hidden": [3, 4]}).hidden == (3, 4)
    unchanged = {field.name: getattr(SAC(), field.name) for field in dataclasses.fields(SAC)}
    assert with_fields(SAC(), unchanged) == SAC()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"discont": 0.9}, "SAC has no field 'discont'; it has .*discount"),
        ({"discount": "0.9"}, "SAC.discount is 0.99, a float; '0.9' is a str"),
        ({"hidden": 3}, "SAC.hidden is .*, a tuple; 3 is a int"),
        ({"discount.x": 3}, "SAC.discount is 0.99, which has no field 'x'"),
    ],
)
def test_impossible_fields_are_refused(values, message):
    with pytest.raises(ExperimentError, match=message):
        with_fields(SAC(), values)


def test_modules_are_not_replaced_by_values_and_choices_are_checked():
    with pytest.raises(ExperimentError, match="SOM.noise is a module; set its fields, as in noise.FIELD"):
        with_fields(SOM(), {"noise": 0.1})
    with pytest.raises(ExperimentError, match="epochs is 0; it must be at least 1"):
        with_fields(PPO(), {"epochs": 0})


@pytest.mark.parametrize(
    "change, message",
    [
        (("preset", "presets"), "no presets in a sweep; it takes agent, algorithms"),
        (('"smoke"', '"huge"'), "preset must be one of cpu, paper, smoke"),
        (('["sac"]', "[]"), "algorithms must be a list of at least one"),
        (('["sac"]', '"sac"'), "algorithms must be a list of at least one"),
        (("[settings]", "settings = 3\n[other]"), "no other in a sweep"),
        (("[settings]", "[grid]"), "grid takes lists for fields such as"),
        (("seeds = [0, 1]", "seeds = [0, 1"), "is not TOML"),
        (('["sac"]', "[1]"), "algorithms holds 1, which is no str"),
        (("[0, 1]", '[0, "a"]'), "seeds holds 'a', which is no int"),
        (("[settings]", '[resources]\ncpus = "x"\n[settings]'), "resources.cpus is 'x'; it must be a number"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path, change, message):
    with pytest.raises(ExperimentError, match=message):
        sweep_of(tmp_path, TOML.replace(*change))


@pytest.mark.parametrize(
    "change, message",
    [
        (('"sac"', '"sca"'), "no algorithm 'sca'"),
        (('"sac"', '"sac:big"'), "sac has no profile 'big'; it has default"),
        (("probe/both", "probe/bth"), "probe/bth"),
        (("total_steps", "steps"), "OnlineSettings has no field 'steps'"),
        (("[0, 1]", "[0, 0]"), "0"),
        (('["sac"]', '["sac", "sac"]'), "Two runs are called sac_probe-both"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_any_begins(tmp_path, change, message):
    sweep = sweep_of(tmp_path, TOML.replace(*change))
    with pytest.raises(ExperimentError, match=message):
        run_sweep(sweep, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Running ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep of two runs, in one process and without interruption."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "two.toml").write_text(TOML.replace("[settings]", "seeds_together = false\n[settings]"))
    assert cli.main(["sweep", str(folder / "two.toml"), "--out", str(folder / "out")]) == 0
    return folder


def curves(out):
    """What the runs of a folder logged, without the clock."""
    runs = {path.name: Run.open(path).metrics() for path in (out / "runs").iterdir()}
    return {
        name: [{key: value for key, value in record.items() if key != "wall_time"} for record in records]
        for name, records in runs.items()
    }


def test_summary_says_what_all_runs_came_to(whole):
    rows = json.loads((whole / "out" / "summary.json").read_text())
    assert [row["status"] for row in rows.values()] == ["finished"] * 2
    for name, row in rows.items():
        records = Run.open(whole / "out" / "runs" / name).metrics()
        assert row["returns"] == [records[-1]["eval/return"]] and row["env_step"] == 60
    assert "| sac_probe-both_seed0 | finished | 60 |" in (whole / "out" / "summary.md").read_text()


def test_the_same_command_runs_nothing_again(whole, monkeypatch, capsys):
    monkeypatch.setattr(sweeps.experiments, "resume", lambda *_, **__: pytest.fail("ran again"))
    assert cli.main(["sweep", str(whole / "two.toml"), "--out", str(whole / "out")]) == 0
    assert cli.main(["sweep", str(whole / "two.toml"), "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("sac_probe-both_seed0\nsac_probe-both_seed1\n")


def test_another_sweep_into_the_same_folder_is_refused(whole, tmp_path):
    other = (whole / "two.toml").read_text().replace("batch_size = 8", "batch_size = 4")
    with pytest.raises(ExperimentError, match="has another settings than the sweep asks for"):
        run_sweep(sweep_of(tmp_path, other), whole / "out")


def test_a_run_that_fails_is_named_and_the_others_are_done(tmp_path, monkeypatch):
    sweep = sweep_of(tmp_path, TOML.replace("[settings]", "seeds_together = false\n[settings]"))
    resume, begun = sweeps.experiments.resume, []

    def first_diverges(path, **options):
        begun.append(path.name)
        if path.name.endswith("seed0"):
            raise ExperimentError("critic/loss was NaN.")
        return resume(path, **options)

    monkeypatch.setattr(sweeps.experiments, "resume", first_diverges)
    with pytest.raises(ExperimentError, match="1 of 2 runs failed: sac_probe-both_seed0"):
        run_sweep(sweep, tmp_path / "out", verbose=False)
    assert len(begun) == 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["status"] for row in summary.values()] == ["failed", "finished"]
    assert "critic/loss was NaN." in (tmp_path / "out" / "summary.md").read_text()


def test_unknown_engines_are_refused(tmp_path):
    sweep = sweep_of(tmp_path, TOML)
    with pytest.raises(ExperimentError, match="no engine 'slurm'; choose one of local, ray"):
        run_sweep(sweep, tmp_path / "out", engine="slurm")
    with pytest.raises(ExperimentError, match="workers is 0"):
        run_sweep(sweep, tmp_path / "out", workers=0)


def in_another_process(file, out, *options):
    """The command in an interpreter of its own, which compiles as users do; the tests' own rounds otherwise."""
    return [sys.executable, "-m", "eqgen", "sweep", str(file), "--out", str(out), *options]


@pytest.mark.slow
def test_processes_that_were_stopped_go_on_to_the_same_runs(whole, tmp_path):
    """SIGTERM to the sweep reaches each of its processes once; the same command does the rest."""
    file, out = whole / "two.toml", tmp_path / "out"
    subprocess.run(in_another_process(file, tmp_path / "whole"), check=True, timeout=600)
    command = in_another_process(file, out, "--workers", "2")
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    logs = [out / "runs" / f"sac_probe-both_seed{seed}" / "metrics.jsonl" for seed in (0, 1)]
    deadline = time.monotonic() + 300
    while first.poll() is None and not any(log.exists() and log.stat().st_size for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, error = first.communicate(timeout=300)
    assert first.returncode in (0, 128 + signal.SIGTERM), error
    subprocess.run(command, check=True, timeout=600)
    assert curves(out) == curves(tmp_path / "whole")


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node_loses_no_run(whole, tmp_path):
    """Two nodes of one processor have a run each; one node is killed when both have saved something."""
    ray = pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    from ray.cluster_utils import Cluster

    longer = (whole / "two.toml").read_text().replace("total_steps = 60", "total_steps = 3000")
    sweep, runs = sweep_of(tmp_path, longer), tmp_path / "out" / "runs"
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0))
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    def kill_one():
        saved = lambda seed: any(runs.glob(f"sac_probe-both_seed{seed}/checkpoints/*.eqx"))
        while not (saved(0) and saved(1)):
            time.sleep(0.02)
        cluster.remove_node(nodes[0], allow_graceful=False)

    killer = threading.Thread(target=kill_one, daemon=True)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        killer.start()
        run_sweep(sweep, tmp_path / "out", engine="ray", verbose=False)
        killer.join(60)
        assert not killer.is_alive()
    finally:
        ray.shutdown()
        cluster.shutdown()
    subprocess.run(in_another_process(tmp_path / "sweep.toml", tmp_path / "local"), check=True, timeout=600)
    assert curves(tmp_path / "out") == curves(tmp_path / "local")
    sessions = [len(json.loads((run / "provenance.json").read_text())) for run in runs.iterdir()]
    assert sorted(sessions) == [2, 3]  # made and run; made, begun and gone on with
