# %% [markdown]
# # Soft policies by Langevin dynamics
#
# A critic already defines a policy, $\exp(wQ)$, and its gradient is the policy's score: LQL and NC-LQL act by
# following it with noise, and train no actor at all. Whether the chains find all of the policy is another
# question. Here the critic is first exact, then learned:
#
# 1. the soft policy, and the dynamics that draw from it;
# 2. from a bad start: plain Langevin stays where it is, annealed Langevin does not;
# 3. NC-LQL's critic has a noise level, learned by regression: what its coarse levels are, and what they are not;
# 4. NC-LQL as released samples another law than $\exp(wQ)$: the reference and the Boltzmann mode in numbers;
# 5. Pendulum, beside SOM and SAC.
#
# **Time.** Levels run from coarse to sharp: $l=0$ has the most noise, $l=L-1$ is the "clean" one.
#
# | symbol | in the code | meaning |
# |---|---|---|
# | $Q(s,a)$, $Q(s,a,l)$ | `critics` | value; of an action that carries the noise of level $l$ |
# | $w$ | `inverse_temperature` | $\pi_w(a\mid s)\propto\exp(w\,Q(s,a))$ |
# | $\sigma_l$ | `sigmas` | noise of level $l$, geometric from $\sigma_0$ to $\sigma_{L-1}$ |
# | $\eta_l$ | `step_sizes` | step size, proportional to $\sigma_l^2$ |
# | $L$, $T$ | `num_levels`, `steps_per_level` | levels, steps at each |
# | $S$ | `std` | standard deviation of a mode |
#
# **Where it comes from.** Both algorithms are of Ki, Ahn, Kim and Lee (2026), arXiv 2602.07873. [P] stands in the
# paper's abstract or in digests of it; [C] in the code released with it; [I] is inferred by us; [T] was measured
# by us. We have not seen the paper's full text. LQL is not in the released code: its settings are [I].
#
# **Needs** notebook 01; for section 5 also notebook 03.

# %% tags=["setup"]
import importlib.util
import os
import subprocess
import sys
from pathlib import Path


if importlib.util.find_spec("eqgen") is None:  # a machine that has not got it, such as Colab's: install it
    source, checkout = os.environ.get("EQGEN_SOURCE", ".."), Path("eqgen-checkout")
    if (Path(source) / "pyproject.toml").exists():
        checkout = Path(source)
    elif "EQGEN_SOURCE" not in os.environ:
        raise ModuleNotFoundError("Set os.environ['EQGEN_SOURCE'] to a checkout of eqgen or its git address.")
    elif not checkout.exists():
        subprocess.run(["git", "clone", "--quiet", "--depth=1", source, checkout], check=True)
    checkout = str(checkout.resolve())
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"{checkout}[images]"], check=True)
    sys.path.insert(0, checkout)  # where a kernel that starts from now on will look by itself

# %% tags=["parameters"]
seed = 0
num_chains = 2000  # smoke: 20
long_steps = 50  # smoke: 2
batch_size = 256  # smoke: 8
num_updates = 8000  # smoke: 20
hidden = (64, 64)  # smoke: (8, 8)
seeds = (0, 1)
total_steps = 6000  # smoke: 60
warmup_steps = 1000  # smoke: 20
eval_every = 500  # smoke: 20
eval_episodes = 10  # smoke: 2
replay_batch_size = 128  # smoke: 8
learning_rate = 1e-3
pendulum_temperature = 150.0
threshold = -200.0

# %%
import dataclasses
import time
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

from eqgen import plotting
from eqgen.algorithms.nclql import LQL, NCLQL
from eqgen.algorithms.sac import SAC
from eqgen.algorithms.som import SOM
from eqgen.envs.base import example_transition
from eqgen.envs.catalog import make
from eqgen.evaluation import rollout_returns
from eqgen.interactive import explore
from eqgen.samplers import annealed_langevin, annealed_step_sizes, geometric_levels, langevin
from eqgen.scores import GaussianMixture
from eqgen.training import OnlineSettings, seed_slice, train_online
from eqgen.tree import filter_scan
from eqgen.types import Transition


plotting.use_style()
plt.rcParams["figure.dpi"] = 100  # keeps the file small
colors = np.array(plotting.COLORS)
keys = jr.split(jr.key(seed), 12)
ticks = dict(xticks=[-1, 0, 1], yticks=[-1, 0, 1], xlim=(-1, 1), ylim=(-1, 1))

# %% [markdown]
# ## 1. A policy without a network
#
# The soft policy $\pi_w(a)=\exp(w\,Q(a))/Z$ has a constant $Z$ that nobody knows. Its score does without,
#
# $$\nabla_a\log\pi_w(a)=w\,\nabla_a Q(a),$$
#
# and that is all Langevin dynamics take: $a\leftarrow a+\tfrac\eta2\,w\nabla Q(a)+\sqrt\eta\,z$ with
# $z\sim\mathcal N(0,I)$. On the bandit `toy/mixture`, $Q=\log p$ with $p$ four Gaussians of weights .4, .3, .2,
# .1 and $S=0.15$: at $w=1$ the soft policy is $p$ itself. Chains from uniform actions, after 500 steps:

# %%
bandit = make("toy/mixture")
line = jnp.linspace(-1, 1, 101)
grid = jnp.stack(jnp.meshgrid(line, line), axis=-1)
values = jax.vmap(jax.vmap(bandit.log_density))(grid)
grid_modes = jax.vmap(jax.vmap(bandit.mode))(grid)
temperatures = (0.3, 1.0, 3.0)


@jax.jit
def plain_from_uniform(w):
    def draw(key):
        start_key, key = jr.split(key)
        start = jr.uniform(start_key, (2,), minval=-1.0, maxval=1.0)
        score = lambda a: w * jax.grad(bandit.log_density)(a)
        return langevin(score, start, jnp.full(500, 2e-3), key=key)[0]

    return jax.vmap(draw)(jr.split(keys[0], num_chains))


fig, axes = plotting.subplots(1, 3, width=plotting.TEXT_WIDTH, aspect=1.0, sharey=True)
print("share of each mode under exp(wQ), by quadrature, and among the chains")
for ax, w in zip(axes, temperatures):
    actions = plain_from_uniform(w)
    plotting.density(ax, lambda a, w=w: w * bandit.log_density(a))
    ax.plot(*actions[:400].T, ".", color=colors[1], markersize=2.5, markeredgewidth=0)
    ax.set(title=f"$w = {w:g}$", **ticks)
    mass = jnp.bincount(grid_modes.ravel(), jax.nn.softmax(w * values.ravel()), length=4)
    shares = jnp.bincount(jax.vmap(bandit.mode)(actions), length=4) / num_chains
    print(f"  w = {w:3.1f}   {np.array(mass).round(2)}   {np.array(shares).round(2)}")
plt.show()

# %% [markdown]
# Within a mode the dots lie as the density does. Which mode a chain is in is another matter: the barriers are
# $w$ times as high as those of $Q$, and the time over a barrier grows as the exponential of its height. At
# $w=0.3$ the chains have changed sides often enough to have the right shares, at $w=1$ they are on the way, and
# at $w=3$ each is where it started, a quarter of them in every quarter of the box.

# %% [markdown]
# ## 2. From a bad start
#
# Equal weights, sharper modes ($S=0.05$), and every chain begins in the same mode. (From uniform starts even a
# sampler that never crosses would have all modes equally often, and prove nothing.) *Annealed* Langevin follows
# the scores of $p_\sigma=p*\mathcal N(0,\sigma^2I)$, here exact, from a $\sigma$ that covers the square down to
# one below $S$, with steps $\eta_l=0.3\,\sigma_l^2$. *Plain* Langevin has $\sigma=0$ throughout, with steps as
# small as those of the last level or as large as $S^2$, about the largest that keep the shape of the mode.

# %%
std = 0.05
corners = 0.5 * np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
equal = GaussianMixture(corners, np.full(4, std), np.full(4, 0.25))
sigmas = geometric_levels(10, 0.6, 0.02)
step_sizes = annealed_step_sizes(sigmas, 0.3 * 0.02**2)
start = jnp.asarray(corners[0], jnp.float32)


def exact_score(a, sigma):
    return equal.perturbed(1.0, sigma).score(a)


@partial(jax.jit, static_argnums=0)
def annealed_paths(steps_per_level):
    """(steps + 1, chains, 2)."""
    options = dict(steps_per_level=steps_per_level)
    run = lambda key: annealed_langevin(exact_score, start, sigmas, step_sizes, **options, key=key)[1]
    return jax.vmap(run, out_axes=1)(jr.split(keys[1], num_chains))


@jax.jit
def plain_paths(step_size):
    etas = jnp.full(10 * long_steps, step_size)
    run = lambda key: langevin(lambda a: exact_score(a, 0.0), start, etas, key=key)[1]
    return jax.vmap(run, out_axes=1)(jr.split(keys[2], num_chains))


def coverage(actions, centres=corners, std=std):
    """Share within 3 std of a mode, share of each mode, and their entropy over that of equal shares."""
    distances = np.linalg.norm(np.asarray(actions)[:, None] - np.asarray(centres), axis=-1)
    shares = np.bincount(distances.argmin(axis=1), minlength=len(centres)) / len(distances)
    entropy = np.sum(shares * np.log(1 / np.maximum(shares, 1e-12))) / np.log(len(centres))
    return np.mean(distances.min(axis=1) < 3 * std), shares, entropy


paths = {
    "plain, small steps": plain_paths(step_sizes[-1]),
    "plain, large steps": plain_paths(std**2),
    "annealed, T = 2": annealed_paths(2),
    "annealed, T = 10": annealed_paths(10),
    f"annealed, T = {long_steps}": annealed_paths(long_steps),
}
entropies = {}
for name, path in paths.items():
    at = np.unique(np.geomspace(1, len(path) - 1, 60).astype(int))
    entropies[name] = at, np.array([coverage(path[i])[2] for i in at])
    within, shares, entropy = coverage(path[-1])
    print(
        f"{name:18}  steps {len(path) - 1:4}   within 3 S {within:.3f}   entropy {entropy:.3f}   {shares.round(2)}"
    )

# %% tags=["thumbnail"]
shown = (0, 3, 5, 7, 9)
fig, axes = plotting.subplots(1, 5, width=plotting.TEXT_WIDTH, aspect=1.15, sharey=True)
for ax, level in zip(axes, shown):
    sigma, actions = float(sigmas[level]), paths[f"annealed, T = {long_steps}"][(level + 1) * long_steps]
    extent = (-1.6, 1.6, -1.6, 1.6)
    plotting.density(ax, equal.perturbed(1.0, sigma).log_density, extent=extent)
    ax.plot(*actions[:300].T, ".", color=colors[1], markersize=2, markeredgewidth=0)
    ax.plot(*start, "k+", markersize=6)
    ax.set(title=f"$l={level}$, $\\sigma={sigma:.2f}$", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    ax.set(xlim=extent[:2], ylim=extent[2:])
plt.show()

# %% [markdown]
# The cross is where all chains start; each panel has the smoothed density of a level and 300 chains at its end.
# How many quarters of the plane they are spread over, as entropy relative to that of four equal shares:

# %%
fig, ax = plotting.subplots(width=0.65 * plotting.TEXT_WIDTH, aspect=0.6)
looks = ("k:", "k--", "-.", "--", "-")
for (name, (at, entropy)), look in zip(entropies.items(), looks):
    ax.semilogx(at, entropy, look, label=name)
ax.set(xlabel="steps", ylabel="entropy / ln 4 of the quarters", ylim=(-0.03, 1.03))
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()

# %% [markdown]
# Plain chains never leave. Annealed ones are everywhere after some ten steps at the coarse levels; what the
# rest is for is to bring them back *into* the modes, which two steps a level (NC-LQL's $T$ [C]) do not do well:
# the entropy stops at .78 and half of the chains end between the modes.

# %% [markdown]
# ## 3. A critic with a noise level
#
# Exact smoothed scores belong to toys. NC-LQL learns $Q(s,a,l)$: the clean level by temporal differences, and
# every coarser one by regression on the clean value of replayed actions $a\sim\rho$ that noise has moved [C],
#
# $$\min_Q\ \mathbb E\big[\big(Q(s,\,a+\sigma_l z,\,l)-\bar Q(s,a,L-1)\big)^2\big]
# \quad\Longrightarrow\quad Q_l(\tilde a)=\mathbb E\big[Q(A)\,\big|\,A+\sigma_lZ=\tilde a\big].$$
#
# A posterior mean under the law $\rho$ of the *replay*. Where $\rho$ is flat it is a Gaussian blur of $Q$. It
# is not the level of section 2, $Q_l^\star(\tilde a)=\tfrac1w\log\int e^{wQ(a)}\,\mathcal N(\tilde
# a;a,\sigma_l^2)\,\mathrm da$, in which the best of the neighbourhood counts, not the average.
#
# On the bandit the reward is $Q$ and $\gamma=0$, so `fit`, the learning half of `update`, is all it takes: the
# other half draws the next actions of the target, of which a bandit has none.

# %%
agent = NCLQL.boltzmann(
    inverse_temperature=1.0,
    sigma_max=0.5,
    sigma_min=0.02,
    hidden=hidden,
    learning_rate=learning_rate,
    discount=0.0,
    reward_scale=1.0,
)
no_obs, ended = jnp.zeros((batch_size, 1)), jnp.ones(batch_size, bool)


def learn(state, key):
    action_key, fit_key = jr.split(key)
    action = jr.uniform(action_key, (batch_size, 2), minval=-1.0, maxval=1.0)
    reward = jax.vmap(bandit.log_density)(action)
    batch = Transition(no_obs, action, reward, no_obs, terminated=ended, truncated=~ended)
    critics, opt_state, metrics = agent.fit(state, batch, reward, key=fit_key)
    return dataclasses.replace(state, critics=critics, opt_state=opt_state), metrics


state = agent.init(example_transition(bandit.obs_shape, bandit.action_dim), key=keys[3])
run = eqx.filter_jit(lambda state, keys: filter_scan(learn, state, keys))
state, metrics = run(state, jr.split(keys[4], num_updates))
for name in ("critic/loss", "critic/noised_loss"):
    tenth = num_updates // 10
    print(
        f"{name:>18}: {metrics[name][:tenth].mean():6.2f} in the first tenth, "
        f"{metrics[name][-tenth:].mean():5.2f} in the last"
    )

# %% [markdown]
# For comparison, critics that know: an agent takes anything with the methods of its own critics. `Smoothed` is
# $Q^\star_l$. `PosteriorMean` is what the regression is after, for uniform $\rho$ on the box, by quadrature.


# %%
class Smoothed(eqx.Module):
    """(1/w) log of exp(wQ) smoothed, at w = 1; the clean level is Q. `scale` multiplies all values."""

    density: GaussianMixture
    sigmas: jax.Array
    scale: float = 1.0
    size: int = eqx.field(static=True, default=1)

    def level_shares(self):
        return self.sigmas.at[-1].set(0.0)

    def at(self, obs):
        return lambda a, sigma: self.scale * self.density.perturbed(1.0, sigma).log_density(a)[None]


class PosteriorMean(Smoothed):
    """E[Q(A) | A + sigma Z = a] for A uniform on the box; the clean level is Q."""

    def at(self, obs):
        def q(a, sigma):
            clean = sigma == 0.0
            logits = -((a[:, None] - line) ** 2) / (2 * jnp.where(clean, 1.0, sigma) ** 2)
            across, along = jax.nn.softmax(logits, axis=1)
            return jnp.where(clean, self.density.log_density(a), along @ values @ across)[None]

        return q


wanted, posterior_mean = (kind(bandit.density, agent.sigmas) for kind in (Smoothed, PosteriorMean))


@eqx.filter_jit
def landscapes(critics):
    """(levels, 101, 101): the mean of the critics."""
    q = critics.at(jnp.zeros(1))
    return jax.lax.map(
        lambda share: jax.vmap(jax.vmap(lambda a: jnp.mean(q(a, share))))(grid), critics.level_shares()
    )


rows = {"learned": state.critics, "posterior mean": posterior_mean, "smoothed $\\exp(Q)$": wanted}
surfaces = {name: np.array(landscapes(critics)) for name, critics in rows.items()}
centred = {name: x - x.mean(axis=(1, 2), keepdims=True) for name, x in surfaces.items()}
spread = centred["posterior mean"].std(axis=(1, 2))
print("distance to the posterior mean (constants aside), in deviations of the posterior mean")
print("    level   " + "".join(f"{level:6}" for level in range(10)))
for name, label in (("learned", "learned"), ("smoothed $\\exp(Q)$", "smoothed")):
    distance = np.sqrt(np.mean((centred[name] - centred["posterior mean"]) ** 2, axis=(1, 2))) / spread
    print(f"{label:>9}   " + "".join(f"{x:6.2f}" for x in distance))
    if name == "learned":
        learned_distance = distance

# %% [markdown]
# Below, each level under three critics; darker is lower. On the learned ones 12 chains of the agent's own sampler
# ($T=4$), all from the weakest mode (cross), each drawn with the way it went within that level.


# %%
weakest = jnp.asarray(bandit.mode_centres[3], jnp.float32)


@eqx.filter_jit
def chains(agent, critics, key):
    run = lambda key: agent.chain(critics, jnp.array(1.0), jnp.zeros(1), weakest, key=key)[1]
    return jax.vmap(run)(jr.split(key, 12))


def settings(agent, steps):
    return dataclasses.replace(agent, steps_per_level=steps)


drawn = (0, 3, 5, 7, 9)
tracks = np.array(chains(settings(agent, 4), state.critics, keys[5]))
fig, axes = plotting.subplots(3, 5, width=plotting.TEXT_WIDTH, aspect=1.05, sharex=True, sharey=True)
for row, (name, surface) in zip(axes, surfaces.items()):
    for ax, level in zip(row, drawn):
        ax.contourf(line, line, surface[level], levels=24, cmap="cividis")
        ax.set(**ticks, aspect="equal")
        ax.grid(False)
    row[0].set_ylabel(name)
for ax, level in zip(axes[0], drawn):
    ax.set_title(f"$l={level}$, $\\sigma={float(agent.sigmas[level]):.2f}$")
    ax.plot(*tracks[:, 4 * level : 4 * level + 5].transpose(2, 1, 0), color="w", linewidth=0.5)
    ax.plot(*tracks[:, 4 * level + 4].T, "o", color=colors[1], markersize=2.5, markeredgewidth=0)
    ax.plot(*weakest, "k+", markersize=5)
plt.show()

# %% [markdown]
# Level and temperature under sliders. The middle is what the regression is after, the right what annealing asks
# for, $\tfrac1w\log$ of $e^{wQ}$ smoothed, both over the actions of the box. At small $w$ they are one, an average;
# the larger $w$, the more the best of the neighbourhood counts.


# %%
def at_level(level=3, w=1.0):
    sigma = float(agent.sigmas[level])
    near = np.exp(-((np.array(line)[:, None] - np.array(line)) ** 2) / (2 * sigma**2))
    near /= near.sum(axis=1, keepdims=True)
    q = np.array(values, np.float64)
    planes = {
        "learned": surfaces["learned"][level],
        "posterior mean": near @ q @ near.T,
        f"smoothed $\\exp(wQ)$, $w={w:g}$": np.log(near @ np.exp(w * (q - q.max())) @ near.T) / w,
    }
    fig, axes = plotting.subplots(1, 3, width=0.8 * plotting.TEXT_WIDTH, aspect=1.15, sharey=True)
    for ax, (name, plane) in zip(axes, planes.items()):
        ax.contourf(line, line, plane, levels=24, cmap="cividis")
        ax.set(title=name, aspect="equal", **ticks)
        ax.grid(False)
    axes[0].set_ylabel(f"$l={level}$, $\\sigma={sigma:.2f}$")
    return fig


explore(at_level, level=range(len(agent.sigmas) - 1), w=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0))

# %% [markdown]
# The learned levels are what the regression says, best where they are sharp. For small $\sigma$ all three are
# one. Coarse ones differ: in an average the deep valleys of $Q$ count for more than its peaks, and beyond the
# faces of the box there is nothing to average, so that level 0 leans towards the corner behind the best mode.
# What does that do to the samples? The same sampler from uniform starts, on each critic, with NC-LQL's $T=2$
# and with more:


# %%
@eqx.filter_jit
def sampled(agent, critics, key):
    """`num_chains` actions of the agent's policy under these critics."""
    state = agent.from_networks(critics, 2)
    return jax.vmap(lambda key: agent.sample(state, jnp.zeros(1), key=key))(jr.split(key, num_chains))


table = {}
print("total variation between the shares of the modes and their weights (share within 3 S of a mode)")
print(f"{'critic':>21}" + "".join(f"      T = {steps:2}   " for steps in (2, 10, long_steps)))
for name, critics in rows.items():
    for steps in (2, 10, long_steps):
        actions = sampled(settings(agent, steps), critics, keys[6])
        within, shares, _ = coverage(actions, bandit.mode_centres, 0.15)
        table[name, steps] = np.abs(shares - bandit.mode_weights).sum() / 2, within
    cells = "".join(f"   {tv:5.3f} ({within:.2f})" for tv, within in list(table.values())[-3:])
    print(f"{name:>21}{cells}")

# %% [markdown]
# With enough steps all three come close to the weights, the learned levels to a TV of .08 at $T=10$ and .04 at
# $T=50$; the blur in place of the smoothing, and learning it, cost little here (2000 chains know a TV to about
# .01). What costs is $T=2$, whoever made the levels: the chains have not forgotten the quarter of the box they
# started in.
#
# ## 4. Two modes of NC-LQL
#
# The released code [C] divides the gradient by its norm before it multiplies by $w=500$: eqgen's
# `NCLQL(mode="reference")`, the default. `mode="boltzmann"` leaves the gradient as it is [I]. Both get the exact
# smoothed critic of a mixture with weights .55, .25, .15, .05 and $S=0.05$, so that what is wrong here is wrong
# with the sampler.

# %%
weights = np.array([0.55, 0.25, 0.15, 0.05])
unequal = GaussianMixture(corners, np.full(4, std), weights)
reference = NCLQL(discount=0.0, reward_scale=1.0)
boltzmann = NCLQL.boltzmann(inverse_temperature=1.0, sigma_max=0.6, sigma_min=0.02, reward_scale=1.0)
cases = {
    "reference, T = 2": reference,
    f"reference, T = {long_steps}": settings(reference, long_steps),
    "Boltzmann, T = 2": boltzmann,
    f"Boltzmann, T = {long_steps}": settings(boltzmann, long_steps),
}
drawn_actions, measured = {}, {}
print(f"{'weights':>18}   {weights}")
for name, case in cases.items():
    actions = np.array(sampled(case, Smoothed(unequal, case.sigmas), keys[7]))
    within, shares, entropy = coverage(actions)
    deviation = np.sqrt(np.mean(np.min(np.linalg.norm(actions[:, None] - corners, axis=-1), 1) ** 2) / 2)
    drawn_actions[name] = actions
    measured[name] = dict(tv=np.abs(shares - weights).sum() / 2, within=within, shares=shares)
    print(
        f"{name:>18}   {shares.round(2)}   TV {measured[name]['tv']:.3f}   within 3 S {within:.2f}   "
        f"deviation in a mode {deviation:.3f}"
    )

# %%
fig, axes = plotting.subplots(1, 3, width=plotting.TEXT_WIDTH, aspect=1.0)
modes = np.arange(4)
long_names = [f"reference, T = {long_steps}", f"Boltzmann, T = {long_steps}"]
axes[0].bar(modes - 0.27, weights, 0.27, color="0.6", label="weights")
for i, name in enumerate(long_names):
    axes[0].bar(modes + 0.27 * i, measured[name]["shares"], 0.27, color=colors[i], label=name.split(",")[0])
    plotting.density(axes[i + 1], unequal.log_density, cmap="Greys")
    axes[i + 1].plot(*drawn_actions[name][:600].T, ".", color=colors[i], markersize=2.5, markeredgewidth=0)
    axes[i + 1].set(title=name, **ticks)
axes[0].set(xlabel="mode", ylabel="share", xticks=modes)
axes[0].legend()
plt.show()

# %% [markdown]
# The Boltzmann mode has the weights once it is given the steps. The reference has all modes alike however long it
# runs, each in a spot narrower than the mode: a gradient of length one says where the next mode is, but not how
# good it is. Its $w$ is a ratio of drift to noise and no temperature; for exploration that may do, for sampling
# $\exp(wQ)$ it does not. The same in one line: multiply $Q$ by ten.

# %%
shift = {}
for name, case in (("reference", reference), ("Boltzmann", boltzmann)):
    once, ten_times = (sampled(case, Smoothed(unequal, case.sigmas, scale), keys[8]) for scale in (1.0, 10.0))
    shift[name] = float(jnp.max(jnp.abs(ten_times - once)))
    print(f"{name}: 10 Q in place of Q moves an action of the same noise by at most {shift[name]:.4f}")

# %% [markdown]
# ## 5. Pendulum
#
# The task of notebook 03: swing up and hold a pendulum, in 200 steps an episode. All agents have two hidden
# layers of 64, one learning rate, batches of 128 and one update per step. $w$ now multiplies learned values of
# rewards times 0.2; eqgen's default of 150 was found on seeds 100 and 101 [T], the seeds here are others. The
# reference keeps the released code's sampler, and LQL takes 20 steps of size 0.01, as many as NC-LQL's $L\,T$
# [I].

# %%
env = make("gymnax/Pendulum-v1")
common = dict(hidden=(64, 64), learning_rate=learning_rate)
actor_critic = dict(hidden=(64, 64), actor_learning_rate=learning_rate, critic_learning_rate=learning_rate)
agents = {
    "NC-LQL (reference)": NCLQL(**common),
    "NC-LQL (Boltzmann)": NCLQL.boltzmann(inverse_temperature=pendulum_temperature, **common),
    "LQL": LQL(inverse_temperature=60.0, **common),
    "SOM": SOM.safe(num_score_samples=16, num_candidates=4, num_eval_candidates=8, **actor_critic),
    "SAC": SAC(temperature_learning_rate=learning_rate, **actor_critic),
}
loop = OnlineSettings(
    total_steps=total_steps,
    warmup_steps=warmup_steps,
    batch_size=replay_batch_size,
    log_every=eval_every,
    eval_every=eval_every,
    eval_episodes=eval_episodes,
    checkpoint_every=0,
)


def random_policy(obs, key):
    return jr.uniform(key, (env.action_dim,), minval=-1.0, maxval=1.0)


random_return = float(rollout_returns(random_policy, env, 100, key=keys[9])[0].mean())
print(f"return of random torques: {random_return:.0f}")
states, returns, seconds = {}, {}, {}


def train(name):
    """Trains all seeds side by side; keeps the state, the returns (seeds, evaluations) and the CPU time."""
    begun, columns = time.process_time(), []
    for progress in train_online(agents[name], env, loop, seeds=seeds):
        columns.append([record["eval/return"] for record in progress.records])
    states[name], returns[name] = progress.state, np.array(columns).T
    seconds[name] = time.process_time() - begun
    print(f"{name}, return by seed")
    for i in range(0, len(columns), 2):
        print(f"  {i * eval_every:5} steps " + "".join(f"{value:7.0f}" for value in columns[i]))
    print(f"  {seconds[name]:.0f} s of CPU time, compilation included")


train("NC-LQL (reference)")

# %%
train("NC-LQL (Boltzmann)")

# %%
train("LQL")

# %%
train("SOM")
train("SAC")

# %%
fig, (left, right) = plotting.subplots(1, 2, width=plotting.TEXT_WIDTH, aspect=0.7, sharey=True)
steps = np.arange(returns["SAC"].shape[1]) * eval_every
styles = dict(zip(agents, ("-", "--", "-.", "-", "--")))
for name in agents:
    ax, color = (left, colors[list(agents).index(name)]) if "LQL" in name else (right, None)
    options = dict(label=name, linestyle=styles[name], band="range")
    plotting.learning_curve(ax, steps, returns[name], color=color or colors[3 + (name == "SAC")], **options)
for ax in (left, right):
    ax.axhline(random_return, color="0.5", linewidth=0.8, linestyle=":")
    ax.set(xlabel="environment steps")
    ax.legend(loc="lower right")
left.set(ylabel="return", ylim=(-1800, 0))
plt.show()

# %% [markdown]
# Mean and range over the seeds; dotted, random torques. The last evaluation, and the first whose mean is above
# -200, of each seed:

# %%
final = {}
for name, values in returns.items():
    reached = [int(steps[np.argmax(v > threshold)]) if np.any(v > threshold) else None for v in values]
    final[name] = values[:, -1]
    print(
        f"{name:>18}   last"
        + "".join(f"{x:6.0f}" for x in final[name])
        + f"   best {values.max(axis=1).mean():5.0f} in the mean   above {threshold:.0f} from {reached}"
        + f"   {seconds[name]:3.0f} s"
    )

# %% [markdown]
# All five learn the task, SOM last (notebook 03 gives it more time). None stays at its best: between two
# evaluations a policy may lose some of its episodes, here the Boltzmann mode most, which is at -150 in passing
# and at -520 in the end. Two seeds rank nothing. But where Q has one action and one or two slopes, annealing
# has nothing to find that plain Langevin does not, and LQL learns as the reference does. What the chains cost
# is plain: 20 gradients of the critics an action, one and a half to four times the CPU time of SAC for as many
# updates.
#
# What the critics and the policies look like in three situations: above, $Q(s,a,l)$ of the Boltzmann agent at
# four levels, each less its maximum; below, 4000 actions of each policy, and the soft policy that the Boltzmann
# agent's clean critics define.

# %%
situations = {
    "hanging still": (np.pi, 0.0),
    "on the way up": (2.0, -4.0),
    "leaning, near the top": (0.3, 0.0),
}
torques = jnp.linspace(-1, 1, 201)[:, None]
shown_agents = list(agents)[:3]


@eqx.filter_jit
def level_values(critics, obs):
    """(levels, actions): the mean of the critics."""
    q = critics.at(obs)
    return jax.vmap(lambda share: jax.vmap(lambda a: jnp.mean(q(a, share)))(torques))(critics.level_shares())


@eqx.filter_jit
def acted(agent, state, obs):
    act = lambda key: agent.act(state, obs, key=key, explore=True)
    return jax.vmap(act)(jr.split(keys[10], 4000))[:, 0]


fig, axes = plotting.subplots(2, 3, width=plotting.TEXT_WIDTH, aspect=0.75, sharex=True)
for (title, (angle, speed)), (top, bottom) in zip(situations.items(), axes.T):
    obs = jnp.array([np.cos(angle), np.sin(angle), speed])
    learned = {name: seed_slice(states[name].agent, 0) for name in shown_agents}
    curves = np.array(level_values(learned["NC-LQL (Boltzmann)"].critics, obs))
    for level, shade in zip((0, 3, 6, 9), ("0.75", "0.55", "0.35", "0.0")):
        top.plot(torques, curves[level] - curves[level].max(), color=shade, label=f"$l={level}$")
    top.set(title=title, xlim=(-1.02, 1.02))
    for i, name in enumerate(shown_agents):
        hist = dict(density=True, histtype="step", color=colors[i], linestyle=styles[name], label=name)
        bottom.hist(np.array(acted(agents[name], learned[name], obs)), np.linspace(-1, 1, 41), **hist)
    soft = jax.nn.softmax(pendulum_temperature * curves[-1]) / (torques[1, 0] - torques[0, 0])
    bottom.plot(torques, soft, color="k", linewidth=0.8, label=r"$\exp(wQ)$")
    bottom.set(xlabel="action", yscale="log", ylim=(0.03, 60))
axes[0, 0].set_ylabel("Q, less its maximum")
axes[0, 0].legend()
axes[1, 0].set_ylabel("density")
fig.legend(handles=axes[1, 0].get_legend_handles_labels()[0], loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# $Q$ is smooth over the whole box, so its levels are nearly one: a parabola blurred is the same parabola, moved
# down. And $w=150$ is large for it. On the way up and near the top every sampler pushes one way with all it
# has, as $\exp(wQ)$ does. When the pendulum hangs still, one direction is better by .05 only, but $w$ makes
# that a factor of a thousand; yet the Boltzmann mode pushes either way about as often, like the reference: its
# chains climb the slope they start on, and no level is coarse enough to take them across. LQL, whose steps stay
# large at $w=60$, is the broadest. So "Boltzmann" is a promise that holds on a ladder that spans the barriers,
# and not for every $Q$.
#
# ## Things to try
#
# - `reference` with `inverse_temperature=50.0`: what does $w$ do where it is no temperature?
# - Noise from a worse start: `sigma_max=0.2` in section 2. How sharply does coverage fall?
# - `num_particles=4`: the best of several chains, by the clean critics. What is left of the weights?
# - Section 3 with replay that has seen one corner only: draw `action` from `bandit.sample_optimal`, say. The
#   posterior mean then leans on the law of the replay.
# - `temperature="spread"` in the Boltzmann mode: $w$ adapts until actions have `target_spread` [I]. On Pendulum it
#   follows the scale of rewards and changes little else: `paper_figures/nclql/fig_temperature.py`.
# - `make("toy/ring")` in sections 1 and 3.

# %% tags=["claims"]
plain_end, annealed_end = (
    entropies[name][1][-1] for name in ("plain, small steps", f"annealed, T = {long_steps}")
)
assert plain_end < 0.05 and annealed_end > 0.95
assert entropies["annealed, T = 2"][1][-1] < 0.9
assert learned_distance[0] < 0.5 and learned_distance[5:].max() < 0.2
assert table["learned", long_steps][0] < 0.08 < table["learned", 2][0]
assert 0.2 < measured[long_names[0]]["tv"] and measured[long_names[1]]["tv"] < 0.06
assert 0.2 < measured["reference, T = 2"]["tv"]
assert shift["reference"] < 1e-3 < 0.1 < shift["Boltzmann"]
assert all(np.all(returns[name].max(axis=1) > random_return + 600) for name in agents if "NC-LQL" in name)
