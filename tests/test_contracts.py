"""What holds for every algorithm: found by walking the package, so a new file is tested without being named."""

import importlib
import inspect
import pkgutil
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import eqgen.algorithms
from eqgen import checkpoint
from eqgen.algorithms.base import AbstractAgent, AbstractLearner, AbstractOnPolicyAgent
from eqgen.envs.base import example_transition
from eqgen.guidance import AbstractPlanner
from eqgen.loops import INIT, TRAIN, run_key
from eqgen.training import compiled_policy
from eqgen.tree import filter_scan
from eqgen.types import Transition
from helpers import assert_trees_close, random_windows, take


OBS, ACT, BATCH, HORIZON = 3, 2, 16, 5


def learners():
    """Every instantiable learner defined in `eqgen.algorithms`."""
    for info in pkgutil.iter_modules(eqgen.algorithms.__path__):
        module = importlib.import_module(f"eqgen.algorithms.{info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and issubclass(cls, AbstractLearner):
                if not inspect.isabstract(cls):
                    yield cls


AGENTS = [cls for cls in learners() if issubclass(cls, AbstractAgent)]
PLANNERS = [cls for cls in learners() if issubclass(cls, AbstractPlanner)]
agents = pytest.mark.parametrize("cls", AGENTS, ids=lambda cls: cls.__name__)
agents_and_planners = pytest.mark.parametrize("cls", AGENTS + PLANNERS, ids=lambda cls: cls.__name__)
# Each of these tests compiles an update again, which takes minutes for all: by default for some of each kind.
QUICK = {"SAC", "PPO"}
some_by_default = pytest.mark.parametrize(
    "cls",
    [
        pytest.param(cls, marks=[] if cls.__name__ in QUICK else [pytest.mark.slow])
        for cls in AGENTS + PLANNERS
    ],
    ids=lambda cls: cls.__name__,
)


def transitions(key, *shape):
    keys = jr.split(key, 5)
    return Transition(
        obs=jr.normal(keys[0], (*shape, OBS)),
        action=jr.uniform(keys[1], (*shape, ACT), minval=-1.0, maxval=1.0),
        reward=jr.normal(keys[2], shape),
        next_obs=jr.normal(keys[3], (*shape, OBS)),
        terminated=jr.bernoulli(keys[4], 0.3, shape),
        truncated=jnp.zeros(shape, bool),
    )


windows = partial(random_windows, horizon=HORIZON, obs_size=OBS, action_size=ACT)


def batch(cls, key, *leading):
    """What the class learns from: a batch, or a rollout of two environments."""
    shape = (BATCH // 2, 2) if issubclass(cls, AbstractOnPolicyAgent) else (BATCH,)
    return (windows if cls in PLANNERS else transitions)(key, *leading, *shape)


def example(cls):
    return windows(jr.key(0)) if cls in PLANNERS else example_transition((OBS,), ACT)


@cache
def compiled(cls):
    """The agent, and its compiled `init` and `update`."""
    agent = cls.tiny()
    init = eqx.filter_jit(lambda key: agent.init(example(cls), key=key))
    return agent, init, eqx.filter_jit(lambda state, batch, key: agent.update(state, batch, key=key))


@cache
def setup(cls):
    """The agent, its compiled update, and states after 0 and 2 updates."""
    agent, init, update = compiled(cls)
    first = init(jr.key(0))
    later, metrics = first, None
    for i in range(2):
        later, metrics = update(later, batch(cls, jr.key(i)), jr.key(10 + i))
    return agent, update, first, later, metrics


def signature(tree):
    arrays, static = eqx.partition(tree, eqx.is_array)
    describe = lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False))
    return jax.tree.structure(tree), jax.tree.map(describe, arrays), static


def test_there_are_agents():
    assert QUICK | {"SOM"} <= {cls.__name__ for cls in AGENTS}
    assert {"DiffusionPlanner", "PriorGuidance"} <= {cls.__name__ for cls in PLANNERS}


@agents_and_planners
def test_state_keeps_structure_shapes_and_dtypes(cls):
    """Else a scan would fail, and a jitted loop would compile twice (a weak type is enough for that)."""
    _, _, first, later, _ = setup(cls)
    assert jax.tree.structure(first) == jax.tree.structure(later)
    assert eqx.tree_equal(*(signature(state)[1] for state in (first, later)))


@agents_and_planners
def test_update_changes_parameters_and_reports_finite_metrics(cls):
    _, _, first, later, metrics = setup(cls)
    assert not eqx.tree_equal(first, later)
    assert metrics and all(x.shape == () and bool(jnp.isfinite(x)) for x in metrics.values())


@agents_and_planners
def test_metrics_have_the_same_keys_on_every_update(cls):
    _, update, first, later, metrics = setup(cls)
    for state in (first, later):
        assert update(state, batch(cls, jr.key(5)), jr.key(6))[1].keys() == metrics.keys()


@agents_and_planners
def test_same_key_same_result_and_other_key_another(cls):
    _, update, _, later, _ = setup(cls)
    data = batch(cls, jr.key(1))
    once, again, other = (update(later, data, jr.key(k))[0] for k in (1, 1, 2))
    assert eqx.tree_equal(once, again)
    assert not eqx.tree_equal(once, other)


@agents_and_planners
def test_a_seed_decides_everything_to_the_last_bit_and_another_seed_is_another_start(cls):
    """From nothing, with keys and batches that depend on the seed as those of a loop do."""
    _, init, update = compiled(cls)

    def run(seed):
        states = [init(run_key(seed, INIT, 0))]
        for i in range(2):
            draw_key, update_key = jr.split(run_key(seed, TRAIN, i))
            states.append(update(states[-1], batch(cls, draw_key), update_key)[0])
        return states

    once, again, other = run(0), run(0), run(1)
    assert eqx.tree_equal(once, again)
    weights = lambda states: [x for x in jax.tree.leaves(states[0]) if eqx.is_inexact_array(x) and x.ndim > 1]
    drawn = [
        (a, b) for a, b in zip(weights(once), weights(other)) if float(jnp.ptp(a)) > 0
    ]  # some begin at 0
    assert drawn and not any(bool(jnp.array_equal(a, b)) for a, b in drawn)


@some_by_default
def test_jit_equals_eager(cls):
    agent, update, _, later, _ = setup(cls)
    data = batch(cls, jr.key(1))
    eager = agent.update(later, data, key=jr.key(7))
    # Fused operations round differently, and Adam divides small gradients by small roots: 1e-3 of a step of 3e-4.
    assert_trees_close(update(later, data, jr.key(7)), eager, rtol=1e-3, atol=2e-4)


@some_by_default
def test_scan_equals_loop(cls):
    agent, update, _, later, _ = setup(cls)
    data, keys = batch(cls, jr.key(3), 3), jr.split(jr.key(4), 3)
    step = lambda state, xs: agent.update(state, xs[0], key=xs[1])
    scanned, metrics = eqx.filter_jit(lambda state: filter_scan(step, state, (data, keys)))(later)
    looped = later
    for i in range(3):
        looped, last = update(looped, take(data, i), keys[i])
    # The compiler fuses the body of a scan differently; three Adam steps of 3e-4 amplify rounding.
    assert_trees_close(scanned, looped, rtol=1e-3, atol=2e-4)
    assert_trees_close(jax.tree.map(lambda x: x[-1], metrics), last, rtol=1e-2, atol=1e-3)


@some_by_default
def test_vmap_over_seeds_equals_separate_runs(cls):
    agent, update, _, _, _ = setup(cls)
    init = eqx.filter_jit(lambda key: agent.init(example(cls), key=key))
    keys = jr.split(jr.key(8), 2)
    stacked = eqx.filter_jit(eqx.filter_vmap(init))(keys)
    data = batch(cls, jr.key(9), 2)
    together = eqx.filter_jit(eqx.filter_vmap(lambda s, b, k: agent.update(s, b, key=k)))(stacked, data, keys)
    for i in range(2):
        alone = update(init(keys[i]), take(data, i), keys[i])
        # Batched matrix products sum in another order; the first Adam step is the sign of the gradient.
        assert_trees_close(take(together, i), alone, rtol=1e-3, atol=7e-4)


@agents_and_planners
def test_saved_and_loaded_state_continues_identically(cls, tmp_path):
    agent, update, first, later, _ = setup(cls)
    checkpoint.save(tmp_path / "state.eqx", later, {})
    loaded, _ = checkpoint.load(tmp_path / "state.eqx", first)
    data = batch(cls, jr.key(1))
    assert eqx.tree_equal(update(loaded, data, jr.key(2)), update(later, data, jr.key(2)))


@agents_and_planners
def test_actions_lie_in_the_box(cls):
    agent, _, _, later, _ = setup(cls)
    for how in ({},) if cls in PLANNERS else (dict(explore=True), dict(explore=False)):
        act = eqx.filter_jit(lambda s, o, k, how=how: agent.act(s, o, key=k, **how))
        actions = jnp.stack([act(later, 3.0 * jr.normal(k, (OBS,)), k) for k in jr.split(jr.key(1), 20)])
        assert actions.shape == (20, ACT)
        assert bool(jnp.all(jnp.abs(actions) <= 1))


@agents
def test_compiled_policy_acts_as_the_agent_does(cls):
    agent, _, _, later, _ = setup(cls)
    obs, key = jnp.linspace(-1.0, 1.0, OBS), jr.key(3)
    expected = eqx.filter_jit(lambda s, o, k: agent.act(s, o, key=k, explore=False))(later, obs, key)
    assert_trees_close(compiled_policy(agent, later, (OBS,))(obs, key), expected)


@agents
def test_terminated_transitions_do_not_bootstrap(cls):
    """With every transition terminated the update does not depend on what came next; truncated ones do."""
    _, update, _, later, _ = setup(cls)
    data = batch(cls, jr.key(1))
    elsewhere = lambda b: eqx.tree_at(lambda b: b.next_obs, b, b.next_obs + 5.0)
    flag = lambda b, terminated: eqx.tree_at(
        lambda b: (b.terminated, b.truncated),
        b,
        (jnp.full_like(b.terminated, terminated), jnp.full_like(b.truncated, True)),
    )
    run = lambda b: update(later, b, jr.key(3))[0]
    assert eqx.tree_equal(run(flag(data, True)), run(elsewhere(flag(data, True))))
    assert not eqx.tree_equal(run(flag(data, False)), run(elsewhere(flag(data, False))))


@agents_and_planners
def test_profiles_and_sizes_construct(cls):
    assert "default" in cls.profiles()
    for profile in cls.profiles().values():
        assert {"smoke", "cpu", "paper"} == set(cls.sizes)
        for size in cls.sizes:
            assert isinstance(profile.resized(size), cls)
    assert cls in PLANNERS or cls.evaluation_policy


@agents
def test_observations_that_are_not_vectors_are_refused(cls):
    with pytest.raises(ValueError, match=r"obs has shape \(8, 8\)"):
        cls.tiny().init(example_transition((8, 8), ACT), key=jr.key(0))
