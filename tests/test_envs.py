"""Laws of the environments in pure JAX, whichever they are, and of the catalog of names."""

import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import chisquare

from eqgen.envs.base import AbstractEnv, example_transition, step_autoreset
from eqgen.envs.catalog import GYMNAX_IDS, MUJOCO_IDS, available, make, own_families
from eqgen.envs.maze import MAZES
from eqgen.envs.mjx.tasks import TASKS
from eqgen.envs.probes import PROBES, AbstractProbe
from eqgen.envs.toys import TOYS
from helpers import assert_trees_close, take


SLOW = [name for name in available() if name.startswith("mjx/")]  # up to minutes to compile
HOST = ("mujoco/", "robotics/")
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in available()
    if not name.startswith(HOST)
]


@eqx.filter_jit
def rollout(env, key):
    """Random actions beyond the first time limit, and what a clipped and an unclipped action lead to."""
    reset_key, loop_key, clip_key = jr.split(key, 3)
    state, obs = env.reset(key=reset_key)

    def body(carry, key):
        state, obs = carry
        act_key, step_key = jr.split(key)
        action = jr.uniform(act_key, (env.action_dim,), minval=-1.0, maxval=1.0)
        state, next_obs, timestep = step_autoreset(env, state, action, key=step_key)
        fresh = env.reset(key=jr.split(step_key)[1])[1]
        return (state, next_obs), (obs, next_obs, fresh, timestep)

    path = jax.lax.scan(body, (state, obs), jr.split(loop_key, env.max_steps + 3))[1]
    step = lambda action: env.step(state, action, key=clip_key)
    return path, jax.vmap(step)(jnp.stack([jnp.ones(env.action_dim), jnp.full(env.action_dim, 7.0)]))


def test_resets_are_computed_only_where_an_episode_ended(getkey):
    """Of a batch of batches, as many seeds of many environments are: two steps before a limit, at it, beyond it."""
    env = PROBES["truncation"]()
    keys = jr.split(getkey(), (2, 3))
    step = lambda state, key: step_autoreset(env, state, jnp.zeros(env.action_dim), key=key)
    both = jax.vmap(jax.vmap(step))
    state, _ = jax.vmap(jax.vmap(lambda key: env.reset(key=key)))(keys)
    assert "cond[" in str(jax.make_jaxpr(both)(state, keys))
    one_by_one = jax.tree.map(
        lambda *x: jnp.stack(x), *[jax.vmap(step)(take(state, i), keys[i]) for i in (0, 1)]
    )
    for _ in range(env.max_steps + 1):
        outcome = both(state, keys)
        assert_trees_close(outcome, one_by_one)
        state = outcome[0]
        following = [jax.vmap(step)(take(state, i), keys[i]) for i in (0, 1)]
        one_by_one = jax.tree.map(lambda *x: jnp.stack(x), *following)


@pytest.mark.parametrize("name", NAMES)
def test_environment_keeps_its_contract(name, getkey):
    env = make(name)
    assert isinstance(env, AbstractEnv) and env.name == name
    (obs, next_obs, fresh, timestep), clipped = rollout(env, getkey())

    # Every record looks like the example that algorithms and replay were shown. (That states keep their
    # structure and dtypes is what lets the scan above compile.)
    example = example_transition(env.obs_shape, env.action_dim)
    for got, like in (
        (obs, example.obs),
        (next_obs, example.obs),
        (timestep.obs, example.obs),
        (timestep.reward, example.reward),
        (timestep.terminated, example.terminated),
        (timestep.truncated, example.truncated),
    ):
        assert got.shape == (env.max_steps + 3, *like.shape) and got.dtype == like.dtype

    # The next observation is acted on next, unless the episode ended: then the first of a new one is, and the
    # time step keeps the true one.
    np.testing.assert_array_equal(obs[1:], next_obs[:-1])
    done = np.asarray(timestep.terminated | timestep.truncated)
    np.testing.assert_array_equal(next_obs[~done], timestep.obs[~done])
    # The same reset, compiled in two places, is rounded alike but for Humanoid's long sums of inertias.
    rounding = 1e-6 if name.startswith("mjx/Humanoid") else 0
    np.testing.assert_allclose(next_obs[done], fresh[done], rtol=rounding, atol=0)

    # The clock starts anew with every episode and truncates exactly at the limit.
    clock, starts = 0, [0, *(np.flatnonzero(done) + 1)]
    for i in range(len(done)):
        clock = 1 if i in starts else clock + 1
        assert timestep.truncated[i] == (clock == env.max_steps and not timestep.terminated[i])
    assert done.any()

    # Actions beyond the bounds are the bounds.
    state, outcome = jax.tree.map(lambda x: x[0], clipped), jax.tree.map(lambda x: x[1], clipped)
    assert_trees_close(state, outcome, rtol=0, atol=0)


def test_reset_depends_on_the_key_only_where_the_task_is_random(getkey):
    differs = {}
    for name in ("gymnax/Pendulum-v1", "probe/both", "toy/ring"):
        env = make(name)
        obs = jax.vmap(lambda key, env=env: env.reset(key=key)[1])(jr.split(getkey(), 20))
        differs[name] = len(np.unique(np.asarray(obs), axis=0)) > 1
    assert differs == {"gymnax/Pendulum-v1": True, "probe/both": True, "toy/ring": False}


def test_step_never_resets_and_step_autoreset_does(getkey):
    env = make("probe/truncation")
    state = jnp.array(4, jnp.int32)
    after, timestep = env.step(state, jnp.zeros(1), key=getkey())
    assert int(after) == 5 and bool(timestep.truncated)
    again, _, _ = step_autoreset(env, state, jnp.zeros(1), key=getkey())
    assert int(again) == 0


# --- Probes ---


@pytest.mark.parametrize("name", PROBES)
def test_probe_q_is_the_fixed_point_of_the_bellman_equation(name, getkey):
    """Q = r + discount (1 - terminated) max Q(next) has one solution over the reachable states."""
    env, discount = PROBES[name](), 0.9
    assert isinstance(env, AbstractProbe)
    actions = jnp.linspace(-1, 1, 41)[:, None]
    q = lambda obs: jax.vmap(lambda action: env.true_q(obs, action, discount=discount))(actions)

    @jax.jit
    def residual(state, obs):
        step = lambda action: env.step(state, action, key=jr.key(0))
        states, timestep = jax.vmap(step)(actions)
        best = jnp.max(jax.vmap(q)(timestep.obs), axis=1)
        return states, timestep, q(obs) - (timestep.reward + discount * ~timestep.terminated * best)

    for key in jr.split(getkey(), 4):
        state, obs = env.reset(key=key)
        for _ in range(env.max_steps):
            states, timestep, error = residual(state, obs)
            # 1 / (1 - 0.9) in single precision.
            np.testing.assert_allclose(error, 0, atol=1e-5)
            state, obs = jax.tree.map(lambda x: x[0], (states, timestep.obs))
        assert bool((timestep.terminated | timestep.truncated)[0])


def test_probes_cover_both_observations_and_prefer_the_stated_action(getkey):
    obs = jax.vmap(lambda key: PROBES["both"]().reset(key=key)[1])(jr.split(getkey(), 50))
    assert set(np.asarray(obs).ravel().tolist()) == {-1.0, 1.0}
    actions = jnp.linspace(-1, 1, 41)[:, None]
    for name, seen, best in (("action", 0.0, 0.5), ("both", 1.0, 0.5), ("both", -1.0, -0.5)):
        env = PROBES[name]()
        q = jax.vmap(lambda a, env=env, seen=seen: env.true_q(jnp.array([seen]), a, discount=1.0))(actions)
        assert float(actions[jnp.argmax(q), 0]) == pytest.approx(best)


# --- Toy bandits ---


@eqx.filter_jit
def toy_facts(env, key):
    """Rewards on a grid of 20 x 20 cells of 10 x 10 points each; 10000 optimal actions and their modes."""
    points = (jnp.arange(200) + 0.5) / 100 - 1
    grid = jnp.stack(jnp.meshgrid(points, points, indexing="ij"), axis=-1)
    shares = jax.vmap(jax.vmap(env.density.responsibilities))(grid)
    samples = env.sample_optimal(10_000, key=key)
    timestep = jax.vmap(lambda action: env.step((), action, key=key)[1])(grid.reshape(-1, 2))
    return timestep, shares, samples, jax.vmap(env.mode)(samples), jax.vmap(env.mode)(env.mode_centres)


@pytest.mark.parametrize("name", TOYS)
def test_toy_optimal_policy_is_the_boltzmann_policy_of_its_rewards(name, getkey):
    env = TOYS[name]()
    timestep, shares, samples, modes, modes_of_centres = toy_facts(env, getkey())
    assert timestep.terminated.all() and not timestep.truncated.any()
    rewards = np.asarray(timestep.reward, np.float64).reshape(200, 200)
    assert rewards.min() > -40 and rewards.max() < 3
    assert np.abs(samples).max() <= 1

    # exp(reward) over cells, against how many draws each holds. A fixed key, so this passes always or never.
    policy = np.exp(rewards) / np.exp(rewards).sum()
    expected = len(samples) * policy.reshape(20, 10, 20, 10).sum(axis=(1, 3))
    counts = np.histogram2d(*np.asarray(samples).T, bins=20, range=[[-1, 1]] * 2)[0]
    common = expected > 5
    pooled = lambda x: np.append(x[common], x[~common].sum())
    assert chisquare(pooled(counts), pooled(expected)).pvalue > 1e-3

    # The masses of the modes: closed form, quadrature (200 points a side), draws (counted for the likelier
    # mode where two overlap; their standard error is 0.005).
    of_mode = np.asarray(env.modes) == np.arange(env.num_modes)[:, None]
    quadrature = np.einsum("xyc,xy,mc->m", shares, policy, of_mode)
    np.testing.assert_allclose(env.mode_weights, quadrature, atol=1e-3)
    counted = np.bincount(modes, minlength=env.num_modes) / len(samples)
    np.testing.assert_allclose(counted, env.mode_weights, atol=0.025)
    if name != "moons":  # whose centres of mass lie off the arcs
        np.testing.assert_array_equal(modes_of_centres, np.arange(env.num_modes))


# --- The catalog ---


def test_names_are_unique_and_know_their_back_end():
    names = available()
    assert len(set(names)) == len(names)
    assert {name.partition("/")[0] for name in names} == {
        *("gymnax", "mujoco", "mjx", "robotics", "maze2d", "toy", "probe"),
        *own_families(),
    }
    mjx = {f"{task}-v{version}" for task, cls in TASKS.items() for version in cls.versions}
    assert {name.partition("/")[2] for name in names if name.startswith("mjx/")} == mjx
    assert [name.partition("/")[2] for name in names if name.startswith("maze2d/")] == list(MAZES)
    assert [name.partition("/")[2] for name in names if name.startswith("toy/")] == list(TOYS)
    assert [name.partition("/")[2] for name in names if name.startswith("probe/")] == list(PROBES)


def test_the_catalog_lists_what_gymnax_and_gymnasium_have():
    import gymnasium
    import gymnax

    spaces = {}
    for gymnax_id in gymnax.registered_envs:
        if gymnax_id != "MNISTBandit-bsuite":  # downloads its images
            env, params = gymnax.make(gymnax_id)
            spaces[gymnax_id] = type(env.action_space(params)).__name__
    assert {gymnax_id for gymnax_id, space in spaces.items() if space == "Box"} == set(GYMNAX_IDS)
    specs = [spec for spec in gymnasium.registry.values() if "gymnasium.envs.mujoco" in str(spec.entry_point)]
    current = {spec.id for spec in specs if spec.version in (4, 5)}
    assert current - {"Pusher-v4"} == set(MUJOCO_IDS)


@pytest.mark.parametrize(
    "name, message",
    [
        ("toy/rings", r"no environment 'toy/rings'.*toy/ring"),
        ("pendulum-v1", r"gymnax/Pendulum-v1"),
        ("gymnax/Pendulum-v0", r"gymnax has no environment 'Pendulum-v0'.*gymnax/Pendulum-v1"),
        (
            "gymnax/CartPole-v1",
            r"CartPole-v1 has the actions Discrete\(2.*Pendulum-v1, MountainCarContinuous-v0",
        ),
        ("mujoco/HalfCheeta-v5", r"HalfCheeta-v5.*mujoco/HalfCheetah-v5"),
        ("mujoco/HalfCheetah-v3", r"HalfCheetah-v3.*mujoco/HalfCheetah-v4"),
        ("mjx/HalfCheetah-v3", r"HalfCheetah has no version 3; choose one of \(4, 5\).*mjx/HalfCheetah-v5"),
        ("mjx/Pusher-v4", r"Pusher has no version 4; choose one of \(5,\)"),
        ("mjx/Hoper-v5", r"no MJX task 'Hoper-v5'.*mjx/Hopper-v5"),
        ("gymnasium/CartPole-v1", r"CartPole-v1 has the action space Discrete\(2\)"),
        ("", r"no environment ''"),
        ("nothing like any", r"available\(\) lists them"),
    ],
)
def test_a_name_that_does_not_work_gets_the_nearest_ones(name, message):
    with pytest.raises(ValueError, match=message):
        make(name)


def test_the_catalog_imports_no_back_end_until_asked():
    code = (
        "import sys, eqgen.envs.catalog as c; c.available();"
        "heavy = {'jax', 'gymnax', 'gymnasium', 'mujoco'}; assert not heavy & set(sys.modules);"
        "c.make('toy/ring'); assert not heavy & set(sys.modules) - {'jax'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_examples_of_the_page_on_environments_run():
    page = (Path(__file__).resolve().parent.parent / "eqgen" / "envs" / "README.md").read_text()
    session = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
        exec(compile(code, "eqgen/envs/README.md", "exec"), session)
    env = session["Lander"]()
    state, obs = env.reset(key=jr.key(0))
    for _ in range(3):
        state, timestep = env.step(state, jnp.ones(1), key=jr.key(0))
    np.testing.assert_allclose(timestep.obs, [obs[0] + 0.1 * (0.1 + 0.2 + 0.3), 0.3], rtol=1e-5)
    assert session["maze"].max_steps == 800 and session["Standing"].frame_skip == 4
