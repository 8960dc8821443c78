"""The offline loop: what depends on (seed, update) alone, what records say, what stops it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.algorithms.base import AbstractOfflineLearner
from eqgen.loops import NonFiniteError
from eqgen.offline import OfflineSettings, init_offline, train_offline
from helpers import assert_trees_close


class Numbers(eqx.Module):
    """A set of numbers."""

    values: jax.Array

    def sample(self, n, *, key):
        return self.values[jr.randint(key, (n,), 0, len(self.values))]


class Mean(AbstractOfflineLearner):
    """Learns the mean of numbers; after `breaks` updates its loss is NaN."""

    total_updates: int = 12
    breaks: int = 1000
    sizes = {"smoke": {}}

    def init(self, example, *, key):
        return {"mean": jr.normal(key), "count": jnp.int32(0)}

    def update(self, state, batch, *, key):
        mean = state["mean"] + 0.1 * (jnp.mean(batch) - state["mean"]) + 0.01 * jr.normal(key)
        loss = jnp.where(state["count"] >= self.breaks, jnp.nan, jnp.mean((batch - mean) ** 2))
        return {"mean": mean, "count": state["count"] + 1}, {"loss": loss}


DATA = Numbers(jnp.linspace(0.0, 1.0, 50))


def run(seeds, *, learner=None, settings=None, state=None):
    learner = learner or Mean()
    settings = settings or OfflineSettings(batch_size=4, log_every=4, checkpoint_every=6)
    state = state or init_offline(lambda key: learner.init(None, key=key), seeds=seeds)
    return list(train_offline(learner, DATA, settings, seeds=seeds, state=state))


def without_clock(progress):
    return [{k: v for k, v in record.items() if k != "wall_time"} for p in progress for record in p.records]


def test_it_stops_at_multiples_of_both_intervals_and_at_the_end():
    assert [progress.step for progress in run((0,))] == [4, 6, 8, 12]


def test_a_seed_gives_the_same_run_whichever_stand_beside_it():
    together, alone = run((3, 5)), run((5,))
    assert without_clock(alone) == [r for r in without_clock(together) if r["seed"] == 5]
    assert together[-1].state.learner["mean"][1] == alone[-1].state.learner["mean"][0]
    assert together[-1].state.learner["mean"][0] != together[-1].state.learner["mean"][1]


def test_going_on_from_any_state_is_as_never_having_stopped():
    whole = run((0, 1))
    for stopped in range(3):
        rest = run((0, 1), state=whole[stopped].state)
        assert without_clock(rest) == without_clock(whole[stopped + 1 :])
        assert_trees_close(rest[-1].state, whole[-1].state, rtol=0, atol=0)


def test_intervals_do_not_change_what_is_learned_and_records_are_means():
    often = run((0,), settings=OfflineSettings(batch_size=4, log_every=1, checkpoint_every=0))
    once = run((0,), settings=OfflineSettings(batch_size=4, log_every=12, checkpoint_every=0))
    assert_trees_close(often[-1].state, once[-1].state, rtol=0, atol=0)
    losses = [progress.records[0]["loss"] for progress in often]
    np.testing.assert_allclose(once[0].records[0]["loss"], np.mean(losses), rtol=1e-6)


def test_nothing_is_yielded_for_a_chunk_whose_loss_is_not_finite():
    steps = train_offline(
        learner := Mean(breaks=5),
        DATA,
        OfflineSettings(batch_size=4, log_every=4, checkpoint_every=0),
        seeds=(7,),
        state=init_offline(lambda key: learner.init(None, key=key), seeds=(7,)),
    )
    assert next(steps).step == 4
    with pytest.raises(NonFiniteError, match="The metric loss of seed 7 is nan at update 8"):
        next(steps)


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"log_every": 0}, {"checkpoint_every": -1}])
def test_settings_that_cannot_be(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} is"):
        OfflineSettings(**fields)
