"""Run directories: nothing is overwritten, one process writes, and what a crash leaves can be resumed."""

import json
import os
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from eqgen.checkpoint import CheckpointError
from eqgen.runs import Run, RunError, TensorBoard, provenance


SETTINGS = {"agent": "SAC", "seeds": [0, 1]}


@pytest.fixture
def run(tmp_path):
    with Run.create(tmp_path / "x", SETTINGS) as run:
        yield run


def records(*steps):
    return [
        {"seed": seed, "env_step": step, "eval/return": 10.0 * seed + step}
        for step in steps
        for seed in (0, 1)
    ]


def state(step):
    return {"weights": jnp.full(3, float(step)), "step": jnp.int32(step)}


def damage(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_what_is_written_is_read_by_others(run):
    run.log(records(0))
    run.log(records(5))
    other = Run.open(run.path)
    assert other.settings == SETTINGS
    assert other.metrics() == records(0, 5)
    steps, values = other.curve("eval/return")
    np.testing.assert_array_equal(steps, [0, 5])
    np.testing.assert_array_equal(values, [[0, 5], [10, 15]])


def test_existing_run_is_refused_with_remedy(run, tmp_path):
    with pytest.raises(RunError, match="already holds a run.*eqgen resume"):
        Run.create(run.path, {})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        Run.create(tmp_path, {})
    assert Run.open(run.path).settings == SETTINGS


def test_empty_folder_is_accepted(tmp_path):
    Run.create(tmp_path, SETTINGS).close()
    assert Run.open(tmp_path).settings == SETTINGS


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no settings.json"):
        Run.open(tmp_path / "nowhere")
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        Run.open(tmp_path)


def test_one_writer_at_a_time(run):
    with pytest.raises(RunError, match=f"id {os.getpid()}.*is writing"):
        Run.open(run.path, write=True)
    run.close()
    with Run.open(run.path, write=True) as again:
        again.log(records(0))
    assert len(json.loads((run.path / "provenance.json").read_text())) == 2


def test_lock_ends_with_its_process(run):
    """A killed writer leaves the lock file, but not the lock."""
    run.close()
    code = f"import os; from eqgen.runs import Run; Run.open({str(run.path)!r}, write=True); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    Run.open(run.path, write=True).close()


def test_unfinished_line_is_not_a_record(run):
    run.log(records(0))
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"seed": 0, "env_')
    assert run.metrics() == records(0)


def test_broken_line_in_the_middle_is_an_error(run):
    (run.path / "metrics.jsonl").write_text('{"seed": 0, "env_\n{"seed": 1}\n')
    with pytest.raises(RunError, match="damaged"):
        run.metrics()


def test_log_is_strict_json(run):
    with pytest.raises(ValueError):
        run.log([{"seed": 0, "env_step": 0, "loss": float("nan")}])


def test_curve_of_unknown_metric_names_the_known_ones(run):
    run.log(records(0))
    with pytest.raises(RunError, match="'eval/retrun' yet. It has: env_step, eval/return, seed"):
        run.curve("eval/retrun")


def test_curve_leaves_out_steps_that_some_seed_lacks(run):
    run.log(records(0, 5))
    run.log(
        [{"seed": 0, "env_step": 10, "eval/return": 1.0}, {"seed": 1, "env_step": 10, "eval/return": None}]
    )
    np.testing.assert_array_equal(run.curve("eval/return")[0], [0, 5])


def test_newest_checkpoints_are_kept(run):
    for step in (5, 100, 20):
        run.save_checkpoint(state(step), step, wall_time=0.5)
    assert [path.name for path in run.checkpoints()] == ["step_0000000100.eqx", "step_0000000020.eqx"]
    tree, metadata = run.restore(state(0))
    assert int(tree["step"]) == 100 and metadata == {"env_step": 100, "wall_time": 0.5}


def test_damaged_checkpoint_gives_way_to_the_previous_one(run):
    run.save_checkpoint(state(5), 5)
    damage(run.save_checkpoint(state(10), 10))
    with pytest.warns(UserWarning, match="step_0000000010.eqx is truncated.*Using.*step_0000000005.eqx"):
        tree, metadata = run.restore(state(0))
    assert int(tree["step"]) == metadata["env_step"] == 5


def test_no_good_checkpoint(run):
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        run.restore(state(0))
    damage(run.save_checkpoint(state(5), 5))
    with pytest.raises(CheckpointError, match="truncated"):
        run.restore(state(0))


def test_checkpoint_of_other_shape_does_not_fall_back(run):
    for step in (5, 10):
        run.save_checkpoint(state(step), step)
    with pytest.raises(CheckpointError, match=r"\['weights'\] should be float32\(4,\)"):
        run.restore(state(0) | {"weights": jnp.zeros(4)})


def test_rewound_log_goes_on_as_if_never_stopped(run):
    run.log(records(0, 5))
    run.save_checkpoint(state(5), 5)
    run.log(records(10))
    damage(run.save_checkpoint(state(10), 10))
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"seed"')
    run.close()
    with Run.open(run.path, write=True) as again:
        again.rewind(5)
        assert again.metrics() == records(0, 5)
        again.log(records(10, 15))
        assert again.metrics() == records(0, 5, 10, 15)
        assert [path.name for path in again.checkpoints()] == ["step_0000000005.eqx"]


def test_provenance_names_versions_and_no_machine():
    import equinox

    found = provenance()
    assert found["packages"]["equinox"] == equinox.__version__ and found["cores"] >= 1
    assert found["backend"] == "cpu"
    text = json.dumps(found)
    assert (
        socket.gethostname() not in text
        and os.getcwd() not in text
        and os.path.expanduser("~") + "/" not in text
    )


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    sink = TensorBoard(tmp_path)
    sink.log(records(0, 5))
    sink.close()
    events = [next((tmp_path / "tensorboard" / f"seed_{seed}").iterdir()).read_bytes() for seed in (0, 1)]
    assert all(data.count(b"eval/return") == 2 for data in events)


def test_tensorboard_missing_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(RunError, match=r"pip install 'eqgen\[log\]'"):
        TensorBoard(tmp_path)
