"""Evaluation: episodes with returns known in advance; statistics against closed forms and rliable."""

from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.envs.base import AbstractEnv
from eqgen.evaluation import bootstrap_interval, iqm, rollout_returns
from eqgen.types import TimeStep


class Countdown(AbstractEnv):
    """The state counts the steps left; the reward is the action, and a fortune after the end."""

    name: str = "countdown"
    obs_shape: tuple[int, ...] = (1,)
    action_dim: int = 1
    max_steps: int = 6
    truncates: bool = False

    def reset(self, *, key):
        left = jr.randint(key, (), 1, 5)
        return left, left[None].astype(float)

    def step(self, state: Any, action, *, key):
        over = state <= 1
        reward = jnp.where(state <= 0, 1e6, action[0])
        ended = (jnp.array(False), over) if self.truncates else (over, jnp.array(False))
        return state - 1, TimeStep(state[None] - 1.0, reward, *ended)


class HostCountdown:
    """The same on the host: as many environments as asked for, each of which starts again at once."""

    def __init__(self):
        self.made = []

    def make(self, num_envs, seed):
        self.made.append((num_envs, seed))
        return self

    def reset(self):
        self.left = 1 + np.arange(self.made[-1][0]) % 4
        return self.left[:, None].astype(np.float32)

    def step(self, action):
        self.left = self.left - 1
        over = self.left == 0
        timestep = SimpleNamespace(reward=action[:, 0], terminated=over, truncated=np.zeros_like(over))
        self.left = np.where(over, 4, self.left)
        return self.left[:, None].astype(np.float32), timestep

    def close(self):
        self.made.append("closed")


def act_obs(obs, key):
    return obs


@pytest.mark.parametrize("truncates", [False, True])
def test_return_is_the_sum_up_to_the_end(truncates):
    env = Countdown(truncates=truncates)
    returns, lengths = rollout_returns(act_obs, env, 40, key=jr.key(0))
    assert set(lengths.tolist()) == {1, 2, 3, 4}
    np.testing.assert_allclose(returns, lengths * (lengths + 1) / 2)


def test_max_steps_bounds_an_episode():
    env = Countdown(max_steps=2)
    _, lengths = rollout_returns(act_obs, env, 40, key=jr.key(0))
    assert set(lengths.tolist()) == {1, 2}


def test_episodes_do_not_depend_on_their_number():
    noisy = lambda obs, key: jr.normal(key, (1,))
    few, _ = rollout_returns(noisy, Countdown(), 3, key=jr.key(1))
    many, _ = rollout_returns(noisy, Countdown(), 7, key=jr.key(1))
    np.testing.assert_array_equal(few, many[:3])
    assert len(set(many.tolist())) == 7


def test_new_weights_do_not_compile_anew():
    traces = []

    def policy(gain, obs, key):
        traces.append(None)
        return gain * obs

    one, _ = rollout_returns(eqx.Partial(policy, jnp.array(1.0)), Countdown(), 3, key=jr.key(0))
    count = len(traces)
    two, _ = rollout_returns(eqx.Partial(policy, jnp.array(2.0)), Countdown(), 3, key=jr.key(0))
    assert len(traces) == count
    np.testing.assert_allclose(two, 2 * one)


def test_seeds_vmap():
    gains = jnp.arange(1.0, 4.0)
    run = lambda gain: rollout_returns(lambda obs, key: gain * obs, Countdown(), 5, key=jr.key(0))[0]
    np.testing.assert_allclose(jax.vmap(run)(gains), gains[:, None] * run(1.0)[None, :])


def test_host_episodes_end_once_although_the_environment_goes_on():
    env = HostCountdown()
    returns, lengths = rollout_returns(act_obs, env, 6, key=jr.key(0))
    np.testing.assert_array_equal(lengths, [1, 2, 3, 4, 1, 2])
    np.testing.assert_allclose(returns, lengths * (lengths + 1) / 2)
    assert env.made[-1] == "closed"


def test_host_noise_differs_over_environments_and_steps():
    """Were a key used twice, two of the actions, and so two differences of returns, would be equal."""
    env = HostCountdown()
    draws = []

    def policy(obs, key):
        action = jr.normal(key, (1,))
        jax.debug.callback(lambda x: draws.append(float(x)), action[0])
        return action

    rollout_returns(policy, env, 4, key=jr.key(0))
    jax.effects_barrier()
    assert len(draws) == 16 and len(set(draws)) == 16


def test_zero_episodes_are_refused():
    with pytest.raises(ValueError, match="at least one episode"):
        rollout_returns(act_obs, Countdown(), 0, key=jr.key(0))


def test_iqm_is_the_mean_of_the_middle_half():
    assert iqm(np.array([100.0, 1.0, 2.0, -50.0])) == 1.5
    scores = np.random.default_rng(0).normal(size=(7, 3))
    assert iqm(scores) == pytest.approx(iqm(scores.ravel()[::-1]))
    assert iqm(scores * -2 + 1) == pytest.approx(-2 * iqm(scores) + 1)


def test_bootstrap_matches_the_normal_interval_of_a_mean():
    """For many runs the interval of a mean is mean ± 1.96 s / sqrt(n)."""
    scores = np.random.default_rng(0).normal(5.0, 2.0, size=400)
    low, high = bootstrap_interval(scores, np.mean, num_resamples=4000)
    half = 1.96 * scores.std() / 20
    # The 2.5 % quantile of 4000 draws has a standard error of about 4 % of their standard deviation (0.1).
    np.testing.assert_allclose([low, high], [scores.mean() - half, scores.mean() + half], atol=0.02)


def test_bootstrap_is_stratified_over_tasks():
    """Tasks without spread leave nothing to resample, however far apart the tasks are."""
    scores = np.tile([0.0, 100.0], (5, 1))
    assert bootstrap_interval(scores, np.mean, num_resamples=50) == (50.0, 50.0)


def test_bootstrap_refuses_bad_arguments():
    with pytest.raises(ValueError, match="shape"):
        bootstrap_interval(np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="confidence is 95"):
        bootstrap_interval(np.zeros(4), confidence=95.0)


def test_statistics_agree_with_rliable():
    library = pytest.importorskip("rliable.library")
    metrics = pytest.importorskip("rliable.metrics")
    scores = np.random.default_rng(1).normal(size=(10, 4)) + np.arange(4)[None]
    assert iqm(scores) == pytest.approx(metrics.aggregate_iqm(scores))
    _, theirs = library.get_interval_estimates(
        {"x": scores},
        lambda x: np.array([metrics.aggregate_iqm(x)]),
        reps=3000,
        random_state=np.random.RandomState(0),
    )
    ours = bootstrap_interval(scores, iqm, num_resamples=3000)
    # Two Monte Carlo estimates of the same quantiles; each has a standard error of about 0.01.
    np.testing.assert_allclose(ours, theirs["x"].ravel(), atol=0.05)
