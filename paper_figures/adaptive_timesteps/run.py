"""Which timesteps should a diffusion model be trained on? The adaptive sampler and the heuristics, side by side.

    python paper_figures/adaptive_timesteps/run.py                        what there is to run
    python paper_figures/adaptive_timesteps/run.py digits-linear          all samplers of a study
    python paper_figures/adaptive_timesteps/run.py digits-linear uniform  one of them

Every seed has the same first network, batches and noise under all samplers; the bound is judged on held-out data
with one table of noise for all. Curves are over updates; what an update costs is `relative_cost` of the file
(forward passes of the looks over those of training) and, in seconds, `benchmarks/timesteps.py`. A file that is
there is not made again.

The seeds reported are 0 to 4. The look's settings (`ADAPTIVE` below), the widths and the learning rates were chosen
on seeds 100 to 105.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqgen.algorithms.diffusion import Diffusion
from eqgen.data import images, points
from eqgen.data.examples import ExampleData, Examples
from eqgen.data.mazes import collect_maze2d
from eqgen.data.normalizer import Normalizer
from eqgen.data.windows import maze2d_windows
from eqgen.envs.maze import MAZES
from eqgen.files import replacing
from eqgen.hyperparameters import to_json
from eqgen.metrics import fit_classifier, frechet_distance, mmd2, sliced_wasserstein2
from eqgen.offline import OfflineSettings, init_offline, train_offline
from eqgen.provenance import provenance
from eqgen.timesteps.adaptive import AdaptiveTimesteps
from eqgen.timesteps.base import AbstractTimestepSampler
from eqgen.timesteps.heuristics import SecondMomentTimesteps, StaticTimesteps, VarianceTimesteps
from eqgen.timesteps.laws import Beta, LogitNormal, LogNormal, Speed, SpeedPairs
from eqgen.timesteps.times import DiffusionChain
from eqgen.timesteps.weightings import P2, BoundWeight, MinSNR, SpeedWeight


RESULTS = Path(__file__).parent / "results"
BINS = 20
"""Of the recorded laws of t."""

ADAPTIVE: dict[str, Any] = dict(
    policy="vector", sweep=100, look_every=20, reward_batch=64, learning_rate=3e-2
)


def adaptive(**fields: Any) -> Callable[[DiffusionChain], AbstractTimestepSampler]:
    """The robust preset with a strided sweep, a smaller batch for the reward, a faster policy (there are 500 looks
    in a run, where the paper has 20,000), and whatever else differs."""
    return lambda chain: AdaptiveTimesteps(chain, **(ADAPTIVE | fields))


HEURISTICS = {
    "uniform": StaticTimesteps,
    "p2": lambda chain: StaticTimesteps(chain, weighting=P2()),
    "min-snr": lambda chain: StaticTimesteps(chain, weighting=MinSNR()),
    "log-normal": lambda chain: StaticTimesteps(chain, law=LogNormal()),
    "logit-normal": lambda chain: StaticTimesteps(chain, law=LogitNormal()),
    "speed": lambda chain: StaticTimesteps(chain, Speed(), SpeedWeight(), SpeedPairs()),
    "beta": lambda chain: StaticTimesteps(chain, law=Beta()),
    "second-moment": SecondMomentTimesteps,
    "variance": lambda chain: VarianceTimesteps(chain),
}
COMPARED = HEURISTICS | {
    "adaptive": adaptive(),
    "adaptive-uncapped": adaptive(reward=BoundWeight()),
    "adaptive-min-snr": adaptive(weighting=MinSNR()),
    "adaptive-paper": lambda chain: AdaptiveTimesteps.paper(chain, policy="vector"),
    "adaptive-released": lambda chain: AdaptiveTimesteps.paper(chain, fresh_noise=True, policy="vector"),
}
ABLATIONS = {
    "subset-1": adaptive(subset_size=1),
    "subset-10": adaptive(subset_size=10),
    "fresh-noise": adaptive(common_noise=False),
    "every-10": adaptive(look_every=10),
    "every-40": adaptive(look_every=40),
    "share-0": adaptive(uniform_share=0.0),
    "slow-policy": adaptive(learning_rate=1e-2),
    "whole-sweep": adaptive(sweep=None, reward_batch=None),
    "entropy-standard": adaptive(entropy_mode="standard"),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """One set and one noise schedule, and the samplers compared on it."""

    data: str
    betas: str
    samplers: dict[str, Callable[[DiffusionChain], AbstractTimestepSampler]]
    num_steps: int = 1000
    updates: int = 10_000
    eval_every: int = 500
    batch_size: int = 128
    network: str = "mlp"
    hidden: tuple[int, ...] = (128, 128, 128)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def learner(self, sampler: str) -> Diffusion:
        chain = DiffusionChain(self.num_steps, betas=self.betas)
        learner = Diffusion(self.samplers[sampler](chain), network=self.network).resized("cpu")
        fields = dict(hidden=self.hidden, num_heads=2, total_updates=self.updates)
        return dataclasses.replace(learner, **fields)


FEWER = {
    name: COMPARED[name]
    for name in (
        "uniform",
        "adaptive",
        "adaptive-uncapped",
        "min-snr",
        "log-normal",
        "speed",
        "second-moment",
    )
}
STUDIES = {
    f"{data}-{betas}": Study(data, betas, COMPARED if data == "digits" else FEWER)
    for data in ("digits", "patches", "ring")
    for betas in ("linear", "cosine", "quad")
} | {
    "digits-linear-ablation": Study("digits", "linear", ABLATIONS),
    "plans-linear": Study(
        "plans", "linear", FEWER, num_steps=100, updates=5_000, eval_every=500, batch_size=64, network="dit"
    ),
    "ring-smoke": Study(
        "ring",
        "linear",
        {"uniform": StaticTimesteps, "adaptive": lambda chain: AdaptiveTimesteps(chain, look_every=2)},
        num_steps=20,
        updates=4,
        eval_every=2,
        batch_size=8,
        hidden=(8,),
        seeds=(0, 1),
    ),
}


def data_of(name: str) -> tuple[ExampleData, ExampleData]:
    """What is trained on, and what is held out; the same for all seeds."""
    if name == "digits":
        return images.digits().split(297, key=jr.key(0))
    if name == "patches":
        return images.photo_patches()
    if name == "plans":
        train, held_out = maze_plans(seed=0), maze_plans(seed=1, every=250)
        units = Normalizer.fit(train.reshape(-1, train.shape[-1]))
        return ExampleData(np.asarray(units(train))), ExampleData(np.asarray(units(held_out)))
    both = ExampleData(np.asarray(points.POINTS[name](20_000, key=jr.key(0))))
    return both.split(2_000, key=jr.key(1))


def maze_plans(seed: int, every: int = 5, size: int = 60_000) -> np.ndarray:
    """Plans of 16 states, 15 steps apart, out of runs through Maze2D-umaze by the waypoint controller: what the
    denoiser of `DiffusionPlanner` learns, with the transformer that it has (`network="dit"`)."""
    episodes, _ = collect_maze2d(MAZES["umaze"](), size=size, noise=0.5, seed=seed)
    windows = maze2d_windows(episodes, horizon=16, run_on=True)
    return np.asarray(windows.take(episodes, np.arange(0, len(windows), every)).states)


def run(
    study: Study, sampler: str, path: Path, *, seeds: Sequence[int] | None = None, verbose: bool = True
) -> Path:
    """Trains and judges one sampler of a study for all seeds side by side; **returns** the result file."""
    seeds = study.seeds if seeds is None else tuple(seeds)
    learner, (train, held_out) = study.learner(sampler), data_of(study.data)
    settings = OfflineSettings(study.batch_size, log_every=study.eval_every, checkpoint_every=0)
    example = jax.tree.map(lambda x: x[0], train.examples())
    state = init_offline(lambda key: learner.init(Examples(example.x), key=key), seeds=seeds)
    judge, content = (
        judging(learner, train, held_out),
        {"steps": [], "bound": [], "bound_but_last": [], "law": []},
    )

    def record(step, state):
        whole, but_last, law = jax.tree.map(np.asarray, judge(state.learner))
        content["steps"].append(step)
        for name, value in (("bound", whole), ("bound_but_last", but_last), ("law", law)):
            content[name].append(rounded(value))
        if verbose:
            print(
                f"{sampler:18} {step:6}  bound {whole.mean():.4f} +- {whole.std():.4f}  {seconds:6.1f} s",
                flush=True,
            )

    seconds, begun = 0.0, time.perf_counter()
    record(0, state)
    records = []
    begun = time.perf_counter()
    for progress in train_offline(learner, train, settings, seeds=seeds, state=state):
        seconds += time.perf_counter() - begun
        state, records = progress.state, records + progress.records
        record(progress.step, state)
        begun = time.perf_counter()
    content = {
        "study": {
            field.name: getattr(study, field.name)
            for field in dataclasses.fields(study)
            if field.name != "samplers"
        },
        "sampler": sampler,
        "seeds": list(seeds),
        "learner": to_json(learner),
        "provenance": provenance(),
        "relative_cost": cost(learner, study),
        "training_seconds": round(seconds, 1),
        **content,
        "losses": [[rounded(r["loss"]) for r in records if r["seed"] == seed] for seed in seeds],
        "samples": samples(learner, state.learner, study, train, held_out),
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")
    return path


def judging(learner: Diffusion, train: ExampleData, held_out: ExampleData) -> Callable:
    """The function of a state (of all seeds) to the bound, the bound without the last step, and the law of t in
    bins of equal width, a mean over examples of the training set."""
    x = held_out.examples().x
    some = train.take(jnp.arange(0, len(train), max(1, len(train) // 256))).x
    edges = np.linspace(0, learner.times.num_steps, BINS + 1).astype(int)

    @eqx.filter_jit
    @eqx.filter_vmap
    def judge(state):
        bound = learner.bound(
            state.model.average, x, half_bin=held_out.half_bin, per_step=min(32, len(x)), key=jr.key(0)
        )
        law = learner.timesteps.probabilities(state.timesteps, some)
        return (
            bound.total(),
            bound.total(last=False),
            jnp.stack([law[a:b].sum() for a, b in zip(edges, edges[1:])]),
        )

    return judge


def cost(learner: Diffusion, study: Study) -> float:
    """Forward passes of the looks over those of training."""
    if isinstance(learner.timesteps, AdaptiveTimesteps):
        return learner.timesteps.relative_cost(study.batch_size)
    if isinstance(learner.timesteps, VarianceTimesteps):
        sampler = learner.timesteps
        return sampler.sweep * sampler.num_examples / (sampler.measure_every * study.batch_size)
    return 0.0


def samples(
    learner: Diffusion, states: Any, study: Study, train: ExampleData, held_out: ExampleData, n: int = 2000
) -> dict[str, Any]:
    """Distances of `n` samples (DDIM, 50 steps, the same noise for all) from the training set, by seed, and those
    of the held-out data, which no model need fall below."""
    n = n if study.updates > 100 else 16
    real = train.take(jr.randint(jr.key(10), (min(n, len(train)),), 0, len(train))).x
    others = held_out.examples().x
    clip = None if train.levels is None else (-1.0, 1.0)
    steps = min(50, study.num_steps)

    @eqx.filter_jit
    @eqx.filter_vmap
    def draw(state):
        return jax.vmap(lambda key: learner.sample(state, key=key, num_steps=steps, clip=clip))(
            jr.split(jr.key(11), n)
        )

    measures = {
        "mmd2": lambda x: mmd2(x, real),
        "sliced_wasserstein2": lambda x: sliced_wasserstein2(
            x[: len(others)], real[: len(others)], key=jr.key(12)
        ),
    }
    if study.data == "digits":
        classifier = fit_classifier(train.examples().x, train.labels, num_classes=10, key=jr.key(13))
        features = jax.vmap(classifier.features)
        measures[f"frechet ({classifier.name})"] = lambda x: frechet_distance(features(x), features(real))
    drawn = draw(states)
    return {
        name: {"seeds": [rounded(measure(x)) for x in drawn], "held_out": rounded(measure(others))}
        for name, measure in measures.items()
    }


def rounded(value: Any) -> Any:
    """Five digits of a number, or of each in an array, as JSON can hold them."""
    return np.vectorize(lambda x: float(f"{x:.5g}"), otypes=[float])(np.asarray(value, float)).tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Trains diffusion models with many timestep samplers; see the file's head."
    )
    parser.add_argument("study", nargs="?", choices=list(STUDIES))
    parser.add_argument("samplers", nargs="*")
    chosen = parser.parse_args()
    if chosen.study is None:
        for name, study in STUDIES.items():
            print(f"{name}: {study.updates} updates, seeds {study.seeds}: {', '.join(study.samplers)}")
    else:
        study = STUDIES[chosen.study]
        if unknown := set(chosen.samplers) - set(study.samplers):
            parser.error(
                f"no samplers {', '.join(sorted(unknown))} in {chosen.study}; it has {', '.join(study.samplers)}"
            )
        for sampler in chosen.samplers or study.samplers:
            path = RESULTS / f"{chosen.study}_{sampler}.json"
            if not path.exists():
                print(run(study, sampler, path), flush=True)
