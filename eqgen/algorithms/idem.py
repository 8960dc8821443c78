"""iDEM as a policy: a diffusion regressed on Monte Carlo scores of exp(Q).

Akhound-Sadegh, Rector-Brooks, Bose, Mittal, Lemos, Liu, Sendera, Ravanbakhsh, Gidel, Bengio, Malkin and Tong,
"Iterated Denoising Energy Matching for Sampling from Boltzmann Densities", arXiv 2402.06121 (2024): a diffusion
learns to sample exp(-E) / Z without samples of it. Its own samples are noised, and at each noised point K clean
proposals, weighted by their density, estimate the score. As a policy, with -E = Q, it is a baseline in the code of
SDAC and DPMD (Ma et al., arXiv 2502.00361) [C].

Notation (paper symbol = name here; t = 0 is the action, as in the paper):

    -E = inverse_temperature * min_j Q_j        S_K(a_t, t) = estimate.score        K = num_proposals
    s_theta(a_t, t) = actor (as noise, -sigma_t s_theta)                            N = num_candidates

[P] the paper, [C] the code named above, [I] inferred here, [T] tested here.

Differs from the paper in: Gaussian noise of a variance-preserving chain, where the paper's variance explodes [C];
replay is the environment's, and the actions that are noised are drawn afresh from the policy [C].

Differs from the code in:
- The actions that are noised carry no exploration noise.
- Sampling starts from N(0, I), where the chain ends; [C] halves it.
- How the box is kept (`proposals`)
"""

from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr

from eqgen import scores
from eqgen.algorithms.actor_critic import AbstractDiffusionAgent
from eqgen.tree import vmap_in_blocks


class IDEM(AbstractDiffusionAgent):
    """Hyperparameters and methods of iDEM as a policy."""

    num_proposals: int = 64
    """K, per noised action [C]."""
    proposals: Literal["clipped", "free", "truncated"] = "clipped"
    inverse_temperature: float = 1.0
    """What Q is multiplied by: 1 in [C], so that `reward_scale` sets the policy's temperature."""

    sizes = {
        size: dict(fields, num_proposals=proposals)
        for (size, fields), proposals in zip(AbstractDiffusionAgent.sizes.items(), (4, 32, 64), strict=True)
    }
    reports = ("loss", "effective_samples", "score_norm")

    def score(self, q, a_t, alpha_t, sigma_t, *, key):
        """The estimate of grad log p_t(a_t), p_0 ~ exp(inverse_temperature q), by `proposals`."""
        propose = scores.truncated_proposals if self.proposals == "truncated" else scores.normal_proposals
        a_0 = propose(a_t, alpha_t, sigma_t, num_samples=self.num_proposals, key=key)
        if self.proposals == "truncated":
            log_density = self.inverse_temperature * jax.vmap(q)(a_0)
            return scores.combine_values(log_density, a_0, a_t, alpha_t, sigma_t)
        inside = (lambda a: jnp.clip(a, -1, 1)) if self.proposals == "clipped" else (lambda a: a)
        log_density = lambda a: self.inverse_temperature * q(inside(a))
        values, gradients = jax.vmap(jax.value_and_grad(log_density))(a_0)
        return scores.combine_gradients(values, gradients, a_t, alpha_t, sigma_t)

    def actor_loss(self, actor, state, batch, next_actions, *, key):
        sample_key, noise_key, score_key = jr.split(key, 3)
        keys = jr.split(sample_key, len(batch.obs))
        clean = self.best_of_n(state, batch.obs, self.num_candidates, keys=keys)
        a_t, steps, alpha_t, sigma_t = self.noised(clean, key=noise_key)

        def target(obs, a_t, alpha_t, sigma_t, key):
            q = lambda a: self.q_value(state.critics, obs, a)
            estimate = self.score(q, a_t, alpha_t, sigma_t, key=key)
            return -sigma_t * estimate.score, estimate.effective_samples

        rows = (batch.obs, a_t, alpha_t, sigma_t, jr.split(score_key, len(a_t)))
        eps, effective = vmap_in_blocks(target, *rows, rows_each=self.num_proposals)
        loss = jnp.mean((jax.vmap(actor)(a_t, steps, batch.obs) - eps) ** 2)
        values = (loss, jnp.mean(effective), jnp.mean(jnp.linalg.norm(eps, axis=-1)))
        return loss, {f"actor/{name}": value for name, value in zip(self.reports, values, strict=True)}
