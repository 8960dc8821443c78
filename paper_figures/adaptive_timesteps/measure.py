"""Why uniform times are not best, measured on the digits; with five seeds each.

    python paper_figures/adaptive_timesteps/measure.py variance         gradient variance and loss over t
    python paper_figures/adaptive_timesteps/measure.py interdependence  what training at some t does to others
    python paper_figures/adaptive_timesteps/measure.py surrogate        how well a few times stand for all
    ... --smoke                                                          a few steps of it, to see that it works

The paper's figures 2, 4 and the premise of its equation 14, at the size of `run.py`'s studies. A file that is there
is not made again.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array
from run import RESULTS, STUDIES, adaptive, data_of, rounded

from eqgen.algorithms.diffusion import Diffusion
from eqgen.data.examples import ExampleData, Examples
from eqgen.files import replacing
from eqgen.offline import OfflineSettings, OfflineState, init_offline, train_offline
from eqgen.provenance import provenance
from eqgen.timesteps.heuristics import StaticTimesteps, gradient_variance
from eqgen.timesteps.laws import Table
from eqgen.timesteps.times import DiffusionChain
from eqgen.timesteps.weightings import BoundWeight


SEEDS = (0, 1, 2, 3, 4)
STUDY = STUDIES["digits-linear"]


def learner_with(timesteps: Any, updates: int) -> Diffusion:
    learner = Diffusion(timesteps, network="mlp").resized("cpu")
    return dataclasses.replace(learner, hidden=STUDY.hidden, total_updates=updates)


def trained(learner: Diffusion, train: ExampleData, state: OfflineState | None = None) -> OfflineState:
    """The state of all seeds after the learner's updates, from its beginning or from a state."""
    settings = OfflineSettings(STUDY.batch_size, log_every=learner.total_updates, checkpoint_every=0)
    state = fresh(learner, train) if state is None else state
    for progress in train_offline(learner, train, settings, seeds=SEEDS, state=state):
        state = progress.state
    return state


def fresh(learner: Diffusion, train: ExampleData) -> OfflineState:
    """The state of all seeds before training."""
    example = Examples(train.examples().x[0])
    return init_offline(lambda key: learner.init(example, key=key), seeds=SEEDS)


def losses(learner: Diffusion, models: Any, x: Array, ts: Array) -> np.ndarray:
    """The loss on all examples at each of the times, [seeds, times], with one table of noise."""

    @eqx.filter_jit
    @eqx.filter_vmap
    def judge(model):
        def at(t):
            keys = jr.split(jr.fold_in(jr.key(2), t), len(x))
            return jnp.mean(jax.vmap(lambda x, key: learner.objective(model, x, t, key))(x, keys))

        return jax.lax.map(at, ts)

    return np.asarray(judge(models))


def variance(lengths: tuple[int, ...] = (0, 2_000, 10_000)) -> dict[str, Any]:
    """tr Cov of the gradient and the loss over t, before training and after 2000 and 10000 uniform steps."""
    train, held_out = data_of("digits")
    x, rows = held_out.examples().x, {}
    ts = np.unique(np.round(np.concatenate([np.linspace(0, 999, 16), [5, 15, 30, 100]])).astype(int))
    for betas in ("linear", "cosine", "quad"):
        chain, state = DiffusionChain(1000, betas=betas), None
        rows[betas] = {"c": rounded(BoundWeight()(jnp.asarray(ts), chain) * np.log(2)), "after": {}}
        for updates in lengths:
            learner = learner_with(StaticTimesteps(chain), max(updates, 1))
            state = trained(learner, train, state) if updates else fresh(learner, train)
            models = state.learner.model.online
            measure = partial(
                gradient_variance, learner.objective, x=x[:256], ts=jnp.asarray(ts), block=64, key=jr.key(3)
            )
            found = eqx.filter_jit(eqx.filter_vmap(lambda model, measure=measure: measure(model)))(models)
            rows[betas]["after"][str(updates)] = {
                "variance": rounded(found),
                "loss": rounded(losses(learner, models, x, jnp.asarray(ts))),
            }
            print(betas, updates, np.asarray(found).mean(axis=0).round(2), flush=True)
    return {"t": ts.tolist(), "schedules": rows}


def interdependence(before: int = 10_000, more: int = 200) -> dict[str, Any]:
    """Changes of the held-out loss in ten parts of the times, by the part that 200 more steps train alone."""
    train, held_out = data_of("digits")
    x, chain = held_out.examples().x, DiffusionChain(1000)
    base = learner_with(StaticTimesteps(chain), before)
    state = trained(base, train)
    ts = jnp.arange(5, 1000, 10)
    by_part = lambda values: values.reshape(len(SEEDS), 10, 10).mean(axis=-1)
    start = by_part(losses(base, state.learner.model.online, x, ts))
    changes = []
    for part in range(10):
        inside = np.arange(1000) // 100 == part
        learner = learner_with(StaticTimesteps(chain, law=Table(jnp.asarray(inside, float))), before + more)
        then = trained(learner, train, state).learner.model.online
        changes.append(by_part(losses(learner, then, x, ts)) - start)
        print(part, changes[-1].mean(axis=0).round(4), flush=True)
    return {"loss": rounded(start), "change": rounded(np.stack(changes, axis=1))}


def surrogate(looks: int = 200) -> dict[str, Any]:
    """Correlations over looks of the total drop with the drop at S: as selected, at random, the first times."""
    train, _ = data_of("digits")
    chain, rows = DiffusionChain(1000), {}
    for size in (1, 3, 10):
        sampler = adaptive(subset_size=size)(chain)
        learner = learner_with(sampler, looks * sampler.look_every)
        settings = OfflineSettings(STUDY.batch_size, log_every=sampler.look_every, checkpoint_every=0)
        state = fresh(learner, train)
        drops, subsets = [], [np.asarray(state.learner.timesteps.subset)]
        for progress in train_offline(learner, train, settings, seeds=SEEDS, state=state):
            of = progress.state.learner.timesteps
            row = (np.asarray(of.pointer) - 1) % sampler.queue_length
            drops.append(np.asarray(of.queue)[np.arange(len(SEEDS)), row])
            subsets.append(np.asarray(of.subset))
        subsets.pop()
        drops, subsets = np.stack(drops, axis=1), np.stack(subsets, axis=1)  # [seeds, looks, ...]
        rng = np.random.default_rng(0)
        chosen = {
            "selected": subsets,
            "random": rng.integers(0, drops.shape[-1], subsets.shape),
            "first": np.broadcast_to(np.arange(size), subsets.shape),
        }
        rows[str(size)] = {
            name: [rounded(correlation(d, s)) for d, s in zip(drops, of)] for name, of in chosen.items()
        }
        rows[str(size)]["times"] = np.asarray(sampler.swept)[subsets[0, ::10]].tolist()
        print(size, {name: np.mean(values) for name, values in rows[str(size)].items()}, flush=True)
    return {"looks": looks, "subsets": rows}


def correlation(drops: np.ndarray, subsets: np.ndarray) -> float:
    """Of the sum over S with the sum over all, after three looks, from which on S is selected."""
    some = np.take_along_axis(drops, subsets, axis=1).sum(axis=1)
    return np.corrcoef(some[3:], drops.sum(axis=1)[3:])[0, 1]


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "variance": variance,
    "interdependence": interdependence,
    "surrogate": surrogate,
}

SMOKE = {
    "variance": dict(lengths=(0, 2, 4)),
    "interdependence": dict(before=2, more=2),
    "surrogate": dict(looks=5),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measure", choices=list(MEASURES))
    parser.add_argument("--smoke", action="store_true", help="a few steps of it")
    args = parser.parse_args()
    name, fields = args.measure, SMOKE[args.measure] if args.smoke else {}
    path = RESULTS / f"{name}.json"
    if not path.exists():
        content = {"seeds": list(SEEDS), "provenance": provenance(), **MEASURES[name](**fields)}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n")
    print(path)
