"""LQL and NC-LQL on multimodal bandits, and how fast their samplers mix.

    python paper_figures/nclql/bandit.py              everything, some minutes on one core
    python paper_figures/nclql/bandit.py four         one bandit: `four` or `eight`
    python paper_figures/nclql/bandit.py mixing       plain against annealed Langevin from one mode

Bandits: `toy/mixture` (four modes of weights .4, .3, .2, .1) and `toy/ring` (eight equal ones). The reward is
log p of a Gaussian mixture p, so that the soft policy of w = 1 is p on the box. Layout and reward are ours; those
of the paper are not known to us. Critics are learned from 10 000 uniform actions and their rewards. Each sampler
then draws 2000 actions, from uniform starts:

- `entropy`: of the shares of the modes over that of equal shares;
- `within_3_std`: share of actions within 3 standard deviations of a mode;
- `shares`: of each mode, beside `exact`, their weights;
- `tv`: total variation to p, both as masses of 40 x 40 cells; `tv_exact` is what as many exact draws have.

Mixing: four equal Gaussians (s = 0.05) at (m, ..., m) in d coordinates, m the corners of a square, so that the way
from mode to mode grows as sqrt(d); all chains start in one. Scores are exact, smoothed for annealed chains (sigma
from 0.6 to 0.02, 10 levels, eta = 0.3 sigma^2). `in_mode` is the share of chains within the radius that holds 99 %
of the draws from a mode.
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

from eqgen.algorithms.nclql import LQL, NCLQL
from eqgen.envs.base import example_transition
from eqgen.envs.catalog import make
from eqgen.envs.toys import MixtureBandit
from eqgen.files import replacing
from eqgen.hyperparameters import to_json
from eqgen.provenance import provenance
from eqgen.samplers import annealed_langevin, geometric_levels, langevin
from eqgen.scores import GaussianMixture
from eqgen.tree import filter_scan
from eqgen.types import Transition


RESULTS = Path(__file__).parent / "results"
UPDATES, BATCH, REPLAY, SAMPLES, CELLS, SEED = 8_000, 128, 10_000, 2_000, 40, 0

BANDITS = {"four": "toy/mixture", "eight": "toy/ring"}
COMMON = dict(hidden=(128, 128), learning_rate=1e-3, discount=0.0, reward_scale=1.0)
AGENTS = {
    "reference": NCLQL(**COMMON),
    "boltzmann": NCLQL.boltzmann(inverse_temperature=1.0, **COMMON),
    "lql": LQL(inverse_temperature=1.0, **COMMON),
}
LONGER = {"boltzmann": dict(steps_per_level=50), "lql": dict(num_steps=500)}
"""What of an agent's sampler is changed, with the same critics, for 500 steps in place of 20."""

CORNERS = 0.5 * np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
DIMENSIONS, STEPS_PER_LEVEL = (2, 4, 8, 16), (1, 2, 5, 10, 20, 50)
MIXING_STD, SIGMAS = 0.05, geometric_levels(10, 0.6, 0.02)


# --- Bandits ---


def train(agent: LQL | NCLQL, bandit: MixtureBandit, updates: int, *, key):
    """The agent after so many updates of its critics. The discount is 0: the target is the reward, and the other
    half of `agent.update`, which draws next actions, is not needed."""
    init_key, replay_key, key = jr.split(key, 3)
    actions = jr.uniform(replay_key, (REPLAY, 2), minval=-1.0, maxval=1.0)
    rewards = jax.vmap(bandit.log_density)(actions)
    obs, ended = jnp.zeros((BATCH, 1)), jnp.ones(BATCH, bool)

    def step(state, key):
        row_key, fit_key = jr.split(key)
        rows = jr.randint(row_key, (BATCH,), 0, REPLAY)
        batch = Transition(obs, actions[rows], rewards[rows], obs, terminated=ended, truncated=~ended)
        critics, opt_state, metrics = agent.fit(state, batch, rewards[rows], key=fit_key)
        return dataclasses.replace(state, critics=critics, opt_state=opt_state), metrics["critic/loss"]

    state = agent.init(example_transition((1,), 2), key=init_key)
    run = eqx.filter_jit(lambda state, keys: filter_scan(step, state, keys))
    state, losses = run(state, jr.split(key, updates))
    loss = float(losses[-updates // 10 :].mean())
    if not np.isfinite(loss):
        raise FloatingPointError(f"The critics' loss is {loss} after {updates} updates.")
    return state, loss


def entropy(shares: np.ndarray) -> float:
    """Over that of equal shares."""
    return float(np.sum(shares * np.log(1 / np.maximum(shares, 1e-12))) / np.log(len(shares)))


def exact_masses(bandit: MixtureBandit) -> np.ndarray:
    """The masses of p in CELLS x CELLS cells of the box, first coordinate first."""
    fine = 10
    line = (np.arange(fine * CELLS) + 0.5) / (fine * CELLS) * 2 - 1
    grid = jnp.stack(jnp.meshgrid(line, line, indexing="ij"), axis=-1)
    density = np.exp(np.asarray(jax.jit(jax.vmap(jax.vmap(bandit.log_density)))(grid), np.float64))
    masses = density.reshape(CELLS, fine, CELLS, fine).sum(axis=(1, 3))
    return masses / masses.sum()


def measure(bandit: MixtureBandit, actions: np.ndarray) -> dict:
    """The measures named above, and 400 of the actions."""
    masses = exact_masses(bandit)

    def distance(actions):
        cells = np.histogram2d(*actions.T, bins=CELLS, range=[[-1, 1], [-1, 1]])[0] / len(actions)
        return round(float(np.abs(cells - masses).sum() / 2), 4)

    modes = jax.jit(jax.vmap(bandit.mode))(actions)
    shares = np.bincount(modes, minlength=bandit.num_modes) / len(actions)
    away = np.linalg.norm(actions[:, None] - np.asarray(bandit.mode_centres), axis=-1).min(axis=1)
    return {
        "entropy": round(entropy(shares), 4),
        "within_3_std": round(float(np.mean(away < 3 * bandit.density.stds[0])), 4),
        "shares": shares.round(4).tolist(),
        "exact": np.asarray(bandit.mode_weights, float).round(4).tolist(),
        "tv": distance(actions),
        "tv_exact": distance(np.asarray(bandit.sample_optimal(len(actions), key=jr.key(SEED + 2)))),
        "samples": actions[:400].round(3).tolist(),
    }


@eqx.filter_jit
def draw(agent: LQL | NCLQL, state):
    """Actions of the agent's policy."""
    sample = lambda key: agent.sample(state, jnp.zeros(1), key=key)
    return jax.vmap(sample)(jr.split(jr.key(SEED + 1), SAMPLES))


def run_bandit(name: str, updates: int = UPDATES) -> dict:
    """Trains every agent on one bandit and measures its samplers."""
    bandit, samplers = make(BANDITS[name]), {}
    for number, (label, agent) in enumerate(AGENTS.items()):
        cpu = time.process_time()
        state, loss = train(agent, bandit, updates, key=jr.fold_in(jr.key(SEED), number))
        seconds = time.process_time() - cpu
        variants = {label: agent}
        if label in LONGER:
            variants[f"{label}-long"] = dataclasses.replace(agent, **LONGER[label])
        for variant, sampler in variants.items():
            actions = np.asarray(draw(sampler, state))
            samplers[variant] = {
                "agent": to_json(sampler),
                "critic_loss": round(loss, 5),
                "training_cpu_seconds": round(seconds, 1),
                **measure(bandit, actions),
            }
    settings = {"bandit": bandit.name, "updates": updates, "batch": BATCH, "replay": REPLAY, "seed": SEED}
    return {"settings": settings, "provenance": provenance(), "samplers": samplers}


# --- Mixing ---


def mix(dim: int, steps_per_level: int) -> list[dict]:
    """Entropy over ln 4 of the modes and the share of chains in a mode, after 10 `steps_per_level` steps."""
    means = np.tile(CORNERS, dim // 2)
    mixture = GaussianMixture(means, np.full(4, MIXING_STD), np.ones(4))
    start = jnp.asarray(means[0], jnp.float32)
    step_sizes, keys = 0.3 * SIGMAS**2, jr.split(jr.key(SEED), SAMPLES)

    def plain(key):
        etas = jnp.full(len(SIGMAS) * steps_per_level, step_sizes[-1])
        return langevin(mixture.score, start, etas, key=key)[0]

    def annealed(key):
        score = lambda x, sigma: mixture.perturbed(1.0, sigma).score(x)
        options = dict(steps_per_level=steps_per_level, key=key)
        return annealed_langevin(score, start, SIGMAS, step_sizes, **options)[0]

    # A draw from a mode is within this distance of it with probability .99.
    draws = np.random.default_rng(SEED).normal(size=(100_000, dim))
    radius = MIXING_STD * np.quantile(np.linalg.norm(draws, axis=1), 0.99)
    records = []
    for chain in (plain, annealed):
        x = np.asarray(jax.jit(jax.vmap(chain))(keys))
        distances = np.linalg.norm(x[:, None] - means, axis=-1)
        shares = np.bincount(distances.argmin(axis=1), minlength=4) / SAMPLES
        records.append(
            {
                "sampler": chain.__name__,
                "dimension": dim,
                "steps": len(SIGMAS) * steps_per_level,
                "entropy": round(entropy(shares), 4),
                "in_mode": round(float(np.mean(distances.min(axis=1) < radius)), 4),
            }
        )
    return records


def run_mixing() -> dict:
    """Every dimension and length."""
    records = [record for dim in DIMENSIONS for steps in STEPS_PER_LEVEL for record in mix(dim, steps)]
    settings = {"std": MIXING_STD, "sigmas": np.round(SIGMAS, 5).tolist(), "chains": SAMPLES, "seed": SEED}
    return {"settings": settings, "provenance": provenance(), "records": records}


def run(name: str, updates: int = UPDATES, results: Path = RESULTS) -> Path:
    """One study, and its result file `bandit_<name>.json`."""
    content = run_mixing() if name == "mixing" else run_bandit(name, updates)
    path = results / f"bandit_{name}.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="?", choices=[*BANDITS, "mixing"])
    parser.add_argument("--updates", type=int, default=UPDATES)
    args = parser.parse_args()
    for name in [args.study] if args.study else [*BANDITS, "mixing"]:
        content = json.loads(run(name, args.updates).read_text())
        for label, measures in content.get("samplers", {}).items():
            print(
                name,
                label,
                {key: measures[key] for key in ("entropy", "within_3_std", "shares", "tv")},
                flush=True,
            )


if __name__ == "__main__":
    main()
