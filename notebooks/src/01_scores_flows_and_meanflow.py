# %% [markdown]
# # Scores, flows and MeanFlow
#
# From a density that is known up to a constant to a network that draws from it in *one* evaluation. On the
# plane, with a mixture of four Gaussians, every step can be checked against the truth:
#
# 1. noise turns the mixture into a Gaussian, and the *score* says how;
# 2. the score can be estimated from values of the density alone;
# 3. the score makes an ODE that carries noise to data;
# 4. fixed-step samplers solve that ODE, with an error that falls at their order;
# 5. MeanFlow learns what the ODE does over a whole interval;
# 6. so that one step replaces the solver.
#
# **Time.** $t=0$ is data, $t=1$ is noise, everywhere in eqgen: $x_t = \alpha(t)\,x_0 +
# \sigma(t)\,\varepsilon$.
#
# | symbol | in the code | meaning |
# |---|---|---|
# | $p_0$, $p_t$ | `mixture`, `marginal(t)` | law of the data, of $x_t$ |
# | $\alpha(t), \sigma(t)$ | `schedule` | how much signal, how much noise |
# | $s(x,t)=\nabla\log p_t(x)$ | `score` | score |
# | $\mathbb{E}[x_0\mid x_t]$ | `denoise` | posterior mean |
# | $v(x,t)$ | `velocity` | velocity of the probability-flow ODE |
# | $u(x,r,t)$ | `mean_velocity` | velocity averaged over $[r,t]$, $r\le t$ |
#
# **Needs** nothing.

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
std = 0.15
num_points = 512  # smoke: 8
num_samples = 100  # smoke: 10
num_paths = 1000  # smoke: 16
num_updates = 12_000  # smoke: 20
batch_size = 256  # smoke: 8
hidden = (128, 128, 128)  # smoke: (8, 8)

# %%
from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax

from eqgen import plotting, samplers
from eqgen.interactive import explore
from eqgen.meanflow import average_velocity, meanflow_loss, meanflow_target, sample_uniform_interval
from eqgen.networks.policies import MeanVelocity
from eqgen.ode import flow_map, probability_flow
from eqgen.parameterizations import converted
from eqgen.schedules import VPLinear
from eqgen.scores import GaussianMixture, denoising_score, gradient_score, truncated_score
from eqgen.tree import filter_scan, polyak


plotting.use_style()
keys = jr.split(jr.key(seed), 8)

# %% [markdown]
# ## 1. A mixture, and what noise does to it
#
# $p_0(x) = \sum_i w_i\,\mathcal N(x;\, m_i,\, S^2 I)$ with weights .4, .3, .2, .1. Noising moves and widens
# each mode, $p_t(x)=\sum_i w_i\,\mathcal N\big(x;\,\alpha m_i,\,(\alpha^2S^2+\sigma^2) I\big)$, so density
# and score are known at every $t$.

# %%
mixture = GaussianMixture(
    means=[[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]], stds=[std] * 4, weights=[0.4, 0.3, 0.2, 0.1]
)
schedule = VPLinear()


def marginal(t):
    return mixture.perturbed(schedule.alpha(t), schedule.sigma(t))


def score(x, t):
    return marginal(t).score(x)


def denoise(x, t):
    return mixture.posterior_mean(x, schedule.alpha(t), schedule.sigma(t))


print("   t   alpha   sigma   sigma/alpha")
for t in (0.02, 0.1, 0.2, 0.5, 1.0):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    print(f"{t:4.2f}   {alpha:5.3f}   {sigma:5.3f}   {sigma / alpha:8.3f}")

# %% [markdown]
# The scores point uphill. With little noise they are steep and local; with much noise only the way to the
# centre is left. The arrows show directions, their colour the magnitude.

# %%
times, extent = (0.02, 0.1, 0.3), (-1.6, 1.6, -1.6, 1.6)
fig, axes = plotting.subplots(2, 3, width=plotting.TEXT_WIDTH, aspect=0.85)
for (top, bottom), t in zip(axes.T, times):
    plotting.density(top, marginal(t).log_density, extent=extent)
    top.set(title=f"$p_t$ at $t={t}$", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    plotting.vector_field(bottom, partial(score, t=t), extent=extent, resolution=13)
    bottom.set(title=f"score at $t={t}$", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
plt.show()

# %% [markdown]
# ## 2. The score from values of the density
#
# A critic gives $\log p_0$ up to a constant, and no samples. Since $x_t/\alpha$ is $x_0$ plus noise of
# deviation $\sigma/\alpha$, draws $x_0^k\sim\mathcal N\big(x_t/\alpha, (\sigma/\alpha)^2 I\big)$, weighted
# by $w_k\propto p_0(x_0^k)$, are draws from the posterior of $x_0$. Two estimates follow:
#
# $$\text{gradient form:}\quad s \approx \tfrac1\alpha\sum_k w_k\,\nabla\log p_0(x_0^k)
# \qquad\qquad
# \text{denoising form:}\quad s \approx \tfrac1{\sigma^2}\Big(\alpha\sum_k w_k\,x_0^k - x_t\Big)$$
#
# The truncated form is the denoising one with proposals kept in $[-1,1]^2$, where actions live.

# %%
estimators = {"gradient": gradient_score, "denoising": denoising_score, "truncated": truncated_score}


def estimate(estimator, x, t, num_samples, key):
    options = {"num_samples": num_samples, "key": key}
    return estimator(mixture.log_density, x, schedule.alpha(t), schedule.sigma(t), **options)


x, t = jnp.array([0.2, 0.4]), 0.2
print(f"x = {x}, t = {t}, {num_samples} proposals")
print(f"{'exact':>10}  score {np.array(score(x, t)).round(2)}")
for name, estimator in estimators.items():
    result = estimate(estimator, x, t, num_samples, keys[0])
    effective = float(result.effective_samples)
    print(f"{name:>10}  score {np.array(result.score).round(2)}  effective proposals {effective:.1f}")

# %% [markdown]
# The error over $x_t\sim p_t$, relative to the size of the score. The gradient form is right while the
# proposals stay within a mode ($\sigma/\alpha < S$) and useless beyond; the denoising form is the other way
# round.


# %%
@partial(jax.jit, static_argnums=1)
def relative_errors(t, num_samples, key):
    x_keys, noise_keys = jr.split(key, (2, num_points))
    x = jax.vmap(lambda key: marginal(t).sample(key=key))(x_keys)
    truth = jax.vmap(lambda x: score(x, t))(x)

    def error(estimator):
        scores = jax.vmap(lambda x, key: estimate(estimator, x, t, num_samples, key).score)(x, noise_keys)
        return jnp.sqrt(jnp.sum((scores - truth) ** 2) / jnp.sum(truth**2))

    return jnp.array([error(estimator) for estimator in estimators.values()])


ts, counts = np.geomspace(0.005, 0.95, 14), (num_samples // 4, num_samples, 4 * num_samples)
over_t = np.array([relative_errors(t, num_samples, keys[1]) for t in ts])
over_k = np.array([relative_errors(0.05, k, keys[2]) for k in counts])

# %%
fig, (left, right) = plotting.subplots(1, 2, width=plotting.TEXT_WIDTH, aspect=0.65)
for i, (name, marker) in enumerate(zip(estimators, "os^")):
    left.loglog(ts, over_t[:, i], marker=marker, markersize=3, label=name)
    right.loglog(counts, over_k[:, i], marker=marker, markersize=3, label=name)
crossover = schedule.time_of_log_snr(-2 * np.log(std))
left.axvline(crossover, color="0.6", linewidth=0.8)
left.annotate(r"$\sigma/\alpha=S$", (crossover, 20), xytext=(-4, 0), textcoords="offset points", ha="right")
left.set(xlabel="t", ylabel="relative error of the score", ylim=(0.01, 100), title=f"K = {num_samples}")
right.loglog(counts, 1.5 * over_k[0, 0] * (counts[0] / np.array(counts)) ** 0.5, "k:", label="$K^{-1/2}$")
right.set(xlabel="number of proposals K", title="t = 0.05", xticks=counts, xticklabels=counts)
right.set(ylim=(0.05, 1), yticks=[0.05, 0.1, 0.2, 0.5, 1], yticklabels=[0.05, 0.1, 0.2, 0.5, 1])
right.minorticks_off()
right.legend()
plt.show()

# %% [markdown]
# ## 3. The ODE that carries noise to data
#
# With drift $f=\mathrm d\log\alpha/\mathrm dt$ and diffusion $g^2$ of the schedule, the probability-flow
# ODE
#
# $$\frac{\mathrm dx}{\mathrm dt} = v(x,t) = f(t)\,x - \tfrac12 g^2(t)\,\nabla\log p_t(x)$$
#
# has $p_t$ as the law of $x_t$. Diffrax solves it from $t=1$ down to $10^{-3}$ with adaptive steps; the
# number of paths that end in each mode are the weights.

# %%
velocity = converted(denoise, schedule, source="x0", target="velocity")
t_grid = samplers.log_snr_grid(128, schedule, t_max=1.0, t_min=1e-3)
x_1 = jr.normal(keys[3], (num_paths, 2))


@jax.jit
@jax.vmap
def solve(x):
    return probability_flow(score, x, schedule, ts=t_grid, rtol=1e-6, atol=1e-6)


x_ode, path_ode = solve(x_1)


def mode_of(x):
    return jnp.argmin(jnp.linalg.norm(x[:, None] - mixture.means[None], axis=-1), axis=1)


fractions_ode = jnp.bincount(mode_of(x_ode), length=4) / num_paths
print("weights  ", np.array(mixture.weights))
print("fractions", np.array(fractions_ode).round(3))

# %%
fig, (left, right) = plotting.subplots(1, 2, width=plotting.TEXT_WIDTH, aspect=0.75)
plotting.vector_field(left, lambda x: -velocity(x, 0.1), extent=extent, resolution=17)
left.set(title="$-v$ at $t=0.1$: towards data", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
plotting.density(right, mixture.log_density, extent=(-2.6, 2.6, -2.6, 2.6), cmap="Greys")
for path, mode in zip(np.array(path_ode[:80]), np.array(mode_of(x_ode))):
    right.plot(*path.T, color=plotting.COLORS[mode], linewidth=0.5, alpha=0.8)
right.plot(*x_1[:80].T, "o", color="0.3", markersize=1.5)
right.set(title="80 paths from noise (dots) to data", aspect="equal")
plt.show()

# %% [markdown]
# All paths at one time, over $p_t$, and the field that moves them on. Run, the cell has a slider for $t$: from 1
# down, noise first gathers, then takes sides, and is sharpened last.

# %%
moments = [float(t) for t in t_grid[::8]]


def at_time(t=moments[9]):
    fig, (left, right) = plotting.subplots(1, 2, width=plotting.TEXT_WIDTH, aspect=0.75)
    plane = (-2.6, 2.6, -2.6, 2.6)
    plotting.density(left, marginal(t).log_density, extent=plane, cmap="Greys")
    points = path_ode[:, 8 * moments.index(t)]
    left.scatter(*points.T, s=2, c=np.array(plotting.COLORS)[mode_of(x_ode)], linewidths=0)
    left.set(title=f"{num_paths} paths at $t={t:.3f}$", xlim=plane[:2], ylim=plane[2:])
    plotting.vector_field(right, lambda x: -velocity(x, t), extent=plane, resolution=17)
    right.set(title="$-v$")
    return fig


explore(at_time, t=moments)

# %% [markdown]
# ## 4. Fixed-step samplers
#
# Four ways to take $n$ steps through the same times, equal in the log signal-to-noise ratio. *Path error*
# is the largest distance to the ODE's path on the way, its median over the paths. First-order methods halve
# it when the steps are doubled, second-order ones quarter it; Heun pays two evaluations a step,
# DPM-Solver++(2M) one.

# %%
step_counts = np.array([4, 8, 16, 32, 64, 128])
methods = {
    "Euler": lambda x, ts: samplers.euler(velocity, x, ts),
    "DDIM": lambda x, ts: samplers.ddim(denoise, x, ts, schedule),
    "Heun": lambda x, ts: samplers.heun(velocity, x, ts),
    "DPM-Solver++(2M)": lambda x, ts: samplers.dpm_solver_pp_2m(denoise, x, ts, schedule),
}


@partial(jax.jit, static_argnums=(0, 1))
def path_error(method, num_steps):
    stride = 128 // num_steps
    _, path = jax.vmap(lambda x: method(x, t_grid[::stride]))(x_1)
    distances = jnp.linalg.norm(path - path_ode[:, ::stride], axis=-1)
    return jnp.median(jnp.max(distances, axis=1)), jnp.median(distances[:, -1])


errors = {name: np.array([path_error(f, int(n)) for n in step_counts]) for name, f in methods.items()}
print(f"{'order between 32 and 64 steps':>30}")
for name, error in errors.items():
    print(f"{name:>30}  {np.log2(error[3, 0] / error[4, 0]):.2f}")

# %%
fig, ax = plotting.subplots(width=0.6 * plotting.TEXT_WIDTH)
for (name, error), style in zip(errors.items(), ["o-", "s--", "^-", "v--"]):
    ax.loglog(step_counts, error[:, 0], style, markersize=3.5, label=name)
ax.set(xlabel="steps", ylabel="path error", xticks=step_counts, xticklabels=step_counts)
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
# Where the same noise ends, coloured by the mode the ODE sends it to, for a number of steps that a slider sets, and
# the median distance to where the ODE ends. With 8 steps Euler stops short of the modes on the outside, DDIM on the
# inside; Heun, for twice the evaluations, is nearly there.


# %%
@partial(jax.jit, static_argnums=(0, 1))
def end_points(method, num_steps):
    return jax.vmap(lambda x: method(x, t_grid[:: 128 // num_steps])[0])(x_1)


def in_steps(steps=8):
    fig, axes = plotting.subplots(1, 4, width=plotting.TEXT_WIDTH, aspect=1.15, sharey=True)
    for ax, (name, method) in zip(axes, methods.items()):
        x = end_points(method, steps)
        ax.scatter(*x.T, s=1.5, c=np.array(plotting.COLORS)[mode_of(x_ode)], linewidths=0)
        distance = jnp.median(jnp.linalg.norm(x - x_ode, axis=-1))
        ax.set(title=f"{name}, {steps} steps\ndistance {distance:.3f}", aspect="equal")
        ax.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    return fig


explore(in_steps, steps=[int(n) for n in step_counts])

# %% [markdown]
# ## 5. MeanFlow
#
# What one step over all of $[r,t]$ needs is not the velocity at its start but the velocity averaged along
# it,
#
# $$(t-r)\,u(x_t,r,t)=\int_r^t v(x_\tau,\tau)\,\mathrm d\tau = x_t-x_r .$$
#
# Differentiated along the path this becomes the *MeanFlow identity*, which has no integral:
#
# $$u = v-(t-r)\,\frac{\mathrm du}{\mathrm dt},\qquad
# \frac{\mathrm du}{\mathrm dt}=v\cdot\nabla_x u+\partial_t u .$$
#
# `meanflow_target` computes its right side with one Jacobian-vector product in the direction $(v, 0, 1)$ of
# $(x, r, t)$. For the true $u$, which Diffrax can integrate and differentiate, both sides agree:


# %%
def true_mean_velocity(x, r, t):
    x_r, _ = flow_map(velocity, x, t, r, rtol=1e-6, atol=1e-6, adjoint=diffrax.ForwardMode())
    return average_velocity(x, x_r, r, t, velocity(x, t))


@jax.jit
def both_sides(x, r, t):
    return meanflow_target(true_mean_velocity, x, r, t, velocity(x, t))


identity_error = 0.0
for r, t in [(0.05, 1.0), (0.2, 0.6), (0.3, 0.35)]:
    u, u_target = both_sides(jnp.array([0.4, -0.3]), r, t)
    identity_error = max(identity_error, float(jnp.max(jnp.abs(u - u_target))))
    sides = f"u = {np.array(u).round(4)}   v - (t - r) du/dt = {np.array(u_target).round(4)}"
    print(f"r = {r:.2f}, t = {t:.2f}   {sides}")

# %% [markdown]
# A network $u_\theta$ is regressed on that right side, made with its own derivative and held constant:
# $\mathcal L=\|u_\theta-\mathrm{sg}(v-(t-r)\,\dot u_\theta)\|^2$, weighted adaptively. A quarter of the
# intervals have $r=t$, where the target is $v$ itself; from there the identity carries it to ever longer
# intervals. Here $x_t$ is noised data and $v$ is exact; notebook 02 makes $v$ out of a critic.

# %%
network = MeanVelocity(0, 2, hidden, key=keys[4])  # a network for actions, here without an observation
optimiser = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, num_updates, 0.05))
)


def example_loss(network, key):
    interval_key, data_key, noise_key = jr.split(key, 3)
    r, t = sample_uniform_interval(key=interval_key, flow_ratio=0.25)
    x_t = schedule.perturb(mixture.sample(key=data_key), jr.normal(noise_key, (2,)), t)
    mean_velocity = lambda x, r, t: network(x, r, t, jnp.zeros(0))
    return meanflow_loss(mean_velocity, x_t, r, t, velocity(x_t, t), power=0.5)


def loss_fn(network, key):
    losses, metrics = jax.vmap(partial(example_loss, network))(jr.split(key, batch_size))
    return jnp.mean(losses), jnp.mean(metrics["meanflow_error"])


# %%
def update(carry, key):
    network, average, state = carry
    (_, error), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(network, key)
    updates, state = optimiser.update(grads, state)
    network = eqx.apply_updates(network, updates)
    return (network, polyak(average, network, 0.005), state), error


@eqx.filter_jit
def train(network, key):
    start = (network, network, optimiser.init(eqx.filter(network, eqx.is_array)))
    (_, average, _), errors = filter_scan(update, start, jr.split(key, num_updates))
    return average, errors


trained, training_errors = train(network, keys[5])
mean_velocity = lambda x, r, t: trained(x, r, t, jnp.zeros(0))
first, last = training_errors[: num_updates // 10].mean(), training_errors[-num_updates // 10 :].mean()
print(f"mean squared error against the target: {first:.4f} in the first tenth, {last:.4f} in the last")

# %% [markdown]
# ## 6. One step instead of a solver
#
# $x_0 = x_1 - u_\theta(x_1, 0, 1)$: the same noise as above, one evaluation of the network.

# %%
generate = jax.jit(jax.vmap(lambda x: samplers.meanflow(mean_velocity, x, samplers.uniform_grid(1))[0]))
x_one_step = generate(x_1)
x_exact = jax.vmap(lambda key: mixture.sample(key=key))(jr.split(keys[6], num_paths))

distance = jnp.linalg.norm(x_one_step - x_ode, axis=-1)
for name, x in {"exact": x_exact, "ODE": x_ode, "one step": x_one_step}.items():
    fractions = np.array(jnp.bincount(mode_of(x), length=4) / num_paths).round(3)
    near = jnp.min(jnp.linalg.norm(x[:, None] - mixture.means[None], axis=-1), axis=1) < 3 * std
    print(f"{name:>9}   fractions {fractions}   within 3 S of a mode {jnp.mean(near):.3f}")
print(f"median distance between one step and the ODE: {jnp.median(distance):.3f}")

# %% tags=["thumbnail"]
fig, axes = plotting.subplots(1, 3, width=plotting.TEXT_WIDTH, aspect=1.12, sharex=True, sharey=True)
samples = {"exact samples": x_exact, "ODE (Diffrax)": x_ode, "MeanFlow, one step": x_one_step}
for ax, (title, x) in zip(axes, samples.items()):
    modes = np.array(mode_of(x_exact if title == "exact samples" else x_ode))
    ax.scatter(*x.T, s=2, c=np.array(plotting.COLORS)[modes], linewidths=0)
    ax.set(
        title=title, aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xticks=[-1, 0, 1], yticks=[-1, 0, 1]
    )
plt.show()

# %% [markdown]
# Colours in the middle and on the right are those of the mode the *ODE* sends the noise to. One smooth map has
# to tear the plane into four pieces; what it has not torn far enough are the points between the modes.
#
# Against the samplers of section 4, by the distance of the end point over the number of evaluations:

# %%
few_steps = np.array([1, 2, 4, 8])


@partial(jax.jit, static_argnums=0)
def meanflow_error(num_steps):
    x = jax.vmap(lambda x: samplers.meanflow(mean_velocity, x, samplers.uniform_grid(num_steps))[0])(x_1)
    return jnp.median(jnp.linalg.norm(x - x_ode, axis=-1))


learned = np.array([meanflow_error(int(n)) for n in few_steps])
fig, ax = plotting.subplots(width=0.6 * plotting.TEXT_WIDTH)
for (name, error), style in zip(errors.items(), ["o-", "s--", "^-", "v--"]):
    evaluations = step_counts * (2 if name == "Heun" else 1)
    ax.loglog(evaluations, error[:, 1], style, markersize=3.5, label=name)
ax.loglog(few_steps, learned, "*-", color="k", markersize=7, label="MeanFlow (learned)")
ax.set(xlabel="evaluations", ylabel="distance to the ODE's end point", xticks=[1, 4, 16, 64, 256])
ax.set(xticklabels=[1, 4, 16, 64, 256])
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
# ## Things to try
#
# - `power=1.0` in `meanflow_loss`, the paper's setting for images: every example then pulls equally hard,
#   however small its error. What happens to the median distance here?
# - `flow_ratio=0.75`, also the paper's for images: more instants, fewer long intervals.
# - Replace the exact velocity by one from `truncated_score` (the posterior mean goes through `converted` with
#   `source="x0"`). How many proposals does it take?
# - `VPCosine()` as the schedule: where do the paths bend?
# - A sharper mixture, `std = 0.08`: which of the samplers suffers first, and which estimator?

# %% tags=["claims"]
gradient, denoising, _ = over_t.T
assert np.all(gradient[ts < 0.02] < denoising[ts < 0.02]) and np.all(gradient[ts > 0.1] > denoising[ts > 0.1])
assert identity_error < 1e-2
assert 0.7 < np.log2(errors["Euler"][3, 0] / errors["Euler"][4, 0]) < 1.3
assert np.log2(errors["Heun"][3, 0] / errors["Heun"][4, 0]) > 1.6
assert jnp.median(distance) < 0.08
assert jnp.max(jnp.abs(jnp.bincount(mode_of(x_one_step), length=4) / num_paths - mixture.weights)) < 0.05
