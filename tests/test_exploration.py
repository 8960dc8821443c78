import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from eqgen.exploration import AnnealedNoise, add_noise


def run(noise, steps):
    step = lambda state, i: (noise.update(state, i), noise.std(state))
    state, stds = jax.lax.scan(step, noise.init(), jnp.arange(steps))
    return noise.std(state), stds


@pytest.mark.parametrize("target, limit", [(-0.9, 0.0984), (-0.5, 0.1468)])
def test_the_annealed_std_ends_at_the_entropy_target(target, limit):
    """exp(target) / sqrt(2 pi e), whatever the number of action dimensions (specification, test 14)."""
    last, stds = run(AnnealedNoise(target_entropy=target), 60_000)
    assert float(stds[0]) == pytest.approx(0.5, rel=1e-5)
    assert float(last) == pytest.approx(
        limit, rel=2e-2
    )  # Adam circles the fixed point by a fraction of a step
    assert float(jnp.exp(target) / jnp.sqrt(2 * jnp.pi * jnp.e)) == pytest.approx(limit, abs=1e-4)


def test_it_moves_once_a_period_by_one_adam_step():
    _, stds = run(AnnealedNoise(period=10, learning_rate=0.03), 31)
    changed = jnp.nonzero(jnp.diff(stds))[0]
    assert changed.tolist() == [9, 19, 29]
    # Adam's first step has the length of the learning rate, in the log of the scale.
    assert float(jnp.log(stds[0] / stds[10])) == pytest.approx(0.03, rel=1e-4)


def test_noise_has_its_std_and_stays_in_the_box():
    keys = jr.split(jr.key(0), 20_000)
    moved = jax.vmap(lambda k: add_noise(jnp.zeros(1), 0.1, key=k))(keys)
    assert float(jnp.std(moved)) == pytest.approx(0.1, rel=0.03)  # five standard errors, 1 / sqrt(2 n) each
    assert float(jnp.max(jnp.abs(jax.vmap(lambda k: add_noise(jnp.ones(1), 0.5, key=k))(keys)))) <= 1.0
