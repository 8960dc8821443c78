"""The noise-conditioned critic from coarse to sharp, and chains over it, on the four-mode bandit.

    python paper_figures/nclql/landscapes.py                 a minute on one core
    python paper_figures/nclql/landscapes.py --updates 20    to see that it works

NC-LQL in Boltzmann mode learns the bandit's reward, log p, as in `bandit.py`. `results/landscapes.json` holds
Q(., l), the mean of the critics, on a grid for some levels, less its largest value there, and chains from uniform
starts: the place of each at the end of every level.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from bandit import AGENTS, BANDITS, RESULTS, SEED, UPDATES, train

from eqgen.envs.catalog import make
from eqgen.files import replacing
from eqgen.hyperparameters import to_json
from eqgen.provenance import provenance


LEVELS, CELLS, CHAINS = (0, 3, 6, 9), 60, 200


def run(updates: int = UPDATES, results: Path = RESULTS) -> Path:
    """Trains, evaluates, and writes the result file."""
    begun, agent, bandit = provenance(), AGENTS["boltzmann"], make(BANDITS["four"])
    start_key, chain_key = jr.split(jr.key(SEED + 2))
    state = train(agent, bandit, updates, key=jr.key(SEED))[0]
    obs, shares = jnp.zeros(1), state.critics.level_shares()
    q = state.critics.at(obs)
    axis = jnp.linspace(-1.0, 1.0, CELLS)
    grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    surfaces = {}
    for level in LEVELS:
        values = jax.vmap(lambda a, level=level: jnp.mean(q(a, shares[level])))(grid)
        surfaces[str(level)] = rounded((values - values.max()).reshape(CELLS, CELLS))
    starts = jr.uniform(start_key, (CHAINS, 2), minval=-1.0, maxval=1.0)
    w = jnp.exp(state.log_inverse_temperature)
    chain = lambda start, key: agent.chain(state.critics, w, obs, start, key=key)[1]
    paths = jax.jit(jax.vmap(chain))(starts, jr.split(chain_key, CHAINS))
    ends = jnp.concatenate([starts[:, None], paths[:, agent.steps_per_level - 1 :: agent.steps_per_level]], 1)
    content = {
        "settings": {
            "agent": to_json(agent),
            "updates": updates,
            "seed": SEED,
            "levels": list(LEVELS),
            "sigmas": rounded(agent.sigmas),
        },
        "provenance": begun,
        "surfaces": surfaces,
        "chains": rounded(ends),
    }
    path = results / "landscapes.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")
    return path


def rounded(values) -> list:
    """Three decimals, which is what a picture can show."""
    return np.round(np.asarray(values, float), 3).tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=UPDATES)
    print(run(parser.parse_args().updates))
