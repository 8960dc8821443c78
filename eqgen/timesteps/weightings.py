"""Loss weights by time, an axis of its own beside the law that times are drawn from.

Each is given by what it multiplies the squared error of the noise by; `prediction` says what the loss is an
error of, and the weight follows, since all errors at one (x_t, t) are multiples of one another:

| prediction | |error|^2 / |eps - eps_hat|^2  |
|------------|---------------------------------|
| `eps`      | 1                               |
| `x0`       | 1 / SNR                         |
| `v`        | ((alpha^2 + sigma^2) / alpha)^2 |
| `score`    | 1 / sigma^2                     |
| `velocity` | (sigma lambda' / 2)^2           |

with SNR = (alpha / sigma)^2 and lambda = log SNR.

| weighting      | on the error of eps                      | source                                      |
|----------------|------------------------------------------|---------------------------------------------|
| `Constant`     | (1 on the loss as it is)                 | Ho et al. (2020)                            |
| `P2`           | (k + SNR)^-gamma                         | Choi et al. (2022)                          |
| `MinSNR`       | min(SNR, gamma) / SNR                    | Hang et al. (2023)                          |
| `SoftMinSNR`   | gamma / (SNR + gamma)                    | k-diffusion; Crowson et al. (2024)          |
| `EDM`          | (1 / SNR + s^2) / s^2                    | Karras et al. (2022)                        |
| `SpeedWeight`  | by the growth of the noise, see there    | Wang et al. (2024), SpeeD                   |
| `BoundWeight`  | c_t / ln 2                               | the variational bound, in bits              |
"""

import math
from abc import abstractmethod
from typing import cast

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from eqgen.parameterizations import Kind
from eqgen.timesteps.times import AbstractTimes, ContinuousTimes, DiffusionChain


class AbstractWeighting(eqx.Module):
    """A weight by time for the squared error of whatever the field `prediction` says."""

    prediction: eqx.AbstractVar[Kind]

    @abstractmethod
    def eps_weight(self, t: Shaped[Array, "*t"], times: AbstractTimes) -> Float[Array, "*_level"]:
        """The weight of `|eps - eps_hat|^2`."""

    def __call__(self, t: Shaped[Array, "*t"], times: AbstractTimes) -> Float[Array, "*_level"]:
        """The weights of the losses at times `t`."""
        weight = self.eps_weight(t, times)
        return weight if self.prediction == "eps" else weight / error_ratio(t, times, self.prediction)


def error_ratio(t: Shaped[Array, "*t"], times: AbstractTimes, kind: Kind) -> Float[Array, "*_level"]:
    """The squared error of a prediction of `kind` over the squared error of the noise it implies.

    **Raises:** `ValueError` for an unknown kind, or for a velocity in discrete time.
    """
    alpha, sigma = times.alpha(t), times.sigma(t)
    match kind:
        case "eps":
            return jnp.ones_like(sigma)
        case "x0":
            return (sigma / alpha) ** 2
        case "v":
            return ((alpha**2 + sigma**2) / alpha) ** 2
        case "score":
            return 1 / sigma**2
        case "velocity" if isinstance(times, ContinuousTimes):
            return (sigma * times.kl_weight(t)) ** 2  # there the weight is -lambda' / 2
        case "velocity":
            raise ValueError(f"{type(times).__name__} has no velocity at a noise level; use ContinuousTimes.")
    raise ValueError(
        f"Unknown kind of prediction {kind!r}; use one of 'x0', 'eps', 'v', 'score', 'velocity'."
    )


class Constant(AbstractWeighting):
    """Weight `value` on the loss as it is, whatever that is an error of."""

    value: float = 1.0
    prediction: Kind = "eps"

    def eps_weight(self, t: Shaped[Array, "*t"], times: AbstractTimes) -> Float[Array, "*_level"]:
        return self(t, times) * error_ratio(t, times, self.prediction)

    def __call__(self, t: Shaped[Array, "*t"], times: AbstractTimes) -> Float[Array, "*_level"]:
        return jnp.full(times.cell(t).shape, self.value)


class P2(AbstractWeighting):
    """(k + SNR)^-gamma on the error of eps (Choi et al., 2022); the authors use gamma 0.5 and 1."""

    k: float = 1.0
    gamma: float = 1.0
    prediction: Kind = "eps"

    def eps_weight(self, t: Shaped[Array, "*t"], times: AbstractTimes) -> Float[Array, "*_level"]:
        return (self.k + times.snr(t)) ** -self.gamma


class MinSNR(AbstractWeighting):
    """min(SNR, gamma) on the error of x_0 (Hang et al., 2023)."""

    gamma: float = 5.0
    prediction: Kind = "eps"

    def eps_weight(self, t: Shaped[Array, "*t"], times: AbstractTimes) -> Float[Array, "*_level"]:
        return jnp.minimum(1.0, self.gamma / times.snr(t))


class SoftMinSNR(AbstractWeighting):
    """SNR gamma / (SNR + gamma) on the error of x_0: `MinSNR` without its corner (k-diffusion).

    gamma is one over the variance of the data; 4 belongs to EDM's standard deviation 0.5. On the output of a
    network with EDM's preconditioning this is (sigma s)^2 / (sigma^2 + s^2)^2, the form k-diffusion has.
    """

    gamma: float = 4.0
    prediction: Kind = "eps"

    def eps_weight(self, t: Shaped[Array, "*t"], times: AbstractTimes) -> Float[Array, "*_level"]:
        return self.gamma / (times.snr(t) + self.gamma)


class EDM(AbstractWeighting):
    """(sigma^2 + s^2) / (sigma s)^2 on the error of x_0, sigma^2 = 1 / SNR (Karras et al., 2022, table 1).

    Uniform on the output of a network with EDM's preconditioning. `data_std` is s.
    """

    data_std: float = 0.5
    prediction: Kind = "x0"

    def eps_weight(self, t: Shaped[Array, "*t"], times: AbstractTimes) -> Float[Array, "*_level"]:
        return (1 / times.snr(t) + self.data_std**2) / self.data_std**2


class SpeedWeight(AbstractWeighting):
    """SpeeD's weight on the error of eps: the more the noise grows at a step, the more it counts.

    (1 - l) + (2 l - 1) m_t before `boundary` and 1 from it on, m_t the step's growth of 1 - ab, scaled to [0, 1].

    **Arguments:**

    - `strength`: l in [0.5, 1]; 0.5 halves the early steps' weight evenly. The paper tries 0.5, 0.6, 0.8 and 1.
    - `boundary`: tau as a share of all cells.
    """

    strength: float = 0.6
    boundary: float = 0.7
    prediction: Kind = "eps"

    def eps_weight(self, t: Shaped[Array, "*t"], times: AbstractTimes) -> Float[Array, "*_level"]:
        growth = cast(Array, jnp.gradient(noise_shares(times)))
        scaled = (growth - growth.min()) / (growth.max() - growth.min())
        early = 1 - self.strength + (2 * self.strength - 1) * scaled
        return jnp.where(before(self.boundary, times), early, 1.0)[times.cell(t)]


class BoundWeight(AbstractWeighting):
    """What makes a loss (a mean over dimensions) the term of the variational bound, in bits per dimension.

    c_t / ln 2 in a chain; in continuous time -lambda'(t) / (2 ln 2), the density over t.

    **Arguments:**

    - `clip`: c_t is cut there, against the last step of the cosine schedule (c = 500). None leaves it.
    """

    clip: float | None = None
    prediction: Kind = "eps"

    def eps_weight(self, t: Shaped[Array, "*t"], times: AbstractTimes) -> Float[Array, "*_level"]:
        weight = times.kl_weight(t)
        return (weight if self.clip is None else jnp.minimum(weight, self.clip)) / math.log(2)


# --- What SpeeD's weight and law share ---


def noise_shares(times: AbstractTimes) -> Float[Array, " cells"]:
    """1 - ab = sigma^2 / (alpha^2 + sigma^2) by cell."""
    if not isinstance(times, DiffusionChain | ContinuousTimes):
        raise ValueError(f"SpeeD is defined for single times, not for {type(times).__name__}.")
    return 1 / (1 + times.snr(times.points()))


def before(boundary: float, times: AbstractTimes) -> Shaped[Array, " cells"]:
    """Which cells lie before the share `boundary` of them all."""
    return jnp.arange(times.num_cells) < round(boundary * times.num_cells)
