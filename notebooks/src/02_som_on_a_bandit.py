# %% [markdown]
# # SOM on a bandit
#
# SOM turns a critic into a policy that acts in one network evaluation. Here the critic is exact, a Q function on
# the plane whose optimal policy is known, so that every step can be held against the truth:
#
# 1. the target is the Boltzmann density of Q;
# 2. noising spreads it, and replayed actions with it;
# 3. its score is estimated from values of Q at random proposals;
# 4. the score makes the velocity of an ODE, plain or rescaled;
# 5. the velocity makes a regression target for a MeanFlow network, by an identity or by an ODE solver;
# 6. a small network learns it, and draws actions in one step;
# 7. the paper's own settings under the same budget;
# 8. the critic chooses among $N$ draws.
#
# **Time.** $t=0$ is the action, $t=1$ is noise, everywhere in eqgen:
# $a_t = \alpha(t)\,a_0 + \sigma(t)\,\varepsilon$.
#
# | symbol | in the code | meaning |
# |---|---|---|
# | $Q(s,a)$ | `q(obs, action)` | the critic, here the reward itself |
# | $\alpha$ (no argument) | `inverse_temperature` | $p_0(a\mid s)\propto\exp(\alpha\,Q(s,a))$ |
# | $\alpha(t), \sigma(t)$ | `schedule` | how much signal, how much noise (the paper's $\mu_t,\sigma_t$) |
# | $K$, $a_0^k$ | `num_samples`, `num_score_samples` | proposals per score estimate |
# | $S(a_t,t)$ | `.score` | estimate of $\nabla\log p_t(a_t)$ |
# | $w$ | `score_weight` | length given to the score when it is normalised |
# | $v_t$ | `velocity` | velocity of the probability-flow ODE |
# | $u_\theta(a_t,r,t)$ | `actor` | velocity averaged over $[r,t]$; $a=\varepsilon-u_\theta(\varepsilon,0,1)$ |
#
# **Where it comes from.** SOM is Kim, Ki, Ahn and Lee (2026), arXiv 2605.23365. [P] stands in the paper's abstract
# or introduction; [3P] in a third party's code that cites its equations; [S] in what others wrote about it; [I] is
# inferred by us; [T] was measured by us. We have not seen the paper's full text, and no code of its authors.
#
# **Needs** notebook 01.

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
num_samples = 64  # smoke: 8
num_training_samples = 32  # smoke: 8
num_points = 64  # smoke: 4
num_repeats = 32  # smoke: 4
num_intervals = 200  # smoke: 8
num_updates = 12_000  # smoke: 8
num_ode_updates = 1200  # smoke: 8
num_chunks = 10  # smoke: 2
num_noise = 2000  # smoke: 16
batch_size = 128  # smoke: 8
hidden = (128, 128, 128)  # smoke: (8, 8)

# %%
import time
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

from eqgen import plotting, samplers
from eqgen.algorithms.som import SOM
from eqgen.envs.catalog import make
from eqgen.interactive import explore
from eqgen.meanflow import average_velocity, meanflow_target
from eqgen.networks.policies import MeanVelocity
from eqgen.ode import flow_map, probability_flow
from eqgen.parameterizations import converted
from eqgen.scores import (
    denoising_score,
    gradient_score,
    normal_proposals,
    truncated_proposals,
    truncated_score,
)
from eqgen.tree import filter_scan, polyak


plotting.use_style()
colors = np.array(plotting.COLORS)
coarse = dict(dpi=110)  # of the busiest figures, instead of 150: keeps the file small
keys = jr.split(jr.key(seed), 12)

# %% [markdown]
# ## 1. The target: $\exp(\alpha Q)$
#
# One step, nothing to observe, a reward $Q(a)=\log p(a)$ with $p$ four Gaussians of weights .4, .3, .2, .1 at the
# corners of a square. SOM's policy should be $p_0(a)\propto\exp(\alpha\,Q(a))$ [P]: at $\alpha=1$ that is $p$. A
# smaller $\alpha$ makes the modes broader and more equal, a larger one narrower, and the best of them wins.

# %%
bandit = make("toy/mixture")
line = jnp.linspace(-1, 1, 201)
grid = jnp.stack(jnp.meshgrid(line, line), axis=-1).reshape(-1, 2)
values, modes = jax.vmap(bandit.log_density)(grid), jax.vmap(bandit.mode)(grid)

fig, axes = plotting.subplots(1, 4, width=plotting.TEXT_WIDTH, aspect=1.0, sharey=True)
axes[0].contourf(line, line, values.reshape(201, 201), levels=24, cmap="cividis")
axes[0].set(title="$Q$", aspect="equal")
for ax, inverse_temperature in zip(axes[1:], (0.2, 1.0, 5.0)):
    target = lambda a, scale=inverse_temperature: scale * bandit.log_density(a)
    plotting.density(ax, target)
    ax.set(title=rf"$\exp(\alpha Q)$, $\alpha = {inverse_temperature:g}$")
    mass = jnp.bincount(modes, jax.nn.softmax(inverse_temperature * values), length=4)
    print(f"alpha = {inverse_temperature:3.1f}   share of each mode {np.array(mass).round(3)}")
for ax in axes:
    ax.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
plt.show()


def draw_target(ax):
    ax.imshow(np.exp(values).reshape(201, 201), extent=(-1, 1, -1, 1), origin="lower", cmap="Greys")
    ax.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    ax.grid(False)


# %% [markdown]
# The same at any $\alpha$ of a slider:


# %%
def at_temperature(alpha=1.0):
    fig, (left, right) = plotting.subplots(1, 2, width=0.55 * plotting.TEXT_WIDTH, aspect=0.9)
    plotting.density(left, lambda a: alpha * bandit.log_density(a))
    left.set(title=rf"$\exp(\alpha Q)$, $\alpha={alpha:g}$", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    right.bar(range(4), jnp.bincount(modes, jax.nn.softmax(alpha * values), length=4), color=colors[:4])
    right.set(title="share of each mode", xticks=range(4), ylim=(0, 1))
    return fig


explore(at_temperature, alpha=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0))

# %% [markdown]
# From here on $\alpha=1$ and Q is not normalised, so that the truth is the mixture. Everything else of SOM is in
# `agent`: the *safe* profile, which is eqgen's own choice [I] in three places that come up below.

# %%
common = dict(
    num_score_samples=num_training_samples,
    inverse_temperature=1.0,
    q_normalization="none",
    hidden=hidden,
    actor_learning_rate=2e-3,
    final_actor_learning_rate=5e-5,
    decay_start=0,
    decay_updates=num_updates,
    policy_delay=1,
    max_grad_norm=1.0,
    loss_constant=1e-2,
    loss_reduction="sum",
)
agent = SOM.safe(**common)
schedule = agent.noise_schedule
obs = jnp.zeros(1)  # a bandit has nothing to observe


def q(obs, action):
    return bandit.log_density(action)


# %% [markdown]
# ## 2. Noising
#
# The variance-preserving schedule with $\beta$ from 0.1 to 20 [3P]. SOM noises actions from replay [3P], of which
# nobody says that they follow $p_0$: they decide *where* the velocity is asked for, not what it is. Here they are
# uniform. Noised (dots) they are at first a different cloud from $p_t$ (grey); from $t=0.5$ on the two can hardly
# be told apart.


# %%
def marginal(t):
    return bandit.density.perturbed(schedule.alpha(t), schedule.sigma(t))


action_key, noise_key = jr.split(keys[0])
replayed = jr.uniform(action_key, (300, 2), minval=-1.0, maxval=1.0)
noise = jr.normal(noise_key, (300, 2))
extent = (-2.6, 2.6, -2.6, 2.6)

fig, axes = plotting.subplots(1, 4, width=plotting.TEXT_WIDTH, aspect=1.05, sharey=True)
for ax, t in zip(axes, (0.02, 0.2, 0.5, 1.0)):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    plotting.density(ax, marginal(t).log_density, extent=extent, cmap="Greys")
    ax.plot(*(alpha * replayed + sigma * noise).T, ".", color=colors[1], markersize=1.5, alpha=0.7)
    ratio = f"{sigma / alpha:.2f}" if sigma < 10 * alpha else f"{sigma / alpha:.0f}"
    ax.set(title=rf"$t={t:g}$, $\sigma/\alpha={ratio}$", xlim=extent[:2], ylim=extent[2:])
    ax.set(xticks=[-2, 0, 2], yticks=[-2, 0, 2])
plt.show()

# %% [markdown]
# ## 3. The score from values of Q
#
# Which actions may $a_t$ have come from? Before Q is consulted, $a_0^k\sim\mathcal N\big(a_t/\alpha(t),
# (\sigma/\alpha)^2 I\big)$; Q then gives each of these $K$ proposals the weight $w_k\propto\exp(\alpha Q(a_0^k))$
# (Eq. 5 [3P]). As $t$ grows the proposals leave the box of possible actions, where a learned critic has seen
# nothing. *Truncated* proposals stay inside [I]. Below, the same $a_t$ for both; the area of a dot is its weight.

# %%
proposers = {
    "normal": jax.jit(partial(normal_proposals, num_samples=num_samples)),
    "truncated": jax.jit(partial(truncated_proposals, num_samples=num_samples)),
}
a_0, noise = jnp.array([0.45, 0.6]), jnp.array([0.6, -0.8])
extent = (-2.1, 2.1, -2.1, 2.1)
fig, axes = plotting.subplots(1, 3, width=plotting.TEXT_WIDTH, aspect=1.05, sharey=True)
for ax, t in zip(axes, (0.05, 0.15, 0.3)):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    a_t = alpha * a_0 + sigma * noise
    draw_target(ax)
    ax.add_patch(plt.Rectangle((-1, -1), 2, 2, fill=False, linewidth=0.6))
    ax.plot(*(a_t / alpha), "k+", markersize=7, markeredgewidth=1.2, label=r"$a_t/\alpha(t)$")
    for (name, propose), color in zip(proposers.items(), (1, 0)):
        proposals = propose(a_t, alpha, sigma, key=keys[1])
        weights = jax.nn.softmax(jax.vmap(bandit.log_density)(proposals))
        sizes = 3 + 150 * weights
        ax.scatter(*proposals.T, s=sizes, c=colors[color], alpha=0.65, linewidths=0)
        ax.plot([], [], ".", color=colors[color], label=name)
        print(f"t = {t:4.2f}   {name:>9}: {1 / jnp.sum(weights**2):4.1f} of {num_samples} proposals count")
    ax.set(title=f"$t={t}$", xlim=extent[:2], ylim=extent[2:], xticks=[-2, 0, 2], yticks=[-2, 0, 2])
axes[0].legend(loc="lower left")
plt.show()

# %% [markdown]
# Three estimates come from such proposals:
#
# - the *gradient* form, $S=\frac1{\alpha(t)}\sum_k w_k\,\alpha\nabla Q(a_0^k)$, the paper's [3P];
# - the *denoising* form, $S=\frac1{\sigma^2}\big(\alpha(t)\sum_k w_ka_0^k-a_t\big)$, from values alone [I];
# - the *truncated* form, the same on truncated proposals [I].
#
# All are consistent in $K$; at finite $K$ each has a bias and a variance. Against the analytic score, over
# $a_t\sim p_t$, relative to the size of the score (a bias that the repeats cannot tell from zero is left out):

# %%
estimators = {"gradient": gradient_score, "denoising": denoising_score, "truncated": truncated_score}
times = np.geomspace(0.01, 0.95, 11)
counts = (num_samples // 4, num_samples, 4 * num_samples)


@jax.jit
def noised_actions(t, key):
    """Draws of a_t ~ p_t and their true scores."""
    a_t = jax.vmap(lambda key: marginal(t).sample(key=key))(jr.split(key, num_points))
    return a_t, jax.vmap(marginal(t).score)(a_t)


@partial(jax.jit, static_argnums=(0, 4))
def errors_of(estimator, a_t, truth, t, num_samples, keys):
    """Relative RMSE, mean cosine, relative bias and deviation over repeated estimates."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    once = lambda a, key: (
        estimator(bandit.log_density, a, alpha, sigma, num_samples=num_samples, key=key).score
    )
    scores, truth = jax.vmap(jax.vmap(once, (None, 0)))(a_t, keys), truth[:, None]
    norm = lambda x: jnp.linalg.norm(x, axis=-1)
    size = jnp.mean(norm(truth) ** 2)
    variance = jnp.mean(jnp.sum(jnp.var(scores, axis=1, ddof=1), axis=-1))
    squared_bias = jnp.mean(norm(jnp.mean(scores, axis=1) - truth[:, 0]) ** 2) - variance / num_repeats
    squared_error = jnp.mean(norm(scores - truth) ** 2)
    cosine = jnp.mean(jnp.sum(scores * truth, axis=-1) / (norm(scores) * norm(truth)))
    relative = jnp.sqrt(jnp.stack([squared_error, squared_bias, variance]) / size)
    return relative[0], cosine, relative[1], relative[2]


# %%
repeat_keys = jr.split(keys[2], (num_points, num_repeats))
points = [noised_actions(t, keys[4]) for t in times]
measured = {
    (name, count): np.array([errors_of(f, *points[i], t, count, repeat_keys) for i, t in enumerate(times)]).T
    for name, f in estimators.items()
    for count in counts
}
width = times[np.argmin([abs(schedule.sigma(t) / schedule.alpha(t) - bandit.density.stds[0]) for t in times])]
print(f"relative RMSE at K = {num_samples}")
print("         t  " + "  ".join(f"{t:7.3f}" for t in times[::2]))
for name in estimators:
    print(f"{name:>10}  " + "  ".join(f"{x:7.2f}" for x in measured[name, num_samples][0][::2]))

# %%
fig, axes = plotting.subplots(1, 3, width=plotting.TEXT_WIDTH, aspect=1.0)
panels = ("error / size of the score", "cosine with the score", f"deviation and bias, K = {num_samples}")
for (name, count), (rmse, cosine, bias, deviation) in measured.items():
    color, style = colors[list(estimators).index(name)], [":", "-", "--"][counts.index(count)]
    axes[0].loglog(times, rmse, style, color=color, label=name if style == "-" else None)
    axes[1].semilogx(times, cosine, style, color=color)
    if count == num_samples:
        axes[2].loglog(times, deviation, "-", color=color)
        axes[2].loglog(times, bias, "o", color=color, markersize=3)
for style, count in zip((":", "-", "--"), counts):
    axes[1].plot([], [], style, color="0.4", label=f"K = {count}")
axes[2].plot([], [], "-", color="0.4", label="deviation")
axes[2].plot([], [], "o", color="0.4", markersize=3, label="bias")
for ax, title in zip(axes, panels):
    ax.axvline(width, color="0.6", linewidth=0.8, zorder=0)
    ax.set(title=title, xlabel="t", xticks=[0.01, 0.1, 1], xticklabels=["0.01", "0.1", "1"])
    ax.legend(frameon=True, framealpha=1, edgecolor="none", borderpad=0.1)
axes[0].set_ylim(0.03, 300)
axes[2].set_ylim(0.003, 300)
plt.show()

# %% [markdown]
# The grey line is where $\sigma/\alpha$ equals the width of a mode. To its left the gradient form is right, to
# its right variance and then bias explode: the proposals leave the box, where $\exp(Q)$ vanishes and $\nabla Q$
# is large. (This Q falls off like a parabola there. A learned critic would answer something else, no better.)
# Sixteen times as many proposals move the point where it fails only a little. The forms that use values alone
# are noisy near $t=0$, where they divide by $\sigma$, and fair everywhere else; truncation makes them better
# still at large $t$, because no proposal is wasted outside the box.

# %% [markdown]
# ## 4. From score to velocity
#
# The probability-flow ODE needs $v_t=-\frac12\beta(t)\,(a_t+S)$. At large $t$ this is a small difference of two
# large vectors; SOM's *raw* mode therefore computes the same $v_t$ from the posterior mean $\sum_k w_ka_0^k$, where
# nothing cancels [I]. The paper instead rescales the score, $v_t=-\frac12\beta(t)\,(a_t+w\,S/\|S\|)$ with $w=25$
# (Eq. 8 [3P]). The arrows show $-v$, the way towards actions, all of one panel with the same proposal noise.

# %%
rescaling = SOM.paper(**common)
denoise = lambda a, t: bandit.density.posterior_mean(a, schedule.alpha(t), schedule.sigma(t))
exact_velocity = converted(denoise, schedule, source="x0", target="velocity")


def estimated_velocity(agent, estimator, a, t, key):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    estimate = estimator(bandit.log_density, a, alpha, sigma, num_samples=num_samples, key=key)
    return agent.rescaled_flow(estimate, a, t)


fields = {
    "exact": exact_velocity,
    "raw": partial(estimated_velocity, agent, truncated_score, key=keys[3]),
    "rescaled": partial(estimated_velocity, rescaling, gradient_score, key=keys[3]),
}
titles = ("exact score", "truncated form, raw", "gradient form, $w=25$")
fig, axes = plotting.subplots(2, 3, width=plotting.TEXT_WIDTH, aspect=0.8, **coarse)
for row, t in zip(axes, (0.05, 0.25)):
    for ax, field in zip(row, fields.values()):
        towards_actions = lambda a, field=field, t=t: -field(a, t)
        plotting.vector_field(ax, towards_actions, extent=(-1.4, 1.4, -1.4, 1.4), resolution=12)
        ax.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    row[0].set_ylabel(f"$t={t}$")
for ax, title in zip(axes[0], titles):
    ax.set_title(title)
plt.show()


# %%
@partial(jax.jit, static_argnums=0)
def mean_speed(field, a_t, t):
    return jnp.mean(jnp.linalg.norm(jax.vmap(lambda a: field(a, t))(a_t), axis=-1))


speeds = {
    name: [mean_speed(field, points[i][0], times[i]) for i in range(0, len(times), 2)]
    for name, field in fields.items()
}
print("mean speed |v| where a_t ~ p_t")
print("         t  " + "  ".join(f"{t:7.3f}" for t in times[::2]))
for name, speed in speeds.items():
    print(f"{name:>10}  " + "  ".join(f"{x:7.2f}" for x in speed))

# %% [markdown]
# The rescaled field is three times too fast near $t=0$ and ten thousand times near $t=1$, where the flow should
# hardly move: its average over $[0,1]$, of the size of an action, is a difference of large numbers. That is
# worth remembering in section 7.

# %% [markdown]
# ## 5. The regression target
#
# One step over $[r,t]$ needs the *average* velocity $u=\frac1{t-r}\int_r^tv_\tau\,\mathrm d\tau$. SOM gets a target
# for it from the MeanFlow identity, $v_t-(t-r)\,\mathrm du_\theta/\mathrm dt$, with one Jacobian-vector product of
# the network [P]. eqgen can also integrate the estimated field from $t$ to $r$ with Diffrax and take
# $(a_t-a_r)/(t-r)$ itself, `target="ode"` [I]. How far is each from the truth, the same ODE with the exact score?


# %%
def integrating(ode_steps):
    """`agent` with the other target: the field integrated by so many Euler steps."""
    settings = common | dict(decay_updates=num_ode_updates)
    return SOM.safe(**settings, target="ode", ode_solver="euler", ode_steps=ode_steps)


def intervals(key):
    """(a_t, r, t): half of them as in training, but without r = t; half the interval (0, 1) that acting uses."""
    action_key, noise_key, *time_keys = jr.split(key, 4)
    t, s = (jr.uniform(key, (num_intervals,), minval=agent.t_min) for key in time_keys)
    a_0 = jr.uniform(action_key, (num_intervals, 2), minval=-1.0, maxval=1.0)
    noise = jr.normal(noise_key, (2, num_intervals, 2))
    a_t = jax.vmap(schedule.perturb)(a_0, noise[0], t)
    zero, one = jnp.zeros(num_intervals), jnp.ones(num_intervals)
    return jnp.concatenate([a_t, noise[1]]), jnp.concatenate([s * t, zero]), jnp.concatenate([t, one])


@jax.jit
@jax.vmap
def exact_average(a_t, r, t):
    field = lambda a, tau: exact_velocity(a, jnp.maximum(tau, agent.t_min))
    return average_velocity(a_t, flow_map(field, a_t, t, r)[0], r, t, field(a_t, t))


a_t, r, t = intervals(keys[5])
u_exact = exact_average(a_t, r, t)

# %% [markdown]
# Each target is made `num_repeats` times, with fresh proposals each time: the mean shows the bias, the spread what
# the regression has to average out. Both are relative to the size of the exact average velocity.


# %%
def square(x):
    """The mean square over the random intervals, and over (0, 1)."""
    return jnp.mean(jnp.sum(x**2, axis=-1).reshape(2, num_intervals), axis=1)


@eqx.filter_jit
def bias_and_deviation(agent, actor):
    """Of the regression target; over random intervals and over (0, 1): two arrays of two."""
    same = jnp.broadcast_to(obs, (2 * num_intervals, 1))
    mean_velocity = lambda a, r, t: actor(a, r, t, obs)

    def once(key):
        v, average, _ = agent.regression_target(q, same, a_t, r, t, key=key)
        return (
            jax.vmap(partial(meanflow_target, mean_velocity))(a_t, r, t, v)[1] if average is None else average
        )

    targets = jax.lax.map(once, jr.split(keys[7], num_repeats))
    variance = square(jnp.std(targets, axis=0, ddof=1))
    squared_bias = square(jnp.mean(targets, axis=0) - u_exact) - variance / num_repeats
    return jnp.sqrt(jnp.maximum(squared_bias, 0) / square(u_exact)), jnp.sqrt(variance / square(u_exact))


untrained = MeanVelocity(1, 2, hidden, agent.activation, key=keys[6])
target_bias = {}


def report(name, agent, actor):
    target_bias[name], deviation = bias_and_deviation(agent, actor)
    cells = "".join(f"   bias {b:.2f}, deviation {d:.2f}" for b, d in zip(target_bias[name], deviation))
    print(f"{name:>27}{cells}")


print(f"{'':27}   {'random intervals':26}   (0, 1)")
report("identity, untrained network", agent, untrained)
for ode_steps in (8, 32):
    report(f"ODE, {ode_steps} Euler steps", integrating(ode_steps), untrained)

# %% [markdown]
# The identity asks the network about itself. Before training its target over $(0,1)$ is off by about as much as
# the answer is long; and hardly a proposal is to blame, since near $t=1$ they all say that the flow stands
# still. The ODE's target is useful from the first update on, for 33 evaluations of the field where the identity
# needs one. Four times the steps take off little of its bias. The rest comes from the proposals: they are the same
# all along a path (a solver needs a smooth field), so each target is the end point under a critic seen through $K$
# actions only, and where that critic puts the borders between the modes varies [I].

# %% [markdown]
# ## 6. Training
#
# `update_actor` is the whole step: draw $(r,t)$, noise the actions, estimate scores, make velocities and targets,
# regress. We call it with uniform actions in place of replay and keep a Polyak average of the network.

# %%
observations = jnp.broadcast_to(obs, (batch_size, 1))


@eqx.filter_jit
def advance(agent, carry, keys):
    def step(carry, key):
        actor, average, opt_state = carry
        action_key, update_key = jr.split(key)
        actions = jr.uniform(action_key, (batch_size, 2), minval=-1.0, maxval=1.0)
        actor, opt_state, metrics = agent.update_actor(
            actor, opt_state, q, observations, actions, key=update_key
        )
        return (actor, polyak(average, actor, 0.005), opt_state), metrics["actor/squared_error"]

    return filter_scan(step, carry, keys)


def beginning(agent):
    return untrained, untrained, agent.actor_optimizer.init(eqx.filter(untrained, eqx.is_inexact_array))


# %% [markdown]
# Noise will go through the networks, once, and through the probability-flow ODE of the exact score, solved by
# Diffrax to $10^{-5}$: no network can do better than that ODE. What we look at is the share of each mode, how many
# actions lie within three standard deviations $S$ of one, and how far they are from where the ODE takes the same
# noise.

# %%
noise = jr.normal(keys[10], (num_noise, 2))
exact = bandit.sample_optimal(num_noise, key=keys[11])


@jax.jit
@jax.vmap
def follow_ode(noise):
    return probability_flow(lambda a, t: marginal(t).score(a), noise, schedule)[0]


@eqx.filter_jit
def generate(actor):
    return jax.vmap(lambda eps: agent.generate(actor, obs, eps))(noise)


@jax.jit
def assess(actions, ends):
    modes = jax.vmap(bandit.mode)(actions)
    nearest = jnp.min(jnp.linalg.norm(actions[:, None] - bandit.mode_centres[None], axis=-1), axis=1)
    distance = jnp.median(jnp.linalg.norm(actions - ends, axis=-1))
    within = jnp.mean(nearest < 3 * bandit.density.stds[0])
    return modes, jnp.bincount(modes, length=4) / len(actions), within, distance


# %% [markdown]
# Both targets start from the same network. The ODE's gets a tenth of the updates, because each of them costs so
# much more. What one costs is CPU time, that of all cores together, so that it hardly depends on what else the
# machine is doing.

# %%
ends = follow_ode(noise)
contestants = {"identity": (agent, num_updates), "ODE": (integrating(32), num_ode_updates)}
actors, cost, errors, distances = ({} for _ in range(4))
for name, (contestant, updates) in contestants.items():
    carry, costs, errors[name], distances[name] = beginning(contestant), [], [], []
    for chunk in jr.split(keys[9], (num_chunks, updates // num_chunks)):
        begun = time.process_time()
        carry, error = jax.block_until_ready(advance(contestant, carry, chunk))
        costs.append(1000 * (time.process_time() - begun) / len(chunk))
        errors[name].append(error)
        distances[name].append(float(assess(generate(carry[1]), ends)[3]))
    actors[name] = carry[1]
    cost[name] = float(np.median(costs[1:]))  # the first includes compilation
    print(f"{name:>8}: {updates} updates of {cost[name]:.1f} ms each, {updates * cost[name] / 1000:.0f} s")

# %%
samples = {"exact": exact, "exact ODE": ends} | {name: generate(actor) for name, actor in actors.items()}
results = {name: assess(actions, ends) for name, actions in samples.items()}
print("            share of each mode            within 3 S   median distance to the ODE")
for name, (_, shares, within, distance) in results.items():
    last = "" if name == "exact" else f"{distance:.3f}"
    print(f"{name:>9}   " + "  ".join(f"{x:.3f}" for x in shares) + f"       {within:.3f}        {last}")
print()
report("identity, trained network", agent, actors["identity"])
network_error = jnp.sqrt(
    square(jax.vmap(lambda a, r, t: actors["identity"](a, r, t, obs))(a_t, r, t) - u_exact) / square(u_exact)
)
print(
    f"{'that network itself':>27}" + "".join(f"   error {error:<21.2f}" for error in network_error).rstrip()
)

# %%
fig, (left, right) = plotting.subplots(1, 2, width=0.8 * plotting.TEXT_WIDTH, aspect=0.7, sharey=True)
for (name, (_, updates)), style in zip(contestants.items(), ("o-", "s--")):
    count = np.linspace(0, updates, num_chunks + 1)[1:]
    left.plot(count, distances[name], style, markersize=3, label=name)
    right.plot(count * cost[name] / 1000, distances[name], style, markersize=3)
left.set(xlabel="updates", ylabel="median distance to the ODE", ylim=(0, None))
left.set_xticks([0, num_updates // 2, num_updates])
right.set(xlabel="CPU time (s)")
left.legend()
plt.show()

# %% [markdown]
# The ODE's target learns in some hundred updates what takes the identity thousands, and an update costs more
# than ten times as much. In CPU time the identity is ahead throughout. Nor does the ODE's target end better: it
# levels off at a distance of about 0.2, where its bias keeps it [I]; more than twice as many updates ended there
# as well [T].
#
# The identity's target stays far from the truth over $(0,1)$, even when the network that it is made of is close.
# What is wrong is the network's derivative in $t$, and the regression seems to average that over intervals and
# updates [I].

# %% tags=["thumbnail"]
fig, axes = plotting.subplots(2, 3, width=0.8 * plotting.TEXT_WIDTH, aspect=1.05, **coarse)
shown = {
    "Diffrax, exact score": ends,
    "one step, identity": samples["identity"],
    "one step, ODE": samples["ODE"],
}
for (top, bottom), (title, actions) in zip(axes.T, shown.items()):
    top.scatter(*noise[:600].T, s=3, c=colors[assess(actions, ends)[0][:600]], linewidths=0)
    top.set(title=title, aspect="equal", xlim=(-3, 3), ylim=(-3, 3), xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    draw_target(bottom)
    bottom.scatter(*actions[:600].T, s=2, c=colors[results["exact ODE"][0][:600]], linewidths=0)
    bottom.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
axes[0, 0].set_ylabel("noise, by the mode it goes to")
axes[1, 0].set_ylabel("actions, by the mode\nthe exact ODE goes to")
plt.show()

# %% [markdown]
# Above, the four basins of the ODE: one smooth network evaluation has to be almost discontinuous at their borders.
# Below, what comes of it: the few actions between the modes are noise from near a border. Against the Boltzmann
# density itself, along either axis:

# %%
fig, axes = plotting.subplots(1, 2, width=0.8 * plotting.TEXT_WIDTH, aspect=0.6, sharey=True)
bins = np.linspace(-1.2, 1.2, 49)
for axis, ax in enumerate(axes):
    for i, (name, linestyle) in enumerate((("identity", "-"), ("ODE", "--"))):
        hist = dict(density=True, histtype="step", color=colors[i], linestyle=linestyle)
        ax.hist(np.array(samples[name][:, axis]), bins, label=f"one step, {name}", **hist)
    exact_marginal = (
        np.exp(values).reshape(201, 201).mean(axis=axis) * 2
    )  # an integral over a side of length 2
    ax.plot(line, exact_marginal, color="k", label=r"$\exp(\alpha Q)$")
    ax.set(xlabel=f"$a_{axis + 1}$", xlim=(-1.2, 1.2), xticks=[-1, 0, 1])
axes[0].set_ylabel("density")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# The shares are right to a few hundredths with either target. With the identity's, nine actions in ten lie
# within $3S$ of a mode; the modes are too sharp, and there is a floor between them. With the ODE's, the density
# is hardly more than a box.

# %% [markdown]
# ## 7. The paper's profile, same budget
#
# `SOM.paper()` takes the gradient form, divides Q by its deviation over the batch, and normalises the score to
# $w=25$ [3P]. First the field itself, followed with 2000 Euler steps and fresh proposals at each, then a network
# trained on it with the identity, for as many updates as in section 6.

# %%
paper = SOM.paper(**(common | dict(q_normalization="batch")))
short = noise[: num_noise // 8]


@jax.jit
def follow_paper_field(a):
    same = jnp.broadcast_to(obs, (len(a), 1))

    def velocity(a, t):
        key = jr.fold_in(keys[7], jnp.int32(1e6 * t))
        return paper.velocity(q, same, a, jnp.full(len(a), t), key=key)[0]

    return samplers.euler(velocity, a, samplers.uniform_grid(num_steps=2000, t_min=1e-3))[0]


carry, error = advance(paper, beginning(paper), jr.split(keys[9], num_updates))
actors["paper"], errors["paper"] = carry[1], [error]
samples |= {"field": follow_paper_field(short), "paper": generate(actors["paper"])}
for name, title, reference in (("field", "field, 2000 steps", short), ("paper", "network, one step", noise)):
    results[name] = assess(samples[name], ends[: len(reference)])
    largest = jnp.quantile(jnp.max(jnp.abs(samples[name]), axis=1), 0.95)
    shares = "  ".join(f"{x:.3f}" for x in results[name][1])
    print(f"{title}   shares {shares}   within 3 S {results[name][2]:.3f}   95 % of |a| below {largest:.1f}")

# %%
fig, axes = plotting.subplots(1, 3, width=plotting.TEXT_WIDTH, aspect=1.0)
for name, style in (("identity", "-"), ("ODE", "--"), ("paper", ":")):
    squared = np.concatenate(errors[name]).reshape(4 * num_chunks, -1)
    updates = np.linspace(0, squared.size, 4 * num_chunks + 1)[1:]
    axes[0].semilogy(updates, squared.mean(axis=1), style, label=name)
axes[0].set(title=r"mean of $\|u_\theta-\mathrm{target}\|^2$", xlabel="updates")
axes[0].legend(loc="center right")
reach = max(1.5, 1.1 * float(jnp.quantile(jnp.abs(samples["paper"]), 0.999)))
for ax, name, title, limit in zip(
    axes[1:], ("field", "paper"), ("field, 2000 steps", "network, one step"), (1.1, reach)
):
    draw_target(ax)
    ax.add_patch(plt.Rectangle((-1, -1), 2, 2, fill=False, linewidth=0.6))
    ax.plot(*samples[name].T, ".", color=colors[2], markersize=4, markeredgewidth=0)
    ax.set(title=f"paper: {title}", xlim=(-limit, limit), ylim=(-limit, limit))
axes[2].xaxis.set_major_locator(plt.MaxNLocator(5))
axes[2].yaxis.set_major_locator(plt.MaxNLocator(5))
plt.show()

# %% [markdown]
# Followed in small steps the field is tame, and greedy: all of the noise ends on top of the two best modes, in
# other shares than theirs, because the length of the score, which says when to stop, has been taken out. One
# step of the network is another matter. Its regression error is many thousand times that of section 6, and its
# actions end far outside of the box (the square in the middle of the right panel). We read this as what section
# 4 led to expect: a small difference of large numbers is hard to regress on [I].
#
# This is our reading of the profile, with few proposals and a small network. 25 000 updates of a larger one with
# $K=100$ did no better (`paper_figures/som/results/bandit_paper.json`). It says nothing about control tasks,
# where actions are clipped and a critic chooses among them.

# %% [markdown]
# ## 8. Best of $N$
#
# When it acts, SOM draws $N$ candidates and takes the one that the critic values most ([S]: a secondary source; how
# many is inferred). With the exact Q this is a second, greedy step of improvement on top of the learned one.

# %%
candidates = (1, 2, 4, 8, 32)
critics = lambda obs, action: bandit.log_density(action)[None]  # an "ensemble" of one


@eqx.filter_jit
def best_of(actor, num_candidates):
    choose = lambda key: agent.best_of_n(actor, critics, obs, num_candidates, key=key)
    return jax.vmap(choose)(jr.split(keys[11], num_noise))


chosen = {(name, n): best_of(actors[name], n) for name in ("identity", "paper") for n in candidates}
mean_q = {k: float(jnp.mean(jax.vmap(bandit.log_density)(a))) for k, a in chosen.items()}
exact_q = jnp.mean(jax.vmap(bandit.log_density)(exact))
print(f"highest Q {jnp.max(values):.2f}, mean under the exact policy {exact_q:.2f}")
for (name, n), actions in chosen.items():
    shares = np.array(assess(actions, ends)[1])
    print(f"{name:>8}  N = {n:2}   mean Q {mean_q[name, n]:6.2f}   shares {shares.round(2)}")

# %% [markdown]
# One draw is worth less than the exact policy's, because of the actions between the modes; the best of two is
# worth more. By $N=32$ nearly every action is in the best mode and close to its top: $N$ acts like an inverse
# temperature of its own, and a policy that was to explore four modes explores one. Among candidates that are all
# in one corner, as those of the paper's profile are here once clipped, there is nothing to choose.
#
# ## Things to try
#
# - `inverse_temperature=5.0` in `common`: do the shares follow section 1?
# - `make("toy/ring")`, `"toy/moons"`, `"toy/broad-sharp"` as the bandit.
# - `estimator="gradient"` in `agent`, everything else as it is: which of the three choices of the paper's profile
#   makes it hard to learn here?
# - `SOM.paper(score_weight=5.0)`, or twice the updates.
# - `num_score_samples=256` in `integrating`: does the ODE's target level off lower?
# - `generation_steps=2` in `agent` before section 6 draws: two evaluations of the same networks.
# - A critic with a flaw: add `0.5 * jnp.sin(40 * action).sum()` to `q`. Which estimator notices?

# %% tags=["claims"]
small, large = times.searchsorted(0.02), times.searchsorted(0.3)
rmse = {name: measured[name, num_samples][0] for name in estimators}
assert rmse["gradient"][small] < rmse["denoising"][small]
assert rmse["truncated"][large] < rmse["denoising"][large] < rmse["gradient"][large]
assert target_bias["ODE, 32 Euler steps"][1] < 0.4 < target_bias["identity, untrained network"][1]
assert cost["ODE"] > 5 * cost["identity"]
assert jnp.abs(results["identity"][1] - bandit.mode_weights).max() < 0.08
assert results["identity"][2] > 0.8 and results["identity"][3] < 0.12 < results["ODE"][3] < 0.3
assert results["field"][2] > 0.95 and results["field"][1][2:].sum() < 0.05
assert results["paper"][2] < 0.1
assert mean_q["identity", 1] < exact_q < mean_q["identity", 4] < mean_q["identity", 32]
