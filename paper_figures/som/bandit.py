"""SOM's actor on a bandit whose critic is exact: what the estimator and the regression target alone achieve.

    python paper_figures/som/bandit.py             every variant, 25 000 updates each
    python paper_figures/som/bandit.py safe        one variant

The action density is the four-mode mixture `toy/mixture` (weights .4 .3 .2 .1, S = 0.15) and Q its logarithm,
at alpha = 1 and unnormalised. Noise is mapped to actions by the trained actor in one step and, from the same
noise, by the probability-flow ODE of the analytic score (diffrax, tolerance 1e-5). Each variant leaves
`results/bandit_<variant>.json` with the settings, the measures below, and samples to draw.

- `fractions`: share of the one-step samples that belong to each mode (exact: the weights).
- `within_3_std`: share within 3 S of a mode (exact sampler: 0.99).
- `ode_distance`: median distance between the one-step action and the end of its ODE path.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqgen.algorithms.som import SOM
from eqgen.envs.catalog import make
from eqgen.files import replacing
from eqgen.hyperparameters import to_json
from eqgen.networks.policies import MeanVelocity
from eqgen.ode import probability_flow
from eqgen.provenance import provenance
from eqgen.tree import filter_fori_loop, polyak


RESULTS = Path(__file__).parent / "results"
UPDATES, BATCH, SAMPLES, SEED = 25_000, 256, 4096, 0

# Common to all variants; the learning rate decays linearly.
COMMON = dict(
    num_score_samples=100,
    inverse_temperature=1.0,
    q_normalization="none",
    actor_learning_rate=1e-3,
    final_actor_learning_rate=5e-5,
    decay_start=0,
    max_grad_norm=1.0,
    loss_constant=1e-2,
    loss_reduction="sum",
    policy_delay=1,
)
VARIANTS = {
    "safe": SOM.safe(**COMMON),
    "paper": SOM.paper(**(COMMON | dict(q_normalization="batch"))),
    "safe-ode": SOM.safe(**COMMON, target="ode"),
    "denoising": SOM.safe(**COMMON, estimator="denoising"),
}


def train(agent: SOM, updates: int, *, key):
    """The Polyak average (rate 0.005) of the actor after `updates` steps on uniformly drawn actions."""
    bandit = make("toy/mixture")
    q = lambda obs, action: bandit.log_density(action)
    obs = jnp.zeros((BATCH, 1))
    actor = MeanVelocity(1, 2, agent.hidden, agent.activation, key=key)
    opt_state = agent.actor_optimizer.init(eqx.filter(actor, eqx.is_inexact_array))

    def step(i, carry):
        actor, average, opt_state, _ = carry
        action_key, update_key = jr.split(jr.fold_in(key, i))
        actions = jr.uniform(action_key, (BATCH, 2), minval=-1.0, maxval=1.0)
        actor, opt_state, metrics = agent.update_actor(actor, opt_state, q, obs, actions, key=update_key)
        return actor, polyak(average, actor, 0.005), opt_state, metrics["actor/loss"]

    run = eqx.filter_jit(lambda carry: filter_fori_loop(0, updates, step, carry))
    _, average, _, loss = run((actor, actor, opt_state, jnp.zeros(())))
    if not np.isfinite(loss):
        raise FloatingPointError(f"The actor's loss is {loss} after {updates} updates.")
    return average


def measure(agent: SOM, actor: MeanVelocity, *, key) -> dict:
    """The measures named above, and the first 1000 samples."""
    bandit = make("toy/mixture")
    noise = jr.normal(key, (SAMPLES, 2))
    actions = jax.jit(jax.vmap(lambda eps: agent.generate(actor, jnp.zeros(1), eps)))(noise)
    schedule = agent.noise_schedule
    score = lambda x, t: bandit.density.perturbed(schedule.alpha(t), schedule.sigma(t)).score(x)
    ode_ends = jax.jit(jax.vmap(lambda eps: probability_flow(score, eps, schedule)[0]))(noise)

    def summary(actions):
        nearest = jnp.linalg.norm(actions[:, None] - bandit.mode_centres[None], axis=-1)
        fractions = jnp.bincount(jax.vmap(bandit.mode)(actions), length=4) / len(actions)
        return {
            "fractions": np.round(fractions, 4).tolist(),
            "within_3_std": float(jnp.mean(nearest.min(axis=1) < 3 * bandit.density.stds[0])),
            "largest_coordinate": float(jnp.max(jnp.abs(actions))),
        }

    distance = jnp.linalg.norm(actions - ode_ends, axis=1)
    return {
        "one_step": summary(actions) | {"ode_distance": float(jnp.median(distance))},
        "ode": summary(ode_ends),
        "exact": summary(bandit.sample_optimal(SAMPLES, key=key)),
        "samples": np.round(actions[:1000], 3).tolist(),
    }


def run(name: str, updates: int = UPDATES, results: Path = RESULTS) -> Path:
    """Trains and measures one variant, and writes its result file."""
    agent = dataclasses.replace(VARIANTS[name], decay_updates=updates)
    begun, cpu = time.perf_counter(), time.process_time()
    actor = train(agent, updates, key=jr.key(SEED))
    seconds = {"wall": time.perf_counter() - begun, "cpu": time.process_time() - cpu}
    content = {
        "settings": {
            "variant": name,
            "updates": updates,
            "batch": BATCH,
            "seed": SEED,
            "agent": to_json(agent),
        },
        "provenance": provenance(),
        "training_seconds": {name: round(value, 1) for name, value in seconds.items()},
        **measure(agent, actor, key=jr.key(SEED + 1)),
    }
    path = results / f"bandit_{name}.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", nargs="?", choices=sorted(VARIANTS))
    parser.add_argument("--updates", type=int, default=UPDATES)
    args = parser.parse_args()
    for name in [args.variant] if args.variant else VARIANTS:
        path = run(name, args.updates)
        content = json.loads(path.read_text())
        print(name, content["one_step"], content["training_seconds"], path, flush=True)


if __name__ == "__main__":
    main()
