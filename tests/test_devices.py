"""Several devices: the same numbers as on one, and really on all of them. Four are simulated, in a process that
says so before JAX begins."""

import os
import subprocess
import sys

import numpy as np
import pytest

from eqgen.devices import mesh_shape, spread_batches, spread_seeds, training_mesh


TRAIN = """
import dataclasses, sys
import equinox as eqx, jax, jax.numpy as jnp, jax.random as jr, numpy as np
from eqgen.algorithms.diffusion import Diffusion
from eqgen.algorithms.sac import SAC
from eqgen.data.examples import ExampleData, Examples
from eqgen.envs.catalog import make
from eqgen.offline import OfflineSettings, init_offline, train_offline
from eqgen.training import OnlineSettings, train_online
from eqgen.timesteps.times import DiffusionChain
from eqgen.timesteps.heuristics import StaticTimesteps

def kept(state):
    return [np.asarray(x) for x in jax.tree.leaves(eqx.filter(state, eqx.is_inexact_array))]

def spread(state):
    return max(len(x.devices()) for x in jax.tree.leaves(eqx.filter(state, eqx.is_array)))

def online(env, seeds):
    settings = OnlineSettings(total_steps=24, num_envs=2, warmup_steps=8, batch_size=8, log_every=8, eval_every=24,
                              eval_episodes=2, checkpoint_every=0)
    *_, last = train_online(SAC.tiny(), make(env), settings, seeds=seeds)
    return last.state.agent, [record["eval/return"] for record in last.records]

def diffusion(seeds):
    learner = Diffusion(StaticTimesteps(DiffusionChain(10)), network="mlp").resized("smoke")
    learner = dataclasses.replace(learner, total_updates=6)
    data = ExampleData(np.asarray(jr.normal(jr.key(0), (40, 2))))
    init = lambda key: learner.init(Examples(data.examples().x[0]), key=key)
    state = init_offline(init, seeds=seeds)
    settings = OfflineSettings(batch_size=8, log_every=3, checkpoint_every=0)
    *_, last = train_offline(learner, data, settings, seeds=seeds, state=state)
    return last.state.learner, [record["loss"] for record in last.records]

runs = {
    "jax": lambda: online("gymnax/Pendulum-v1", (0, 1, 2, 3)),
    "host": lambda: online("mujoco/InvertedPendulum-v5", (0, 1)),
    "one seed": lambda: diffusion((0,)),
    "two seeds": lambda: diffusion((5, 6)),
}
found = {}
for name, run in runs.items():
    state, numbers = run()
    print(name, spread(state), flush=True)
    found |= {f"{name} {i}": x for i, x in enumerate([*kept(state), np.array(numbers)])}
np.savez(sys.argv[1], **found)
"""


def train(count, folder):
    """The numbers of all runs on so many devices, and over how many devices the states lay."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    out = folder / f"{count}.npz"
    run = subprocess.run([sys.executable, "-c", TRAIN, out], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.rsplit(" ", 1) for line in run.stdout.splitlines()]
    return dict(np.load(out)), {name: int(number) for name, number in lines}


@pytest.mark.slow
def test_four_devices_compute_what_one_does(tmp_path):
    one, on_one = train(1, tmp_path)
    four, on_four = train(4, tmp_path)
    assert set(on_one.values()) == {1}
    assert on_four == {"jax": 4, "host": 2, "one seed": 4, "two seeds": 4}
    assert one.keys() == four.keys()
    for name, expected in one.items():
        # Sums over a batch are taken in another order, and Adam divides by the root of small second moments.
        np.testing.assert_allclose(four[name], expected, rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    "seeds, batch, devices, shape",
    [
        (4, None, 4, (4, 1)),
        (2, None, 4, (2, 1)),
        (3, None, 2, (1, 1)),
        (6, 8, 4, (2, 2)),
        (1, 6, 4, (1, 2)),
        (1, 7, 4, (1, 1)),
        (5, 8, 1, (1, 1)),
    ],
)
def test_seeds_come_first_and_the_batch_takes_what_is_left(seeds, batch, devices, shape):
    assert mesh_shape(seeds, batch, devices) == shape


def test_one_device_leaves_everything_as_it_is():
    tree = {"x": np.ones((2, 3)), "name": "kept"}
    assert training_mesh(1, 1) is None
    assert spread_seeds(tree, None) is tree and spread_batches(tree, None) is tree
