"""SDAC: soft diffusion actor-critic, by reverse sampling score matching.

Ma, Chen, Wang, Li and Dai, "Efficient Online Reinforcement Learning for Diffusion Policy", arXiv 2502.00361 (2025):
the policy exp(Q / lambda) / Z cannot be sampled to train a diffusion on, but its denoising loss can be turned
round. At any noised action a_t, clean actions are proposed from q(a_0 | a_t) = N(a_t / alpha_t, (sigma_t /
alpha_t)^2 I) and weighted by exp(Q(s, a_0) / lambda).

Notation (paper symbol = name here; t = 0 is the action, as in the paper):

    s_theta(a_t; s, t) = actor (as noise)   Q = critics            lambda = temperature
    tilde a_0 = proposals                   K = num_proposals      N = num_candidates

[P] the paper, [C] its public code, [I] inferred here.

Differs from the paper and its code in:
- [C] repeats every a_t for its K proposals and regresses the network on each proposal's noise, weighted. The
  weights of one a_t sum to 1 and the network sees a_t alone, so the gradient is that of one regression on the
  weighted mean of the noise, at a K-th of the cost: `scores.combine_values`.
- The gradient is K times [C]'s for that reason, which Adam does not see.
- Sampling starts from N(0, I), where the chain ends; [C] halves it.
"""

import jax
import jax.numpy as jnp
import jax.random as jr

from eqgen import scores
from eqgen.algorithms.actor_critic import AbstractDiffusionAgent
from eqgen.tree import vmap_in_blocks


class SDAC(AbstractDiffusionAgent):
    """Hyperparameters and methods of SDAC."""

    num_proposals: int = 64
    """K, per noised action [C]."""
    q_scale: float = 5.0
    """What Q is multiplied by before it is divided by the temperature [C]."""

    sizes = {
        size: dict(fields, num_proposals=proposals)
        for (size, fields), proposals in zip(AbstractDiffusionAgent.sizes.items(), (4, 32, 64), strict=True)
    }
    reports = ("loss", "effective_samples", "temperature")

    def temperature(self, state):
        """lambda: 5 at the beginning, about 1 when the exploration noise is annealed, which it is tied to [C]."""
        return self.noise.std(state.noise) / 0.1

    def actor_loss(self, actor, state, batch, next_actions, *, key):
        sample_key, noise_key, proposal_key = jr.split(key, 3)
        keys = jr.split(sample_key, len(batch.obs))
        clean = self.best_of_n(state, batch.obs, self.num_candidates, keys=keys)
        a_t, steps, alpha_t, sigma_t = self.noised(clean, key=noise_key)
        scale = self.q_scale / self.temperature(state)

        def target(obs, a_t, alpha_t, sigma_t, key):
            level = (alpha_t, sigma_t)
            proposals = scores.normal_proposals(a_t, *level, num_samples=self.num_proposals, key=key)
            clipped = jnp.clip(proposals, -1, 1)
            log_weights = scale * jax.vmap(lambda a: self.q_value(state.critics, obs, a))(clipped)
            estimate = scores.combine_values(log_weights, proposals, a_t, *level)
            return -sigma_t * estimate.score, estimate.effective_samples

        rows = (batch.obs, a_t, alpha_t, sigma_t, jr.split(proposal_key, len(a_t)))
        eps, effective = vmap_in_blocks(target, *rows, rows_each=self.num_proposals)
        loss = jnp.mean((jax.vmap(actor)(a_t, steps, batch.obs) - jax.lax.stop_gradient(eps)) ** 2)
        values = (loss, jnp.mean(effective), self.temperature(state))
        return loss, {f"actor/{name}": value for name, value in zip(self.reports, values, strict=True)}
