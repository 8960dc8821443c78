"""How far two sets of samples are apart: kernels, projections, and features of a classifier.

All distances take examples of any shape along the leading axis, are pure functions and compile under `jax.jit`.
None is zero for two finite samples of one law (`mmd2` is so on average): report beside every number the same
distance between two sets of real data.

| here                     | 0 when the laws agree in              | blind to                                  |
|--------------------------|---------------------------------------|-------------------------------------------|
| `mmd2`                   | everything                            | in practice, what is far from its widths  |
| `sliced_wasserstein2`    | everything                            | in practice, rare directions              |
| `frechet_distance`       | mean and covariance of some features  | all else, and what the features miss      |
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, ScalarLike

from eqgen.networks.mlp import MLP


# Accelerators round the factors of a product to TF32, which the difference of two large squares would show.
_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _flat(x):
    return x.reshape(len(x), -1)


def _square_distances(x, ys):
    """From one point to all of `ys`. By the expanded square: one matrix product when mapped over points."""
    return jnp.maximum(jnp.sum(x**2) + jnp.sum(ys**2, axis=1) - 2 * _matmul(ys, x), 0)


def median_distance(x: Float[Array, "n ..."], *, block: int = 512) -> Float[Array, ""]:
    """The median Euclidean distance over all n (n - 1) / 2 pairs of distinct examples, in single precision.

    The lower of the two middle ones where the number of pairs is even. Holds n^2 numbers.

    **Arguments:**

    - `x`: n > 1 examples.
    - `block`: of how many examples the distances are computed at a time.
    """
    if len(x) < 2:
        raise ValueError(f"median_distance: there are no pairs among {len(x)} examples; give at least 2.")
    z = _flat(x) - jnp.mean(_flat(x), axis=0, keepdims=True)
    others = lambda x, i: jnp.where(jnp.arange(len(z)) == i, jnp.inf, _square_distances(x, z))
    squares = jax.lax.map(lambda args: others(*args), (z, jnp.arange(len(z))), batch_size=block)
    # Every pair is there twice, and the diagonal comes last. Floats that are not negative are ordered as their
    # bits, so 31 counts find those of the one wanted; sorting takes ten times as long on a CPU.
    bits = jax.lax.bitcast_convert_type(squares.astype(jnp.float32), jnp.int32)
    wanted = 2 * ((len(z) * (len(z) - 1) // 2 - 1) // 2)

    def with_bit(i, low):
        candidate = low + (1 << (30 - i))
        return jnp.where(jnp.sum(bits < candidate) <= wanted, candidate, low)

    found = jax.lax.fori_loop(0, 31, with_bit, jnp.int32(0))
    return jnp.sqrt(jax.lax.bitcast_convert_type(found, jnp.float32))


def mmd2(
    x: Float[Array, "n ..."],
    y: Float[Array, "m ..."],
    *,
    multiples: tuple[ScalarLike, ...] = (1 / 4, 1 / 2, 1, 2, 4),
    bandwidth: ScalarLike | None = None,
    block: int = 512,
) -> Float[Array, ""]:
    """The unbiased squared maximum mean discrepancy (Gretton et al., JMLR 2012, Eq. 3).

    The kernel is the mean over `multiples` m of `exp(-|x - y|^2 / (2 (m h)^2))`. Being unbiased, the estimate is
    below 0 about half of the time where the laws agree.

    **Arguments:**

    - `x`, `y`: at least two examples each, not necessarily as many.
    - `bandwidth`: h; by default the `median_distance` of `x` and `y` pooled: pairs within each and across. That
        depends on what is compared, so numbers that stand in one table need one h, say that of the real data. It
        is 0 where half of the pairs coincide, and the result then not a number.
    - `block`: of how many examples the kernel is evaluated at a time: memory for `block (n + m)` numbers (and for
        (n + m)^2 to find a bandwidth).

    **Returns:** the estimate, which does not depend on `block` but for rounding.

    **Raises:** `ValueError` for fewer than two examples.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"mmd2: the unbiased estimate needs 2 examples of each; there are {n} and {m}.")
    z = jnp.concatenate([_flat(x), _flat(y)])
    z = z - jnp.mean(z, axis=0, keepdims=True)
    h = median_distance(z, block=block) if bandwidth is None else jnp.asarray(bandwidth)
    index = jnp.arange(n + m)

    def row(args):
        """The share of one example in the three sums of Eq. 3."""
        point, i = args
        squares = _square_distances(point, z)
        kernel = sum(jnp.exp(-squares / (2 * (multiple * h) ** 2)) for multiple in multiples) / len(multiples)
        within = jnp.where(i < n, 1 / (n * (n - 1)), 1 / (m * (m - 1)))
        weight = jnp.where((index < n) == (i < n), within, -1 / (n * m))
        return jnp.sum(jnp.where(index == i, 0, weight * kernel))

    return jnp.sum(jax.lax.map(row, (z, index), batch_size=block))


def sliced_wasserstein2(
    x: Float[Array, "n ..."],
    y: Float[Array, "m ..."],
    *,
    num_projections: int = 512,
    key: Key[Array, ""],
) -> Float[Array, ""]:
    """The sliced 2-Wasserstein distance (Rabin et al., 2012; Bonneel et al., 2015).

    The root of the mean, over directions uniform on the sphere, of the squared 2-Wasserstein distance between the
    projections. On a line that is the distance between the quantile functions: exact also where n is not m.

    **Arguments:**

    - `x`, `y`: the examples.
    - `num_projections`, `key`: the directions. One key, one set of directions: use it for all that is compared.

    **Returns:** the distance, not its square, in the units of the examples.
    """
    x, y = _flat(x), _flat(y)
    directions = jr.normal(key, (x.shape[1], num_projections), x.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=0, keepdims=True)
    quantiles = lambda points: jnp.sort(_matmul(points, directions), axis=0)
    # Both quantile functions are steps; where either one jumps, in units of 1 / (n m).
    n, m = len(x), len(y)
    jumps = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    starts, lengths = jumps[:-1], np.diff(jumps) / (n * m)
    gaps = quantiles(x)[starts // m] - quantiles(y)[starts // n]
    return jnp.sqrt(jnp.mean(jnp.asarray(lengths, x.dtype) @ gaps**2))


def frechet_distance(x: Float[Array, "n features"], y: Float[Array, "m features"]) -> Float[Array, ""]:
    """The squared Fréchet distance between normal laws with the moments of two sets of features.

    `|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^{1/2})` (Dowson & Landau, 1982), covariances over n - 1. This is
    the formula of FID, but only of the Inception network's features may a number be called FID: say whose features
    these are (`FeatureClassifier.name`). It is biased upwards, by less the more examples there are: give at least
    50 per feature, and equally many wherever numbers are compared.

    **Arguments:** the features, one example a row.

    **Returns:** the squared distance, as FID is.

    **Raises:** `ValueError` where fewer examples than features plus one leave a covariance singular.
    """
    features = x.shape[1]
    if min(len(x), len(y)) <= features:
        raise ValueError(
            f"frechet_distance: {len(x)} and {len(y)} examples are too few for the covariance of {features} "
            f"features; give more than {features} of each, or fewer features."
        )

    def root(x):
        """An R with R^T R = S."""
        return jnp.linalg.qr(x - jnp.mean(x, axis=0, keepdims=True), mode="r") / (len(x) - 1) ** 0.5

    # The trace of (S_x S_y)^{1/2} is the sum of the singular values of R_x R_y^T. No eigenvalue's root is taken:
    # near 0 that would turn an error of eps into one of eps^{1/2}.
    x_root, y_root = root(x), root(y)
    cross = jnp.sum(jnp.linalg.svd(_matmul(x_root, y_root.T), compute_uv=False))
    means = jnp.sum((jnp.mean(x, axis=0) - jnp.mean(y, axis=0)) ** 2)
    return jnp.maximum(means + jnp.sum(x_root**2) + jnp.sum(y_root**2) - 2 * cross, 0)


class FeatureClassifier(eqx.Module):
    """An MLP classifier, for the features that it classifies by: its last hidden layer.

    **Arguments:**

    - `mlp`: at least one hidden layer, the last of a few features (32, say), one output a class.
    - `name`: whose features these are. It belongs beside every number computed from them.
    """

    mlp: MLP
    name: str = eqx.field(static=True)

    def features(self, x: Float[Array, "..."]) -> Float[Array, " features"]:
        """What the last layer sees of one example."""
        x = x.ravel()
        for layer in self.mlp.layers[:-1]:
            x = self.mlp.activation(layer(x))
        return x

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " classes"]:
        """The logits of one example."""
        return self.mlp.layers[-1](self.features(x))


def fit_classifier(
    x: Float[Array, "n ..."],
    labels: Int[Array, " n"],
    *,
    num_classes: int,
    hidden: tuple[int, ...] = (128, 32),
    steps: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    noise: float = 0.3,
    name: str | None = None,
    key: Key[Array, ""],
) -> FeatureClassifier:
    """A classifier trained by Adam on the cross-entropy, its rate falling to 0 along a cosine.

    **Arguments:**

    - `x`, `labels`: the examples and their classes 0, ..., `num_classes` - 1.
    - `hidden`: the hidden layers; the last is the number of features.
    - `steps`, `batch_size`, `learning_rate`: of the training, whose batches are drawn with replacement.
    - `noise`: the standard deviation of normal noise on the inputs, which regularises.
    - `name`: of the features; by default the network's sizes and the number of examples.
    """
    flat = _flat(x)
    sizes = (flat.shape[1], *hidden, num_classes)
    name = name or f"MLP {'-'.join(map(str, sizes))} trained on {len(x)} examples"
    init_key, train_key = jr.split(key)
    mlp = MLP(sizes[:1], num_classes, hidden, "silu", key=init_key)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(classifier, batch, targets):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(jax.vmap(classifier)(batch), targets))

    @jax.jit
    def train(classifier, flat, labels, key):
        def step(carry, key):
            classifier, opt_state = carry
            batch_key, noise_key = jr.split(key)
            chosen = jr.randint(batch_key, (batch_size,), 0, len(flat))
            batch = flat[chosen] + noise * jr.normal(noise_key, (batch_size, flat.shape[1]), flat.dtype)
            grads = jax.grad(loss)(classifier, batch, labels[chosen])
            updates, opt_state = optimizer.update(grads, opt_state)
            return (eqx.apply_updates(classifier, updates), opt_state), None

        return jax.lax.scan(step, (classifier, optimizer.init(classifier)), jr.split(key, steps))[0][0]

    return train(FeatureClassifier(mlp, name), flat, labels, train_key)
