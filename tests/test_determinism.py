"""Same seed, same machine, same run to the last bit; and another seed is another run in all that is random.

`test_contracts.py` has it for `init` and `update` of every agent and planner. Here are the loops, which draw
batches and step environments, with learners that keep what they are given; the diffusion of examples; and whole
processes.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.algorithms.base import AbstractAgent, AbstractOfflineLearner, vector_sizes
from eqgen.algorithms.diffusion import Diffusion
from eqgen.data.examples import ExampleData, Examples
from eqgen.envs.catalog import make
from eqgen.experiments import algorithms
from eqgen.offline import OfflineSettings, init_offline, train_offline
from eqgen.timesteps.heuristics import StaticTimesteps
from eqgen.timesteps.times import DiffusionChain
from eqgen.training import OnlineSettings, train_online


ROOT = Path(__file__).resolve().parent.parent
SETTINGS = OnlineSettings(
    total_steps=60,
    num_envs=2,
    warmup_steps=20,
    batch_size=8,
    log_every=20,
    eval_every=60,
    eval_episodes=2,
    checkpoint_every=0,
)


class Keeper(AbstractAgent):
    """Learns nothing: keeps the batches that it is given, and acts by one random matrix."""

    capacity: int = 20
    sizes = {"smoke": {}}
    evaluation_policy = "by a random matrix"

    def act(self, state, obs, *, key, explore):
        action = jnp.tanh(state["weights"] @ obs)
        return jnp.clip(action + 0.1 * explore * jr.normal(key, action.shape), -1, 1)

    def init(self, example, *, key):
        obs_size, action_size = vector_sizes(example)
        batch = jax.tree.map(lambda x: jnp.zeros((self.capacity, SETTINGS.batch_size, *x.shape)), example)
        return {"weights": jr.normal(key, (action_size, obs_size)), "batches": batch, "count": jnp.int32(0)}

    def update(self, state, batch, *, key):
        keep = lambda kept, new: kept.at[state["count"] % self.capacity].set(new)
        batches = jax.tree.map(keep, state["batches"], batch)
        return state | {"batches": batches, "count": state["count"] + 1}, {"loss": jr.normal(key)}


def whole_run(env, seeds):
    """The first and the last state, and all records, of a run from nothing."""
    states, records = [], []
    for progress in train_online(Keeper(), env, SETTINGS, seeds=seeds):
        # Copied, because the loop reuses the memory of replay and environments.
        states.append(jax.tree.map(lambda x: np.array(x) if eqx.is_array(x) else x, progress.state))
        records += [{k: v for k, v in record.items() if k != "wall_time"} for record in progress.records]
    return states[0], states[-1], records


@functools.cache
def runs(name):
    """The same run twice, of two seeds, in an environment of that name."""
    env = make(name)
    return whole_run(env, (0, 1)), whole_run(env, (0, 1))


environments = pytest.mark.parametrize("name", ["gymnax/Pendulum-v1", "gymnasium/Pendulum-v1"])


@environments
def test_a_run_is_repeated_to_the_last_bit(name):
    (*once, records), (*again, others) = runs(name)
    assert records == others
    for one, other in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


@environments
def test_seeds_differ_in_weights_first_observations_and_batches(name):
    first, last, records = runs(name)[0]
    different = lambda x: not np.array_equal(x[0], x[1])
    assert different(first.agent["weights"]) and different(first.obs)
    assert len(np.unique(first.obs.reshape(-1, first.obs.shape[-1]), axis=0)) == 2 * SETTINGS.num_envs
    batches = last.agent["batches"]
    assert (last.agent["count"] == 20).all()  # as many as are kept: one for every two steps after the warm-up
    for i in range(20):
        assert all(different(x[:, i]) for x in (batches.obs, batches.action, batches.reward))
    # Nor does a seed see one batch again, or draw its first batch from the same places as the other seed.
    assert all(len(np.unique(x.reshape(20, -1), axis=0)) == 20 for x in batches.obs)
    places = [
        [int(np.flatnonzero((stored == row).all(axis=1))[0]) for row in drawn]
        for stored, drawn in zip(last.replay.data.obs, batches.obs[:, 0])
    ]
    assert places[0] != places[1]
    returns = {record["seed"]: record["eval/returns"] for record in records if record["env_step"] == 60}
    assert returns[0] != returns[1]


class KeepingNumbers(AbstractOfflineLearner):
    """The same on a set: keeps the numbers that it is given."""

    total_updates: int = 6
    sizes = {"smoke": {}}

    def init(self, example, *, key):
        return {"weights": jr.normal(key, (3,)), "batches": jnp.zeros((6, 8)), "count": jnp.int32(0)}

    def update(self, state, batch, *, key):
        batches = state["batches"].at[state["count"]].set(batch.x[:, 0])
        return state | {"batches": batches, "count": state["count"] + 1}, {"loss": jr.normal(key)}


def offline_run(learner, init, data, seeds):
    settings = OfflineSettings(batch_size=8, log_every=2, checkpoint_every=0)
    state = init_offline(init, seeds=seeds)
    *_, last = train_offline(learner, data, settings, seeds=seeds, state=state)
    return state.learner, last.state.learner, [{**record, "wall_time": 0} for record in last.records]


def test_a_run_on_a_set_is_repeated_and_seeds_differ_in_weights_and_batches():
    learner, data = KeepingNumbers(), ExampleData(np.arange(1000.0)[:, None])
    once, again = (
        offline_run(learner, functools.partial(learner.init, None), data, (0, 1)) for _ in range(2)
    )
    assert eqx.tree_equal(once, again)
    first, last, _ = once
    assert not np.array_equal(first["weights"][0], first["weights"][1])
    assert all(not np.array_equal(a, b) for a, b in zip(*last["batches"]))
    assert all(len(np.unique(batches, axis=0)) == 6 for batches in last["batches"])


def test_the_diffusion_of_examples_is_repeated_and_seeds_differ():
    tiny = dataclasses.replace(Diffusion.tiny(), total_updates=2)
    learner = dataclasses.replace(tiny, timesteps=StaticTimesteps(DiffusionChain(20)))
    data = ExampleData(np.random.default_rng(0).standard_normal((50, 2)))
    init = functools.partial(learner.init, Examples(jnp.zeros(2)))
    once, again = (offline_run(learner, init, data, (0, 1)) for _ in range(2))
    assert eqx.tree_equal(once, again)
    first, last, _ = once
    for state in (first, last):
        weights = [x for x in jax.tree.leaves(state.model.online) if eqx.is_inexact_array(x) and x.ndim > 2]
        drawn = [x for x in weights if float(jnp.ptp(x)) > 0]  # a last layer may begin at 0
        assert drawn and not any(bool(jnp.array_equal(x[0], x[1])) for x in drawn)


# --- Other processes ---

DIGESTS = """
import dataclasses, hashlib, sys
import equinox as eqx, jax, numpy as np
from eqgen.algorithms.base import AbstractOnPolicyAgent
from eqgen.envs.catalog import make
from eqgen.experiments import algorithm
from eqgen.training import OnlineSettings, train_online

agent, env = algorithm(sys.argv[1]).tiny(), make("gymnax/Pendulum-v1")
settings = OnlineSettings.preset("smoke", "gymnax/Pendulum-v1", agent)
steps = settings.warmup_steps + 5 * settings.num_envs
if isinstance(agent, AbstractOnPolicyAgent):
    agent, steps = dataclasses.replace(agent, rollout_length=8), 16 * settings.num_envs
fixed = dict(total_steps=steps, log_every=steps, eval_every=0, checkpoint_every=0)
settings = dataclasses.replace(settings, **fixed)
for seed in (0, 1):
    *_, last = train_online(agent, env, settings, seeds=(seed,))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(eqx.filter(last.state, eqx.is_array)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    print(digest.hexdigest())
"""


def digests(name):
    """Of all that an algorithm has after five updates with each of two seeds, in a process that compiles anew."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", ""), "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, "-c", DIGESTS, name]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("name", algorithms())
def test_an_algorithm_trains_the_same_in_another_process(name):
    first, second = once = digests(name)
    assert once == digests(name) and first != second
