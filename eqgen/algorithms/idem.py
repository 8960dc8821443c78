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

Differs from the paper in:
- The noise is that of a variance-preserving chain, where the paper's variance explodes [C].
- The actions that are noised are drawn afresh from the policy at replayed observations; the paper keeps a buffer of
  its samples [C].
- Scores are not clipped [C]; the paper's own code clips their norm.

Differs from the code in:
- How proposals outside the box, where critics have learned nothing, are dealt with (field `proposals`). The
  gradient of the log-sum-exp over proposals is the score of a density on the whole space. [C] clips the proposals:
  values stop changing at the faces, but no force pulls back into the box, and the more noise, the more proposals
  are out there. Here they are drawn from the same law truncated to the box, and their weighted mean is the
  estimate, which is that of the density on the box and has no gradient. With the estimate itself as the noise
  predictor of the default chain and Q = 5 (a_1 + a_2), actions have means of .79 truncated, .94 clipped, .98 free,
  where .80 is right, and 0, 37 and 48 % of their coordinates on a face [T]. The 20 steps make all laws narrower
  than exp(Q), .15 truncated instead of .20 [T].
- The actions that are noised carry no exploration noise.
- Sampling starts from N(0, I), where the chain ends; [C] halves it.
"""

from collections.abc import Callable, Mapping
from typing import Literal, Self

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from eqgen import scores
from eqgen.algorithms.actor_critic import AbstractDiffusionAgent
from eqgen.tree import vmap_in_blocks


class IDEM(AbstractDiffusionAgent):
    """Hyperparameters and methods of iDEM as a policy."""

    num_proposals: int = 64
    """K, per noised action [C]."""
    proposals: Literal["truncated", "clipped", "free"] = "truncated"
    """Where the K clean actions come from: the normal law truncated to the box, with the gradient-free estimate
    [I]; the normal law, clipped [C]; or as it is, which asks the critics outside the box [P]."""
    inverse_temperature: float = 1.0
    """What Q is multiplied by: 1 in [C], so that `reward_scale` sets the policy's temperature."""

    sizes = {
        size: dict(fields, num_proposals=proposals)
        for (size, fields), proposals in zip(AbstractDiffusionAgent.sizes.items(), (4, 32, 64), strict=True)
    }
    reports = ("loss", "effective_samples", "target_norm")

    @classmethod
    def profiles(cls) -> Mapping[str, Self]:
        return {"default": cls(), "code": cls(proposals="clipped")}

    def score(
        self,
        q: Callable[[Float[Array, " act"]], Float[Array, ""]],
        a_t: Float[Array, " act"],
        alpha_t: Float[Array, ""],
        sigma_t: Float[Array, ""],
        *,
        key: Key[Array, ""],
    ) -> scores.ScoreEstimate:
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
