"""Monte Carlo scores of noised Boltzmann densities, and the mixture whose score is known.

The density `p_0` of the data is known up to a constant, as its logarithm (say `alpha Q(s, .)`), and there are
no samples of it. The score of what forward noising makes of it, `x_t = alpha_t x_0 + sigma_t eps`, is then

    grad log p_t(x_t),    p_t(x_t) ~ E[p_0(x_0)],    x_0 ~ N(x_t / alpha_t, (sigma_t / alpha_t)^2 I),

so that K draws of `x_0` with the self-normalised weights `w_k = softmax_k(log p_0(x_0^k))` estimate it
(iDEM: Akhound-Sadegh et al. 2024, arXiv 2402.06121; SOM: Kim et al. 2026, arXiv 2605.23365, Eq. 5 [3P]).
The three estimators are consistent, biased O(1/K), and differ in where their variance is small:

| here              | score                                          | good where `sigma_t / alpha_t` is     |
|-------------------|------------------------------------------------|---------------------------------------|
| `gradient_score`  | `sum_k w_k grad log p_0(x_0^k) / alpha_t` [3P] | below the width of the modes          |
| `denoising_score` | `sum_k w_k eps^k / sigma_t` [I]                | above it; needs values only           |
| `truncated_score` | the same, with `x_0^k` kept in a box [I]       | above it; never looks outside the box |

Everything is written for one point; `jax.vmap` makes batches.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.scipy.special import log_ndtr, logsumexp, ndtr, ndtri
from jaxtyping import Array, Float, Key, ScalarLike


LogDensity = Callable[[Float[Array, " dim"]], Float[Array, ""]]
Transform = Callable[[Float[Array, " samples"]], Float[Array, " samples"]]


class ScoreEstimate(eqx.Module):
    """What K proposals say about one noised point `x_t`.

    The first two are one estimate in two currencies (Tweedie): `score = (alpha_t posterior_mean - x_t) /
    sigma_t^2`. `effective_samples = 1 / sum_k w_k^2` lies in [1, K]; near 1 a single proposal decides.
    """

    score: Float[Array, " dim"]
    posterior_mean: Float[Array, " dim"]
    effective_samples: Float[Array, ""]


def _identity(values):
    return values


def _effective_samples(log_weights):
    return 1 / jnp.sum(jax.nn.softmax(log_weights) ** 2)


def _weighted_mean(log_weights, values):
    # Not a matrix product: accelerators round its factors to TF32, and dividing by sigma_t^2 would show it.
    return jnp.sum(jax.nn.softmax(log_weights)[:, None] * values, axis=0)


# --- The two stages of every estimator, for callers that evaluate the density in between themselves ---


def normal_proposals(
    x_t: Float[Array, " dim"],
    alpha_t: ScalarLike,
    sigma_t: ScalarLike,
    *,
    num_samples: int,
    key: Key[Array, ""],
) -> Float[Array, "num_samples dim"]:
    """Draws of `x_0` from `N(x_t / alpha_t, (sigma_t / alpha_t)^2 I)`."""
    eps = jr.normal(key, (num_samples, x_t.size), x_t.dtype)
    return (x_t[None] + sigma_t * eps) / alpha_t


def truncated_proposals(
    x_t: Float[Array, " dim"],
    alpha_t: ScalarLike,
    sigma_t: ScalarLike,
    *,
    num_samples: int,
    key: Key[Array, ""],
    low: ScalarLike = -1.0,
    high: ScalarLike = 1.0,
) -> Float[Array, "num_samples dim"]:
    """Draws of `x_0` from the same normal law, truncated to `[low, high]` coordinate by coordinate."""
    uniform = jr.uniform(key, (num_samples, x_t.size), x_t.dtype, minval=jnp.finfo(x_t.dtype).epsneg)
    quantile = lambda u: truncated_normal_quantile(u, x_t / alpha_t, sigma_t / alpha_t, low, high)
    return jax.vmap(quantile)(uniform)


def combine_values(
    log_weights: Float[Array, " samples"],
    x_0: Float[Array, "samples dim"],
    x_t: Float[Array, " dim"],
    alpha_t: ScalarLike,
    sigma_t: ScalarLike,
) -> ScoreEstimate:
    """The gradient-free estimate from proposals `x_0` and their log-weights (any common constant drops out)."""
    posterior_mean = _weighted_mean(log_weights, x_0)
    score = jnp.asarray((alpha_t * posterior_mean - x_t) / sigma_t**2)
    return ScoreEstimate(score, posterior_mean, _effective_samples(log_weights))


def combine_gradients(
    log_weights: Float[Array, " samples"],
    gradients: Float[Array, "samples dim"],
    x_t: Float[Array, " dim"],
    alpha_t: ScalarLike,
    sigma_t: ScalarLike,
) -> ScoreEstimate:
    """The paper's estimate from the log-weights of untruncated proposals and their gradients in `x_0`."""
    score = _weighted_mean(log_weights, gradients) / alpha_t
    posterior_mean = (x_t + sigma_t**2 * score) / alpha_t
    return ScoreEstimate(score, posterior_mean, _effective_samples(log_weights))


# --- The estimators in one call ---


def gradient_score(
    log_density: LogDensity,
    x_t: Float[Array, " dim"],
    alpha_t: ScalarLike,
    sigma_t: ScalarLike,
    *,
    num_samples: int,
    key: Key[Array, ""],
    transform: Transform = _identity,
) -> ScoreEstimate:
    """The paper's estimator ("Form T", for target score): the gradient of a log-mean-exp over proposals.

    `S = grad_{x_t} logsumexp_k log p_0(x_0^k)`, `x_0^k = (x_t + sigma_t eps^k) / alpha_t`. Exact for linear
    `log_density`, whatever K. Its variance explodes once `sigma_t / alpha_t` exceeds the width of the modes
    (beyond t = 0.1 for the VP schedule and a width of 0.25 [T]), and it asks for `log_density` and its
    gradient as far out as the proposals reach. Clipping them would set those gradients to zero: use
    `truncated_score` for data in a box.

    **Arguments:**

    - `log_density`: `log p_0` up to a constant, at one point; it is vmapped over the proposals.
    - `x_t`: the noised point; `alpha_t > 0` and `sigma_t > 0` are its coefficients.
    - `num_samples`: the number K of proposals. The cost is one forward and one backward pass over them.
    - `transform`: turns the K values of `log_density` into log-weights, for instance
      `lambda q: alpha * standardize(q, axis_name="batch")`; differentiated by the chain rule.

    **Returns:** a [`ScoreEstimate`][], the posterior mean by Tweedie's formula.
    """
    eps = jr.normal(key, (num_samples, x_t.size), x_t.dtype)

    def log_marginal(x_t):
        x_0 = (x_t[None] + sigma_t * eps) / alpha_t
        log_weights = transform(jax.vmap(log_density)(x_0))
        return logsumexp(log_weights), log_weights

    score, log_weights = jax.grad(log_marginal, has_aux=True)(x_t)
    posterior_mean = (x_t + sigma_t**2 * score) / alpha_t
    return ScoreEstimate(score, posterior_mean, _effective_samples(log_weights))


def denoising_score(
    log_density: LogDensity,
    x_t: Float[Array, " dim"],
    alpha_t: ScalarLike,
    sigma_t: ScalarLike,
    *,
    num_samples: int,
    key: Key[Array, ""],
    transform: Transform = _identity,
) -> ScoreEstimate:
    """The gradient-free estimator ("Form D", for denoising): the weighted mean of the proposals' noise.

    `S = sum_k w_k eps^k / sigma_t`, `x_0^k = (x_t + sigma_t eps^k) / alpha_t`. Equal to `gradient_score` in
    expectation up to O(1/K). Its error grows like `1 / sigma_t` as t goes to 0.

    **Arguments:** as [`gradient_score`][]. The cost is one forward pass over the K proposals.

    **Returns:** a [`ScoreEstimate`][].
    """
    eps = jr.normal(key, (num_samples, x_t.size), x_t.dtype)
    log_weights = transform(jax.vmap(log_density)((x_t[None] + sigma_t * eps) / alpha_t))
    mean_eps = _weighted_mean(log_weights, eps)
    posterior_mean = (x_t + sigma_t * mean_eps) / alpha_t
    return ScoreEstimate(mean_eps / sigma_t, posterior_mean, _effective_samples(log_weights))


def truncated_score(
    log_density: LogDensity,
    x_t: Float[Array, " dim"],
    alpha_t: ScalarLike,
    sigma_t: ScalarLike,
    *,
    num_samples: int,
    key: Key[Array, ""],
    transform: Transform = _identity,
    low: ScalarLike = -1.0,
    high: ScalarLike = 1.0,
) -> ScoreEstimate:
    """The estimator for data in a box ("Form B"): `p_0` is zero outside `[low, high]^dim`.

    The proposals follow the normal law of the other two, truncated to the box coordinate by coordinate, so
    `log_density` is never asked outside it and the posterior mean never leaves it:
    `S = (alpha_t sum_k w_k x_0^k - x_t) / sigma_t^2`. (The gradient form would lack the boundary terms.)

    **Arguments:** as [`gradient_score`][], and the bounds of the box. The cost is one forward pass.

    **Returns:** a [`ScoreEstimate`][]; finite also where `x_t / alpha_t` lies many standard deviations
    outside the box.
    """
    bounds = dict(low=low, high=high)
    x_0 = truncated_proposals(x_t, alpha_t, sigma_t, num_samples=num_samples, key=key, **bounds)
    return combine_values(transform(jax.vmap(log_density)(x_0)), x_0, x_t, alpha_t, sigma_t)


def truncated_normal_quantile(
    p: Float[Array, " dim"],
    mean: Float[Array, " dim"],
    std: ScalarLike,
    low: ScalarLike,
    high: ScalarLike,
) -> Float[Array, " dim"]:
    """The inverse distribution function of `N(mean, std^2)` truncated to `[low, high]`, per coordinate.

    Right in single precision wherever the box lies, a hundred standard deviations out on either side or a
    hundredth of one wide; `jax.random.truncated_normal` ends up at the wrong edge beyond 5.5 deviations.

    **Arguments:** `p` in (0, 1), and the parameters of the law, `std > 0`.

    **Returns:** points in the box, increasing in `p`.
    """
    a, b = (low - mean) / std, (high - mean) / std
    # By symmetry the box is put mostly below the mean, where the distribution function keeps its digits.
    mirrored = a + b > 0
    a, b = jnp.where(mirrored, -b, a), jnp.where(mirrored, -a, b)
    p = jnp.where(mirrored, 1 - p, p)
    below = p + (1 - p) * jnp.exp(log_ndtr(a) - log_ndtr(b))  # the distribution function over that of b
    info = jnp.finfo(p.dtype)
    near = ndtri(jnp.clip(ndtr(b) * below, info.tiny, 1 - info.epsneg))
    # Further out `ndtr` is about exp(-z^2/2) / |z|, and solving this relative to b does not underflow.
    tail = jnp.minimum(b, -10.0)
    square = tail**2 - 2 * jnp.log(below)
    far = -jnp.sqrt(square - jnp.log(square / tail**2))
    z = jnp.where(b < -10, far, near)
    return jnp.clip(mean + std * jnp.where(mirrored, -z, z), low, high)


def standardize(
    values: Float[Array, "..."], *, axis_name: str | None = None, eps: ScalarLike = 1e-6
) -> Float[Array, "..."]:
    """`(values - mean) / (std + eps)`, the batch normalisation of the critic's values in SOM [3P].

    The statistics are constants to differentiation. Were they not, the score of every linear `Q` would come
    out as zero: the weights' mean would be taken from it [T].

    **Arguments:**

    - `values`: of any shape; the statistics are over all of them,
    - `axis_name`: and over this axis of an enclosing `jax.vmap(..., axis_name=...)`, if given.
    """
    average = lambda x: jnp.mean(x) if axis_name is None else jax.lax.pmean(jnp.mean(x), axis_name)
    constants = jax.lax.stop_gradient(values)
    mean = average(constants)
    std = jnp.sqrt(average((constants - mean) ** 2))
    return (values - mean) / (std + eps)


class GaussianMixture(eqx.Module):
    """`p(x) = sum_i weights_i N(x; means_i, stds_i^2 I)`: forward noising keeps the form, so all is closed.

    The truth against which estimators, samplers and flows are measured.
    """

    means: Float[Array, "modes dim"] = eqx.field(converter=jnp.asarray)
    stds: Float[Array, " modes"] = eqx.field(converter=jnp.asarray)
    weights: Float[Array, " modes"] = eqx.field(converter=jnp.asarray)
    """Positive; only their ratios matter."""

    def _log_joint(self, x):
        """The log of each mode's share of the density at `x`."""
        square = jnp.sum((x[None] - self.means) ** 2, axis=-1)
        log_normal = -0.5 * square / self.stds**2 - x.size * jnp.log(self.stds * jnp.sqrt(2 * jnp.pi))
        return jax.nn.log_softmax(jnp.log(self.weights)) + log_normal

    def log_density(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """`log p(x)`, normalised."""
        return logsumexp(self._log_joint(x))

    def responsibilities(self, x: Float[Array, " dim"]) -> Float[Array, " modes"]:
        """The probability that `x` came from each mode."""
        return jax.nn.softmax(self._log_joint(x))

    def score(self, x: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """`grad log p(x)`."""
        pulls = (self.means - x[None]) / self.stds[:, None] ** 2
        return jnp.sum(self.responsibilities(x)[:, None] * pulls, axis=0)

    def perturbed(self, alpha_t: ScalarLike, sigma_t: ScalarLike) -> "GaussianMixture":
        """The law of `x_t = alpha_t x_0 + sigma_t eps`."""
        stds = jnp.sqrt((alpha_t * self.stds) ** 2 + sigma_t**2)
        return GaussianMixture(alpha_t * self.means, stds, self.weights)

    def posterior_mean(
        self, x_t: Float[Array, " dim"], alpha_t: ScalarLike, sigma_t: ScalarLike
    ) -> Float[Array, " dim"]:
        """`E[x_0 | x_t]`, the denoiser that a diffusion model learns."""
        gain = alpha_t * self.stds**2 / ((alpha_t * self.stds) ** 2 + sigma_t**2)
        per_mode = self.means + gain[:, None] * (x_t[None] - alpha_t * self.means)
        return jnp.sum(self.perturbed(alpha_t, sigma_t).responsibilities(x_t)[:, None] * per_mode, axis=0)

    def sample(self, *, key: Key[Array, ""]) -> Float[Array, " dim"]:
        """One draw."""
        mode_key, noise_key = jr.split(key)
        mode = jr.categorical(mode_key, jnp.log(self.weights))
        eps = jr.normal(noise_key, self.means.shape[1:], self.means.dtype)
        return self.means[mode] + self.stds[mode] * eps
