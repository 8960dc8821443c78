"""The loop: what it stores, that it stops and goes on exactly, that seeds are separate, that it refuses NaN."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqgen.algorithms.base import AbstractAgent, AbstractOnPolicyAgent
from eqgen.algorithms.ppo import PPO
from eqgen.algorithms.sac import SAC
from eqgen.envs.base import AbstractEnv
from eqgen.envs.catalog import make
from eqgen.training import NonFiniteError, OnlineSettings, init_online, seed_slice, train_online
from eqgen.types import TimeStep
from helpers import assert_trees_close, take


class Counter(AbstractEnv):
    """Counts its steps: obs (episode length so far,), terminates at 3 or, if `clock`, is truncated there."""

    name: str = "test/counter"
    obs_shape: tuple[int, ...] = (1,)
    action_dim: int = 1
    max_steps: int = 3
    clock: bool = False
    nan_at: int = -1

    def reset(self, *, key):
        return jnp.zeros(()), jnp.zeros(1)

    def step(self, state, action, *, key):
        state = state + 1
        obs = jnp.where(state == self.nan_at, jnp.nan, state)[None]
        over = state >= 3
        return state, TimeStep(obs, state * 10, over & (not self.clock), over & self.clock)


SETTINGS = OnlineSettings(
    total_steps=40,
    num_envs=2,
    warmup_steps=10,
    batch_size=8,
    log_every=10,
    eval_every=20,
    eval_episodes=2,
    checkpoint_every=20,
)
ON_POLICY = dataclasses.replace(SETTINGS, batch_size=None)
# Rollouts of 4 iterations: a checkpoint at step 20, iteration 10, is in the middle of the second.
TRAINED = {
    "sac": (SAC.tiny(), SETTINGS),
    "ppo": (dataclasses.replace(PPO.tiny(), rollout_length=4), ON_POLICY),
}


def run(agent, env, settings=SETTINGS, seeds=(0, 1), state=None, until=None):
    """All progress (records, and the last state) up to environment step `until`."""
    records = []
    for progress in train_online(agent, env, settings, seeds=seeds, state=state):
        records += progress.records
        # Copied, because the loop reuses the replay and environments of a state once it goes on.
        last = jax.tree.map(lambda x: np.array(x) if eqx.is_array(x) else x, progress.state)
        if progress.env_step == until:
            break
    return [{k: v for k, v in record.items() if k != "wall_time"} for record in records], last


def as_arrays(state):
    """A saved state, as loading it gives it: on the device again."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, state)


@pytest.mark.parametrize("clock", [False, True])
def test_replay_holds_true_next_observations_and_both_flags(clock):
    _, state = run(SAC.tiny(), Counter(clock=clock), seeds=(0,), until=10)
    replay = seed_slice(state.replay, 0)
    assert int(replay.size) == 10
    data = jax.tree.map(lambda x: x[:10], replay.data)
    assert_trees_close(data.next_obs, data.obs + 1)  # never the first observation of the next episode
    assert set(np.asarray(data.obs)[:, 0]) == {0.0, 1.0, 2.0}
    over = np.asarray(data.next_obs)[:, 0] == 3
    assert np.array_equal(data.truncated if clock else data.terminated, over)
    assert not np.any(data.terminated if clock else data.truncated)


def test_records_have_the_returns_of_finished_episodes_and_the_schedule_of_steps():
    records, _ = run(SAC.tiny(), Counter(), seeds=(7,))
    assert [r["env_step"] for r in records] == [0, 10, 20, 30, 40]
    assert [r["updates"] for r in records] == [0, 0, 5, 10, 15]
    assert [("eval/return" in r) for r in records] == [True, False, True, False, True]
    for record in records[1:]:
        assert record["train/return"] == 60.0  # 10 + 20 + 30
    assert records[0]["eval/returns"] == [60.0, 60.0] and records[0]["eval/length"] == 3.0
    assert "greedy" in records[0]["eval/policy"]
    assert sum(r["train/episodes"] for r in records[1:]) == 2 * (20 // 3)
    assert all(r["seed"] == 7 for r in records)


@pytest.mark.parametrize("trained", ["sac", pytest.param("ppo", marks=pytest.mark.slow)])
def test_training_2n_equals_n_stopped_and_n_more_to_the_last_bit(trained):
    env, (agent, settings) = make("gymnax/Pendulum-v1"), TRAINED[trained]
    records, whole = run(agent, env, settings)
    first, half = run(agent, env, settings, until=20)
    rest, again = run(agent, env, settings, state=as_arrays(half))
    assert first + rest == records
    assert_trees_close(again, whole, rtol=0, atol=0)


@pytest.mark.slow
def test_a_seed_does_not_depend_on_the_seeds_beside_it():
    env, agent = make("gymnax/Pendulum-v1"), SAC.tiny()
    settings = dataclasses.replace(SETTINGS, eval_every=0)
    _, together = run(agent, env, settings, seeds=(3, 5), until=20)
    _, alone = run(agent, env, settings, seeds=(5,), until=20)
    # Warm-up data are the same to the last bit; updates are batched matrix products, which sum in another order.
    assert_trees_close(
        take(together.replay.data.obs, 1)[:10], take(alone.replay.data.obs, 0)[:10], rtol=0, atol=0
    )
    assert_trees_close(seed_slice(together.agent, 1), seed_slice(alone.agent, 0), rtol=1e-3, atol=1e-4)
    assert not np.allclose(take(together.replay.data.obs, 0)[:10], take(together.replay.data.obs, 1)[:10])


@pytest.mark.parametrize("acting", ["lockstep", "overlap"])
@pytest.mark.slow
def test_host_and_jax_loops_store_and_learn_alike(acting):
    """The same first iterations through a host environment: stored, tallied and updated by the same functions."""
    env, agent = make("mujoco/InvertedPendulum-v5"), SAC.tiny()
    records, state = run(agent, env, dataclasses.replace(SETTINGS, acting=acting), seeds=(0,))
    assert [r["env_step"] for r in records] == [0, 10, 20, 30, 40]
    replay = seed_slice(state.replay, 0)
    obs, next_obs = np.asarray(replay.data.obs), np.asarray(replay.data.next_obs)
    going_on = ~np.asarray(replay.data.terminated | replay.data.truncated)
    # Rows alternate between the two environments, so row i + 2 goes on from row i.
    for i in np.flatnonzero(going_on[:38]):
        np.testing.assert_array_equal(obs[i + 2], next_obs[i])
    assert bool(jnp.isfinite(records[-1]["critic/loss"]))


@pytest.mark.parametrize(
    "trained, acting",
    [("sac", "lockstep"), ("sac", "overlap"), pytest.param("ppo", "lockstep", marks=pytest.mark.slow)],
)
def test_host_training_goes_on_to_the_last_bit(trained, acting):
    env, (agent, settings) = make("mujoco/InvertedPendulum-v5"), TRAINED[trained]
    settings = dataclasses.replace(settings, acting=acting)
    records, whole = run(agent, env, settings, seeds=(0, 1))
    first, half = run(agent, env, settings, seeds=(0, 1), until=20)
    rest, again = run(agent, env, settings, seeds=(0, 1), state=as_arrays(half))
    assert first + rest == records
    assert_trees_close(again, whole, rtol=0, atol=0)


class Counting(AbstractAgent):
    """Acts by the number of updates it has had (as a share of 100), so that replay tells which acted."""

    evaluation_policy = "the number of updates"

    def init(self, example, *, key):
        return jnp.zeros(())

    def update(self, state, batch, *, key):
        return state + 0.01, {"reward": jnp.mean(batch.reward)}

    def act(self, state, obs, *, key, explore):
        return state[None]


@pytest.mark.parametrize("acting, lag", [("lockstep", 0), ("overlap", 1)])
def test_overlap_acts_one_update_late_except_after_the_learner_has_caught_up(acting, lag):
    settings = dataclasses.replace(SETTINGS, acting=acting)
    _, state = run(Counting(), make("mujoco/InvertedPendulum-v5"), settings, seeds=(0,))
    updates = np.round(100 * np.asarray(state.replay.data.action)[0, 10:, 0]).astype(int).reshape(-1, 2)
    expected = [max(i - lag, i // 5 * 5) for i in range(15)]  # a chunk is log_every / num_envs = 5 iterations
    assert updates.tolist() == [[n, n] for n in expected]


class Recorder(AbstractOnPolicyAgent):
    """Acts by the number of updates it has had (as a share of 100), and keeps the last rollout it was given."""

    rollout_length: int = 7
    evaluation_policy = "the number of updates"

    def init(self, example, *, key):
        return jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros((7, 2, *x.shape), x.dtype), example)

    def update(self, state, batch, *, key):
        return (state[0] + 0.01, batch), {"reward": jnp.mean(batch.reward)}

    def act(self, state, obs, *, key, explore):
        return state[0][None]


@pytest.mark.parametrize("env", [Counter(), Counter(clock=True), make("mujoco/InvertedPendulum-v5")])
@pytest.mark.parametrize("updates, until", [(1, 30), (2, 40)])
def test_rollouts_are_what_happened_since_the_warm_up_in_order_and_by_one_policy(env, updates, until):
    """Of 20 iterations 5 are warm-up; rollouts of 7 end with the 12th and the 19th."""
    _, state = run(Recorder(), env, ON_POLICY, seeds=(3, 4), until=until)
    for seed in range(2):
        count, batch = seed_slice(state.agent, seed)
        assert round(100 * float(count)) == updates
        assert_trees_close(batch.action, np.full_like(batch.action, 0.01 * (updates - 1)), rtol=0)
        over = batch.terminated | batch.truncated
        same = batch.obs[1:] == batch.next_obs[:-1]
        assert same[~over[:-1]].all() and not same[over[:-1]].all(axis=-1).any()
        replay = seed_slice(state.replay, seed)
        assert replay.capacity == 14
        if isinstance(env, Counter):
            clock = np.arange(5 + 7 * (updates - 1), 5 + 7 * updates) % 3
            np.testing.assert_array_equal(batch.obs[..., 0], np.stack([clock, clock], axis=1))
        else:  # the newest rows of the ring are those of the iterations behind the last rollout
            obs = np.asarray(as_arrays(replay).in_order().obs).reshape(7, 2, -1)
            behind = until // 2 - (5 + 7 * updates)
            np.testing.assert_array_equal(obs[: 7 - behind], batch.obs[behind:])


def test_records_of_rollouts_count_updates_and_are_means_over_them():
    records, _ = run(Recorder(), Counter(), ON_POLICY, seeds=(0,))
    assert [r["updates"] for r in records] == [0, 0, 0, 1, 2]
    rewards = [10 * (np.arange(first, first + 7) % 3 + 1).mean() for first in (5, 12)]
    assert [r.get("reward") for r in records] == [None, None, None, *map(pytest.approx, rewards)]
    assert "reward" in records[2] and "reward" not in records[1]


def test_overlap_is_lockstep_while_nothing_is_learned():
    env, settings = make("mujoco/InvertedPendulum-v5"), dataclasses.replace(SETTINGS, warmup_steps=40)
    records, lockstep = run(SAC.tiny(), env, settings)
    again, overlap = run(SAC.tiny(), env, dataclasses.replace(settings, acting="overlap"))
    assert again == records and records[-1]["updates"] == 0
    assert_trees_close(overlap, lockstep, rtol=0, atol=0)


def test_environments_in_the_compiled_loop_refuse_to_overlap():
    settings = dataclasses.replace(SETTINGS, acting="overlap")
    for begin in (init_online, lambda *args, seeds: next(train_online(*args, seeds=seeds))):
        with pytest.raises(ValueError, match="test/counter is stepped.*Remedy: acting='lockstep'"):
            begin(SAC.tiny(), Counter(), settings, seeds=(0,))


def test_a_nan_observation_stops_the_run_and_names_seed_and_step():
    generator = train_online(SAC.tiny(), Counter(nan_at=2), SETTINGS, seeds=(4,))
    with pytest.raises(
        NonFiniteError, match="An observation of seed 4 was NaN or infinite at environment step 10"
    ):
        list(generator)


def test_a_diverging_loss_stops_the_run_and_names_the_metric():
    agent = dataclasses.replace(SAC.tiny(), critic_learning_rate=float("nan"))
    steps = []
    with pytest.raises(NonFiniteError, match="The metric .* of seed 0 is nan at environment step 20"):
        for progress in train_online(agent, Counter(), SETTINGS, seeds=(0,)):
            steps.append(progress.env_step)
    assert steps == [0, 10]  # the last good state was yielded, the bad one not


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(total_steps=0), "total_steps is 0"),
        (dict(num_envs=3), "multiple of num_envs=3"),
        (dict(warmup_steps=-2), "warmup_steps is -2"),
        (dict(eval_every=15), "eval_every is 15"),
        (dict(buffer_capacity=1), "buffer_capacity is 1"),
        (dict(batch_size=-1), "batch_size is -1"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


@pytest.mark.parametrize(
    "agent, changes, message",
    [
        (Recorder(), dict(batch_size=8), "batch_size is 8, but Recorder is on-policy.*batch_size=None"),
        (Recorder(), dict(updates_per_iteration=2), "updates_per_iteration is 2.*updates_per_iteration=1"),
        (Recorder(), dict(acting="overlap"), "acting is 'overlap', but Recorder.*acting='lockstep'"),
        (Recorder(), dict(warmup_steps=28), "takes 14 steps, 7 in each of 2 environments.*room for 12"),
        (Recorder(), dict(buffer_capacity=13), "room for 13"),
        (SAC.tiny(), {}, "batch_size is None, but SAC draws batches from replay. Remedy: batch_size=256"),
    ],
)
def test_settings_that_do_not_suit_the_agent_are_refused(agent, changes, message):
    settings = dataclasses.replace(ON_POLICY, **changes)
    with pytest.raises(ValueError, match=message):
        init_online(agent, make("mujoco/InvertedPendulum-v5"), settings, seeds=(0,))


def test_without_a_warm_up_the_agent_acts_from_the_first_step():
    settings = dataclasses.replace(SETTINGS, warmup_steps=0)
    records, state = run(Counting(), Counter(), settings, seeds=(0,), until=10)
    assert records[-1]["updates"] == 5
    actions = np.asarray(seed_slice(state.replay, 0).data.action)[:10, 0]
    np.testing.assert_allclose(actions, 0.01 * np.repeat(np.arange(5), 2), atol=1e-7)


def test_an_unknown_way_of_acting_is_refused():
    settings = dataclasses.replace(SETTINGS)
    object.__setattr__(settings, "acting", "async")  # the annotation, checked in tests only, refuses it too
    with pytest.raises(ValueError, match="acting is 'async'; it must be 'lockstep' or 'overlap'"):
        settings.__post_init__()


@pytest.mark.parametrize("size", ["smoke", "cpu", "paper"])
@pytest.mark.parametrize("env", ["gymnax/Pendulum-v1", "mujoco/Hopper-v5"])
def test_presets_are_possible_settings(size, env):
    assert OnlineSettings.preset(size, env).total_steps >= 300
    agent = PPO().resized(size)
    settings = OnlineSettings.preset(size, env, agent)
    settings.check(Counter(), agent)
    assert settings.warmup_steps == 0 and settings.num_updates(agent, settings.total_steps) >= 10


def test_the_buffer_never_allocates_more_than_the_run_can_fill():
    settings = dataclasses.replace(SETTINGS, buffer_capacity=10**6)
    state = init_online(SAC.tiny(), Counter(), settings, seeds=(0, 1))
    assert state.replay.data.reward.shape == (2, 40)


def test_different_seeds_have_different_parameters_and_resets():
    state = init_online(SAC.tiny(), make("gymnax/Pendulum-v1"), SETTINGS, seeds=(0, 1))
    assert not np.allclose(*state.agent.actor.net.layers[0].bias)
    assert not np.allclose(state.obs[0], state.obs[1])
    again = init_online(SAC.tiny(), make("gymnax/Pendulum-v1"), SETTINGS, seeds=(1,))
    assert_trees_close(again.obs[0], state.obs[1], rtol=0, atol=0)
