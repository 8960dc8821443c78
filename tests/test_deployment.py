"""A policy in a file: it acts as in the run, in an interpreter that has no eqgen, and a bad file is an error."""

import json
import re
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen import cli, deployment, experiments
from eqgen.algorithms.sac import SAC
from eqgen.algorithms.som import SOM
from eqgen.deployment import export_policy, load_policy
from eqgen.sessions import ExperimentError
from eqgen.training import OnlineSettings


TINY = OnlineSettings(
    total_steps=60, warmup_steps=20, batch_size=8, log_every=10, eval_every=0, checkpoint_every=20
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("deployed") / "run"
    experiments.train(SAC.tiny(), "probe/both", TINY, seeds=(3, 5), out=path, verbose=False)
    return path


@pytest.fixture(scope="module")
def exported(run):
    assert cli.main(["export", str(run), "--trained-seed", "5"]) == 0
    return run / "policy.zip"


def test_exported_policy_acts_as_the_run_does(run, exported):
    act, about = load_policy(exported)
    _, _, policies, step = experiments.trained_policies(run)
    for seed, obs in enumerate(jnp.array([[-1.0], [0.3], [1.0]])):
        # The same operations, compiled as one program instead of two.
        np.testing.assert_allclose(act(obs, seed), policies[1](obs, jr.key(seed)), atol=1e-6)
    assert (about["algorithm"], about["environment"], about["policy"]) == (
        "SAC",
        "probe/both",
        SAC.evaluation_policy,
    )
    assert about["observation"] == {"shape": [1], "dtype": "float32"}
    assert about["action"] == {"shape": [1], "dtype": "float32", "range": [-1.0, 1.0]}
    assert about["trained"]["seed"] == 5 and about["trained"]["env_step"] == step == 60


def test_the_example_of_the_module_needs_no_eqgen(exported, tmp_path):
    """The lines of the docstring in an interpreter that cannot import eqgen."""
    lines = re.search(r"are enough:\n\n((?:    .*\n|\n)+)", deployment.__doc__)[1]
    code = "import sys; sys.modules['eqgen'] = None\n" + re.sub("^    ", "", lines, flags=re.MULTILINE)
    code = (
        code.replace('"policy.zip"', repr(str(exported)))
        + "\nprint(action.shape, float(abs(action).max()) <= 1)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split("\n")[-2] == "(1,) True", result.stderr


def test_observations_of_a_batch_have_noise_of_their_own(tmp_path):
    """A stochastic policy in a box, three observations alike: three actions."""
    path = tmp_path / "run"
    agent = SOM.tiny()
    experiments.train(agent, "probe/both", TINY, seeds=(0,), out=path, verbose=False)
    act, about = load_policy(export_policy(path, tmp_path / "som.zip", batch=3, platforms=["cpu"]))
    actions = np.asarray(act(np.zeros((3, 1)), 7))
    assert about["action"]["shape"] == [3, 1] and len(np.unique(actions)) == 3
    np.testing.assert_array_equal(actions, act(np.zeros((3, 1)), 7))
    assert not np.array_equal(actions, act(np.zeros((3, 1)), 8))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(trained_seed=4), "has no seed 4; it has 3, 5"),
        (dict(platforms=["cpu", "metal"]), "There is no platform metal; choose of cpu, cuda"),
        (dict(batch=0), "batch is 0; it must be at least 1"),
    ],
)
def test_impossible_exports_are_refused(run, tmp_path, options, message):
    with pytest.raises(ExperimentError, match=message):
        export_policy(run, tmp_path / "x.zip", **options)
    assert not (tmp_path / "x.zip").exists()


def test_a_policy_of_another_platform_is_refused(run, tmp_path):
    path = export_policy(run, tmp_path / "tpu.zip", platforms=["tpu"])
    if jax.default_backend() == "tpu":
        pytest.skip("this is the platform")
    with pytest.raises(ExperimentError, match="runs on tpu; this is"):
        load_policy(path)


def rewritten(path, out, **files):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            if files.get(name, "") is not None:
                new.writestr(name, files.get(name) or old.read(name))
    return out


def test_damaged_files_are_errors_of_one_line(exported, tmp_path):
    whole = exported.read_bytes()
    bad = {
        "empty": b"",
        "no zip": b"policy",
        "cut short": whole[: len(whole) // 2],
        "flipped": whole[:200] + bytes([whole[200] ^ 255]) + whole[201:],
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ExperimentError, match="is damaged, or is no exported policy"):
            load_policy(tmp_path / name)
    about = json.loads(zipfile.ZipFile(exported).read("policy.json"))
    newer = rewritten(exported, tmp_path / "newer", **{"policy.json": json.dumps(about | {"format": 2})})
    with pytest.raises(ExperimentError, match="another format than 1"):
        load_policy(newer)
    with pytest.raises(ExperimentError, match="holds no policy.bin"):
        load_policy(rewritten(exported, tmp_path / "half", **{"policy.bin": None}))
    with pytest.raises(ExperimentError, match="is damaged"):
        load_policy(rewritten(exported, tmp_path / "noise", **{"policy.bin": b"\x00" * 100}))
