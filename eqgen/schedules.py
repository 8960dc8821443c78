"""Noise schedules: how signal is traded for noise as t runs from 0 (data) to 1 (noise).

Every schedule is the pair (alpha, sigma) of the Gaussian path x_t = alpha(t) x_0 + sigma(t) eps with
eps ~ N(0, I). All else follows from the pair, as in Kingma et al., "Variational diffusion models" (2021):
with f = d log alpha / dt and g^2 = d sigma^2 / dt - 2 f sigma^2 the path has the marginals of the SDE
dx = f(t) x dt + g(t) dW.

| schedule     | alpha(t)              | sigma(t)                              | x_1                  |
|--------------|-----------------------|---------------------------------------|----------------------|
| `VPLinear`   | exp(-B(t) / 2)        | sqrt(1 - exp(-B(t)))                  | N(0, I), nearly      |
| `VPCosine`   | cos(theta) / cos(th0) | sqrt(1 - alpha^2)                     | N(0, I), nearly      |
| `Geometric`  | 1                     | sigma_min (sigma_max / sigma_min)^t   | N(0, sigma_max^2 I)  |
| `Karras`     | 1                     | (a + t (b - a))^rho                   | N(0, sigma_max^2 I)  |
| `LinearFlow` | 1 - t                 | t                                     | N(0, I), exactly     |

Times are scalars; map over them with `jax.vmap`. Everything is accurate to a few float32 roundings for
t >= 1e-3: small sigma is computed without subtracting from one.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike


class AbstractNoiseSchedule(eqx.Module):
    """A pair alpha(t) > 0, sigma(t) >= 0 with alpha / sigma falling in t.

    A schedule implements `alpha`, `sigma` and `time_of_log_snr`; the rest is derived.
    """

    @abstractmethod
    def alpha(self, t: ScalarLike) -> Scalar:
        """The factor of the data."""

    @abstractmethod
    def sigma(self, t: ScalarLike) -> Scalar:
        """The standard deviation of the noise."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: ScalarLike) -> Scalar:
        """The time at which the log signal-to-noise ratio is `log_snr`, in closed form."""

    def d_alpha(self, t: ScalarLike) -> Scalar:
        """d alpha / dt."""
        return _derivative(self.alpha, t)

    def d_sigma(self, t: ScalarLike) -> Scalar:
        """d sigma / dt; infinite at t = 0 for the variance-preserving schedules, where sigma ~ sqrt(t)."""
        return _derivative(self.sigma, t)

    def log_snr(self, t: ScalarLike) -> Scalar:
        """lambda(t) = 2 log(alpha / sigma), falling in t (twice the lambda of DPM-Solver)."""
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def drift(self, t: ScalarLike) -> Scalar:
        """f(t) = d log alpha / dt, the factor of x in the drift f(t) x of the forward SDE."""
        return self.d_alpha(t) / self.alpha(t)

    def diffusion_squared(self, t: ScalarLike) -> Scalar:
        """g^2(t) = d sigma^2 / dt - 2 f(t) sigma^2, the squared diffusion coefficient of the forward SDE."""
        sigma = self.sigma(t)
        return 2 * sigma * (self.d_sigma(t) - self.drift(t) * sigma)

    def perturb(self, x_0: Float[Array, "*x"], eps: Float[Array, "*x"], t: ScalarLike) -> Float[Array, "*x"]:
        """x_t = alpha(t) x_0 + sigma(t) eps."""
        return self.alpha(t) * x_0 + self.sigma(t) * eps

    @property
    def prior_std(self) -> Scalar:
        """sigma(1): samplers start from x_1 ~ N(0, prior_std^2 I)."""
        return self.sigma(1.0)


def _derivative(f: Callable[[Scalar], Scalar], t: ScalarLike) -> Scalar:
    t = _floating(t)
    return jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


def _floating(t: ScalarLike) -> Scalar:
    return jnp.asarray(t, jnp.result_type(t, float))


class VPLinear(AbstractNoiseSchedule):
    """The variance-preserving SDE with linear beta: alpha^2 + sigma^2 = 1.

    alpha = exp(-B / 2) and sigma^2 = 1 - exp(-B), B(t) the integral of beta from 0 to t. Song et al.,
    "Score-based generative modeling through SDEs" (2021), appendix C, whose constants are the defaults.

    **Arguments:**

    - `beta_min`, `beta_max`: the noise rate beta at t = 0 and t = 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def beta(self, t: ScalarLike) -> Scalar:
        """beta(t), the noise rate: f = -beta / 2 and g^2 = beta."""
        return self.beta_min + _floating(t) * (self.beta_max - self.beta_min)

    def _integrated_beta(self, t: Any) -> Any:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def alpha(self, t: ScalarLike) -> Scalar:
        return jnp.exp(-0.5 * self._integrated_beta(t))

    def sigma(self, t: ScalarLike) -> Scalar:
        # The derivative of expm1 is taken as expm1 + 1, which near t = 1 would lose what is left of d_sigma.
        integral = self._integrated_beta(t)
        return jnp.sqrt(jnp.where(integral < 1, -jnp.expm1(-integral), 1 - jnp.exp(-integral)))

    def time_of_log_snr(self, log_snr: ScalarLike) -> Scalar:
        # The root of B(t) = log(1 + exp(-lambda)), in the form that does not cancel and allows constant beta.
        integral = jax.nn.softplus(jnp.negative(log_snr))
        root = jnp.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral)
        return 2 * integral / (self.beta_min + root)


class VPCosine(AbstractNoiseSchedule):
    """The variance-preserving cosine schedule: alpha = cos(theta(t)) / cos(theta(0)), alpha^2 + sigma^2 = 1.

    theta(t) = (pi / 2)(t + s) / (1 + s). Nichol & Dhariwal, "Improved denoising diffusion probabilistic
    models" (2021), eq. 17. At t = 1 the formula gives alpha = 0, log-SNR and drift minus infinity. Here the
    schedule stands still from `t_clip` on (alpha = 0.0084 with the defaults, f = g = 0), so that everything
    is finite on (0, 1]; `time_of_log_snr` inverts on (0, t_clip]. 0.9946 is the end time of Lu et al.,
    "DPM-Solver" (2022).

    **Arguments:**

    - `s`: offset that keeps the noise near t = 0 from being too small.
    - `t_clip`: time in (0, 1) from which on nothing changes.
    """

    s: float = 0.008
    t_clip: float = 0.9946

    @property
    def _rate(self):
        return 0.5 * math.pi / (1 + self.s)

    def _clip(self, t):
        return jnp.where(t < self.t_clip, t, self.t_clip)

    def alpha(self, t: ScalarLike) -> Scalar:
        # cos(theta) as a sine of the time left, which keeps its relative accuracy near t = 1.
        return jnp.sin((1 - self._clip(t)) * self._rate) / jnp.cos(self.s * self._rate)

    def sigma(self, t: ScalarLike) -> Scalar:
        # cos^2(theta_0) - cos^2(theta) as a product of sines, which does not cancel near t = 0.
        t = self._clip(t)
        product = jnp.sin(t * self._rate) * jnp.sin((t + 2 * self.s) * self._rate)
        return jnp.sqrt(product) / jnp.cos(self.s * self._rate)

    def time_of_log_snr(self, log_snr: ScalarLike) -> Scalar:
        theta_0 = self.s * self._rate
        cos_squared = jax.nn.sigmoid(log_snr) * jnp.cos(theta_0) ** 2
        sin_squared = jnp.sin(theta_0) ** 2 + jax.nn.sigmoid(jnp.negative(log_snr)) * jnp.cos(theta_0) ** 2
        return jnp.arctan2(jnp.sqrt(sin_squared), jnp.sqrt(cos_squared)) / self._rate - self.s


class Geometric(AbstractNoiseSchedule):
    """The variance-exploding SDE: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

    Song et al., "Score-based generative modeling through SDEs" (2021), appendix C, whose constants for images
    in [0, 1] are the defaults. x_0 is the data without noise; at t = 0 the path has noise `sigma_min`.

    **Arguments:**

    - `sigma_min`, `sigma_max`: the noise at t = 0 and t = 1, in units of the data.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def alpha(self, t: ScalarLike) -> Scalar:
        return jnp.ones_like(_floating(t))

    def sigma(self, t: ScalarLike) -> Scalar:
        return self.sigma_min * jnp.exp(t * jnp.log(self.sigma_max / self.sigma_min))

    def time_of_log_snr(self, log_snr: ScalarLike) -> Scalar:
        return (jnp.multiply(-0.5, log_snr) - jnp.log(self.sigma_min)) / jnp.log(
            self.sigma_max / self.sigma_min
        )


class Karras(AbstractNoiseSchedule):
    """The EDM noise levels as a schedule: alpha = 1, sigma = (a + t (b - a))^rho.

    a = sigma_min^(1 / rho) and b = sigma_max^(1 / rho), so that a uniform grid of t is the grid of noise
    levels of Karras et al., "Elucidating the design space of diffusion-based generative models" (2022), eq.
    5, whose constants are the defaults (for data of standard deviation 0.5). In the paper sigma is the time.

    **Arguments:**

    - `sigma_min`, `sigma_max`: the noise at t = 0 and t = 1, in units of the data.
    - `rho`: how strongly small noise is resolved; 1 spaces sigma evenly.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def alpha(self, t: ScalarLike) -> Scalar:
        return jnp.ones_like(_floating(t))

    def sigma(self, t: ScalarLike) -> Scalar:
        low, high = self._ends
        return (low + _floating(t) * (high - low)) ** self.rho

    def time_of_log_snr(self, log_snr: ScalarLike) -> Scalar:
        low, high = self._ends
        return (jnp.exp(-0.5 * log_snr / self.rho) - low) / (high - low)

    @property
    def _ends(self):
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)


class LinearFlow(AbstractNoiseSchedule):
    """The straight path of flow matching and rectified flow: alpha = 1 - t, sigma = t.

    Lipman et al., "Flow matching for generative modeling" (2023), and Liu et al., "Flow straight and fast"
    (2023), with time turned round (theirs has the data at 1). At t = 1 alpha is zero and log-SNR, f and g are
    infinite, so what needs them starts a little below; the velocity is finite on all of (0, 1].
    """

    def alpha(self, t: ScalarLike) -> Scalar:
        return 1 - _floating(t)

    def sigma(self, t: ScalarLike) -> Scalar:
        return _floating(t)

    def time_of_log_snr(self, log_snr: ScalarLike) -> Scalar:
        return jax.nn.sigmoid(-0.5 * log_snr)
