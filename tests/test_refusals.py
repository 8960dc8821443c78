"""What is refused, and in which words: errors that no law reaches, each naming the value and what would do."""

import h5py
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen import cli
from eqgen.algorithms.diffusion import Diffusion
from eqgen.data import d4rl, hdf5
from eqgen.data.episodes import DataError
from eqgen.data.examples import Examples
from eqgen.envs.mjx.tasks import make_mjx
from eqgen.hyperparameters import HyperparametersError, from_json, to_json
from eqgen.networks.temporal import Attention
from eqgen.samplers import ddim, uniform_grid
from eqgen.schedules import LinearFlow
from eqgen.sessions import ExperimentError
from eqgen.sweeps import Sweep
from eqgen.timesteps.heuristics import StaticTimesteps, VarianceTimesteps
from eqgen.timesteps.laws import LogNormal, SpeedPairs
from eqgen.timesteps.times import DiffusionChain, FlowIntervals
from eqgen.timesteps.weightings import SpeedWeight


PAIRS = FlowIntervals()
SHAPE = Examples(jnp.zeros(2))
identity = lambda x, t: x


@pytest.mark.parametrize(
    "ask, says",
    [
        (lambda: Attention(10, 3, key=jr.key(0)), "width 10 is no multiple of num_heads=3"),
        (lambda: Diffusion(label_dropout=1.0), r"label_dropout=1.0 must lie in \[0, 1\)"),
        (lambda: FlowIntervals(low=0.5, high=0.5), "low=0.5, high=0.5: times need 0 <= low < high"),
        (lambda: VarianceTimesteps(PAIRS), "sweep=20: pairs of times are not interpolated"),
        (
            lambda: LogNormal().probabilities(PAIRS),
            "LogNormal is a law of single times, not of FlowIntervals",
        ),
        (
            lambda: SpeedWeight()(jnp.zeros((1, 2)), PAIRS),
            "SpeeD is defined for single times, not for FlowInt",
        ),
        (lambda: SpeedPairs().partner(jnp.zeros(4), PAIRS), "for single times, not for FlowIntervals"),
        (lambda: make_mjx("Tightrope-v5"), "no MJX task 'Tightrope-v5'"),
        (lambda: make_mjx("Hopper"), "no MJX task 'Hopper'"),
        (
            lambda: ddim(identity, jnp.zeros(2), uniform_grid(4, 1.0, 0.0), LinearFlow(), eta=1.5),
            r"eta must lie in \[0, 1\], got 1.5",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_values_that_cannot_be(ask, says):
    with pytest.raises(ValueError, match=says):
        ask()


def test_a_chain_has_no_more_steps_than_it_has():
    learner = Diffusion(timesteps=StaticTimesteps(DiffusionChain(5)), hidden=(8,))
    state = learner.init(SHAPE, key=jr.key(0))
    with pytest.raises(ValueError, match="num_steps=6: the chain has 5"):
        learner.sample(state, num_steps=6, key=jr.key(1))
    assert learner.sample(state, num_steps=5, key=jr.key(1)).shape == (2,)


def test_hyperparameters_that_a_class_does_not_take():
    content = to_json(DiffusionChain(5))
    content["fields"]["num_steps"] = 1
    with pytest.raises(
        HyperparametersError, match="DiffusionChain does not accept these fields: num_steps=1"
    ):
        from_json(content)


@pytest.mark.parametrize(
    "arguments, says", [([], "needs an action first"), (["burn"], "has no action 'burn'")]
)
def test_data_without_an_action(arguments, says, capsys):
    assert cli.main(["data", *arguments]) == 2
    assert says in capsys.readouterr().err


# --- Files ---


@pytest.fixture
def written(tmp_path):
    """A set in D4RL's layout, whose arrays may be replaced, and options of the file's."""

    def write(options=None, **arrays):
        path = tmp_path / "hopper-medium-v2.hdf5"
        content = {
            "observations": np.zeros((6, 3), np.float32),
            "actions": np.zeros((6, 1), np.float32),
            "rewards": np.zeros(6, np.float32),
            "terminals": np.array([0, 0, 1, 0, 0, 1], bool),
            "timeouts": np.zeros(6, bool),
        }
        with h5py.File(path, "w") as file:
            for name, values in (content | arrays).items():
                file.create_dataset(name, data=values, **(options or {}))
        return path

    return write


def test_flags_are_flags(written):
    with pytest.raises(DataError, match="terminals is 2.0 in row 4; flags are 0 or 1"):
        d4rl.load(written(terminals=np.array([0, 0, 1, 0, 2, 1.0])))


def test_what_is_packed_is_not_mapped(written):
    d4rl.load(written(), memory_map=True)
    with pytest.raises(DataError, match="observations is packed or in pieces and cannot be memory-mapped"):
        d4rl.load(written({"compression": "gzip"}), memory_map=True)
    with pytest.raises(DataError, match="actions is float64 and cannot be memory-mapped"):
        d4rl.load(written(actions=np.zeros((6, 1))), memory_map=True)


def test_arrays_in_other_files_are_not_opened(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(24))
    with h5py.File(tmp_path / "set.hdf5", "w") as file:
        file.create_dataset("rewards", (6,), np.float32, external=[(str(tmp_path / "secret"), 0, 24)])
    with hdf5.opened(tmp_path / "set.hdf5") as file:
        with pytest.raises(DataError, match="rewards lies in other files, which are not opened"):
            hdf5.read(file, "rewards")


def test_what_is_no_hdf5_file(tmp_path):
    (tmp_path / "set.hdf5").write_text("observations")
    with pytest.raises(DataError, match="set.hdf5: it is no HDF5 file"):
        d4rl.load(tmp_path / "set.hdf5")
    with pytest.raises(DataError, match="gone.hdf5: No such file or directory"):
        d4rl.load(tmp_path / "gone.hdf5")


def test_a_sweep_asks_for_resources_that_there_are(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text('algorithms = ["sac"]\nenvs = ["toy/ring"]\nseeds = [0]\n[resources]\nmemory = 3\n')
    with pytest.raises(ExperimentError, match="no memory in resources; it takes cpus, gpus"):
        Sweep.read(path)
