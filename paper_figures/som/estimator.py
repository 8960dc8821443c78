"""How good are Monte Carlo scores: over t and K under an exact critic, and under critics that are wrong.

    python paper_figures/som/estimator.py samples            bias and deviation over t, K = 10, 50, 100, 500
    python paper_figures/som/estimator.py critics            K = 100 under four critics
    python paper_figures/som/estimator.py samples --smoke    fewer of everything, to see that it works

The density is the four-mode mixture `toy/mixture`, whose score at every noise level is known; the noise schedule is
that of SOM. Points x_t are drawn from p_t, and at each the estimate is repeated with fresh proposals. Errors are
relative to the root mean square of the exact score at that t.

`critics` adds to log p a sinusoid, or one narrow spike away from all modes, or takes a small network that was
fitted to 200 points: a critic with an error of high frequency, an overestimated action, or too little data. The
spike is judged at noised actions near it.
"local" is the gradient of such a critic at x_t / alpha_t itself, which is what a method without smoothing follows.
The cosine is that with the exact score of the right density; layout and errors are ours, since the paper's are not
known to us.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from eqgen.algorithms.som import SOM
from eqgen.envs.catalog import make
from eqgen.files import replacing
from eqgen.provenance import provenance
from eqgen.scores import denoising_score, gradient_score, truncated_score
from eqgen.tree import filter_fori_loop


RESULTS = Path(__file__).parent / "results"
BANDIT, SCHEDULE = make("toy/mixture"), SOM().noise_schedule
ESTIMATORS = {"gradient": gradient_score, "denoising": denoising_score, "truncated": truncated_score}
NUM_SAMPLES = (10, 50, 100, 500)
SIZES = {"full": dict(times=16, points=256, repeats=64), "smoke": dict(times=3, points=8, repeats=4)}
SEED, SPIKE = 0, np.array([0.0, 0.1])


def grid(times: int) -> np.ndarray:
    """Times from almost clean to pure noise, closer where there is little noise."""
    return np.linspace(0.1, 1.0, times) ** 2


def noised(t: float, points: int, *, key, near: Any = None) -> tuple[Any, Any, Any, Any]:
    """alpha_t, sigma_t, points of p_t (or actions within .03 of `near`, noised alike) and their exact scores."""
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    density = BANDIT.density.perturbed(alpha, sigma)
    if near is None:
        x = jax.vmap(lambda key: density.sample(key=key))(jr.split(key, points))
    else:
        x = alpha * near + jnp.hypot(0.03 * alpha, sigma) * jr.normal(key, (points, 2))
    return alpha, sigma, x, jax.vmap(density.score)(x)


def samples(times: int, points: int, repeats: int) -> dict[str, Any]:
    """Relative bias and deviation of every estimator at every K over t."""
    ts, measures = grid(times), {}

    @partial(jax.jit, static_argnames=("name", "number"))
    def errors(t, key, name, number):
        point_key, key = jr.split(key)
        alpha, sigma, x, exact = noised(t, points, key=point_key)
        estimate = lambda x, key: (
            ESTIMATORS[name](BANDIT.log_density, x, alpha, sigma, num_samples=number, key=key).score
        )
        found = jax.lax.map(lambda key: jax.vmap(estimate)(x, jr.split(key, points)), jr.split(key, repeats))
        scale = jnp.sqrt(jnp.mean(jnp.sum(exact**2, axis=-1)))
        root = lambda square: jnp.sqrt(jnp.mean(jnp.sum(square, axis=-1))) / scale
        return root((found.mean(axis=0) - exact) ** 2), root((found - found.mean(axis=0)) ** 2)

    for name in ESTIMATORS:
        for number in NUM_SAMPLES:
            both = [errors(t, jr.fold_in(jr.key(SEED), i), name, number) for i, t in enumerate(ts)]
            bias, deviation = np.array(both).T
            measures[f"{name} {number}"] = {"bias": rounded(bias), "deviation": rounded(deviation)}
            print(name, number, bias.round(3), deviation.round(3), flush=True)
    return {"t": rounded(ts), "estimators": measures}


def fitted(num_points: int = 200, updates: int = 2_000) -> eqx.nn.MLP:
    """A small network fitted to log p, clipped from below as rewards are, at a few uniform actions."""
    action_key, net_key = jr.split(jr.key(SEED + 1))
    actions = jr.uniform(action_key, (num_points, 2), minval=-1.0, maxval=1.0)
    values = jnp.maximum(jax.vmap(BANDIT.log_density)(actions), -20.0)
    net, optimizer = eqx.nn.MLP(2, "scalar", 64, 2, jax.nn.gelu, key=net_key), optax.adam(1e-3)

    def step(_, carry):
        net, state = carry
        grads = eqx.filter_grad(lambda net: jnp.mean((jax.vmap(net)(actions) - values) ** 2))(net)
        changes, state = optimizer.update(grads, state)
        return eqx.apply_updates(net, changes), state

    carry = net, optimizer.init(eqx.filter(net, eqx.is_inexact_array))
    return eqx.filter_jit(lambda carry: filter_fori_loop(0, updates, step, carry))(carry)[0]


def spike(action):
    """A fiftieth wide, between the modes, and 2 above the highest of them: the best action of all, wrongly."""
    highest = jnp.max(jax.vmap(BANDIT.log_density)(BANDIT.mode_centres))
    height = highest + 2.0 - BANDIT.log_density(SPIKE)
    return height * jnp.exp(-jnp.sum((action - SPIKE) ** 2) / (2 * 0.02**2))


def critics(times: int, points: int, repeats: int) -> dict[str, Any]:
    """The mean cosine with the exact score over t, of every estimator and of the local gradient."""
    net = fitted(updates=2_000 if times > 3 else 20)
    wrong = {
        "exact": BANDIT.log_density,
        "sinusoid": lambda a: BANDIT.log_density(a) + jnp.sum(jnp.sin(40.0 * a)),
        "spike": lambda a: BANDIT.log_density(a) + spike(a),
        "fit": net,
    }
    ts, measures = grid(times), {}

    @partial(jax.jit, static_argnames=("critic", "form"))
    def cosine(t, key, critic, form):
        point_key, key = jr.split(key)
        near = SPIKE if critic == "spike" else None  # anywhere else it is not seen
        alpha, sigma, x, exact = noised(t, points, key=point_key, near=near)
        if form == "local":
            found = jax.vmap(jax.grad(wrong[critic]))(x / alpha)[None] / alpha
        else:
            estimate = lambda x, key: (
                ESTIMATORS[form](wrong[critic], x, alpha, sigma, num_samples=100, key=key).score
            )
            keys = jr.split(key, repeats)
            found = jax.lax.map(lambda key: jax.vmap(estimate)(x, jr.split(key, points)), keys)
        norm = lambda a: jnp.linalg.norm(a, axis=-1)
        return jnp.mean(jnp.sum(found * exact, axis=-1) / (norm(found) * norm(exact) + 1e-12))

    for critic in wrong:
        by_form = {}
        for form in ("local", *ESTIMATORS):
            values = [cosine(t, jr.fold_in(jr.key(SEED), i), critic, form) for i, t in enumerate(ts)]
            by_form[form] = rounded(np.array(values))
            print(critic, form, np.round(values, 2), flush=True)
        measures[critic] = {"cosine": by_form}
    return {"t": rounded(ts), "num_samples": 100, "critics": measures}


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in np.asarray(values)]


def run(name: str, size: str = "full", results: Path = RESULTS) -> Path:
    """One of the two, and its result file."""
    begun = provenance()
    measured = {"samples": samples, "critics": critics}[name](**SIZES[size])
    path = results / f"estimator_{name}.json"
    with replacing(path) as temporary:
        content = {"settings": SIZES[size] | {"seed": SEED}, "provenance": begun} | measured
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("samples", "critics"))
    parser.add_argument("--smoke", action="store_true", help="fewer of everything")
    args = parser.parse_args()
    print(run(args.study, "smoke" if args.smoke else "full"))
