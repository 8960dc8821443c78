# %% [markdown]
# # The policy zoo
#
# Eighteen ways to turn a critic into actions: a Gaussian, diffusions trained in nine ways, flows, and chains that
# climb the critic without an actor. Here all of them learn from the same transitions of one bandit whose soft
# policy is known, so that each can be seen beside it:
#
# 1. a bandit with four modes, and the transitions that all learn from;
# 2. every method at one temperature, where it has one;
# 3. what each one's actions look like;
# 4. what an action costs, and how far it is from the soft policy;
# 5. Pendulum: recorded learning curves of all.
#
# **Where it comes from.** Each file in `eqgen/algorithms` names its paper, the public code it was compared with,
# and what it does differently. What is said of results below was measured in this notebook, with one seed.
#
# **Needs** notebooks 02 and 04.

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
num_transitions = 20_000
num_chunks = 30  # smoke: 1
updates_per_chunk = 100  # smoke: 2
batch_size = 128
num_actions = 2000  # smoke: 20
hidden = (64, 64)  # smoke: (8, 8)
learning_rate = 1e-3
num_cells = 10

# %%
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import eqgen
from eqgen import plotting
from eqgen.algorithms.aca import ACA
from eqgen.algorithms.actor_critic import AbstractDiffusionAgent
from eqgen.algorithms.base import AbstractOnPolicyAgent
from eqgen.algorithms.dacer import DACER
from eqgen.algorithms.dipo import DIPO
from eqgen.algorithms.dpmd import DPMD
from eqgen.algorithms.fpmd import FPMDM, FPMDR
from eqgen.algorithms.idem import IDEM
from eqgen.algorithms.maxentdp import MaxEntDP
from eqgen.algorithms.nclql import LQL, NCLQL
from eqgen.algorithms.ppo import PPO
from eqgen.algorithms.qsm import QSM, DenoisingQSM
from eqgen.algorithms.qvpo import QVPO
from eqgen.algorithms.sac import SAC
from eqgen.algorithms.sdac import SDAC
from eqgen.algorithms.som import SOM
from eqgen.algorithms.td3 import TD3
from eqgen.comparison import read_rows
from eqgen.envs.base import example_transition
from eqgen.envs.toys import mixture
from eqgen.exploration import AnnealedNoise
from eqgen.tree import filter_scan
from eqgen.types import Transition


plotting.use_style()
plt.rcParams["figure.dpi"] = 100  # keeps the file small
colors = plotting.COLORS

# %% [markdown]
# ## 1. Four modes
#
# The reward is $\log p(a)$, $p$ a mixture of four Gaussians of weights .4, .3, .2, .1. So $Q=\log p$, and the soft
# policy of temperature one, $\exp(Q)/Z$, is $p$ itself. All methods see the same uniform
# actions with their rewards. An episode is one step; with `discount=0` it does not matter whether it ends or goes
# on, and here it goes on, since some methods learn from the next state's actions.

# %%
bandit, blind = mixture(std=0.25), jnp.zeros(1)


def transitions(action):
    """What the bandit answers to some actions."""
    reward = jax.vmap(bandit.log_density)(action)
    obs, no = jnp.zeros((len(action), 1)), jnp.zeros(len(action), bool)
    return Transition(obs, action, reward, obs, terminated=no, truncated=~no)


uniform = jr.uniform(jr.key(seed), (num_transitions, 2), minval=-1.0, maxval=1.0)
replay = transitions(uniform)
weights = np.array(bandit.mode_weights)
print("rewards from", *np.percentile(replay.reward, [0, 50, 100]).round(1), "(least, median, greatest)")
print("weights of the modes", weights.round(2))

# %% [markdown]
# ## 2. One footing
#
# Networks, batches and learning rates are the same for all (actors' rates fall, where the method has that), and one
# draw is one action: no best of $N$, no exploration noise. A method with a temperature gets the one that makes
# $\exp(Q)$ its aim. The others aim at something else, which the table says: the best action, an improvement on what
# was (mirror descent: once more $\exp(Q/\lambda)$ in every update), or what a choice makes of it.
#
# | method | learns a policy by | its aim here |
# |---|---|---|
# | SAC | the reparametrised KL divergence to $\exp(Q)$ | $\exp(Q)$, as far as one Gaussian goes |
# | SOM | a MeanFlow on velocities from Monte Carlo scores of $\exp(Q)$ | $\exp(Q)$ |
# | LQL, NC-LQL | none: Langevin on $Q$; on noise levels of $Q$ | $\exp(Q)$ |
# | QSM, denoising QSM | a score network on $\nabla Q$; a noise predictor on $-\sigma_t\nabla Q(a_t)$ | $\exp(Q)$ |
# | SDAC, iDEM, MaxEntDP | a noise predictor on weighted means over proposals | $\exp(Q)$ |
# | DPMD, FPMD-R, FPMD-M | regression on own samples, weighted by $\exp(Q/\lambda)$ | better and better |
# | DIPO | denoising of replayed actions that have climbed $Q$ | the tops of all hills |
# | QVPO | denoising of the best of own samples, and of some uniform actions | the best, kept wide |
# | DACER | ascent of $Q$ through the chain | the best; its noise on top is regulated |
# | ACA | none: a reverse process guided by the gradient of $Q(a_t,t)$ | the best |
# | TD3, PPO | ascent of $Q$; likelihood ratios | the best |

# %%
quiet = AnnealedNoise(initial_std=0.1, learning_rate=0.0)
AGENTS = {
    "SAC": SAC(initial_temperature=1.0, temperature_learning_rate=0.0),
    "SOM": SOM(inverse_temperature=1.0, q_normalization="none", num_score_samples=32),
    "LQL": LQL(inverse_temperature=1.0),
    "NC-LQL": NCLQL(mode="boltzmann", inverse_temperature=1.0),
    "QSM": QSM(inverse_temperature=1.0),
    "denoising QSM": DenoisingQSM(inverse_temperature=1.0),
    "SDAC": SDAC(q_scale=1.0, noise=quiet, num_proposals=32),
    "iDEM": IDEM(inverse_temperature=1.0, num_proposals=32),
    "MaxEntDP": MaxEntDP(temperature=1.0, num_proposals=32, num_log_prob_samples=1),
    "DPMD": DPMD(noise=quiet),
    "FPMD-R": FPMDR(),
    "FPMD-M": FPMDM(),
    "DIPO": DIPO(),
    "QVPO": QVPO(num_train_samples=8),
    "DACER": DACER(num_entropy_samples=20),
    "ACA": ACA(),
    "TD3": TD3(),
    "PPO": PPO(entropy_weight=0.01, minibatch_size=64),
}
SOFT = ("SAC", "SOM", "LQL", "NC-LQL", "QSM", "denoising QSM", "SDAC", "iDEM", "MaxEntDP")
same = dict(hidden=hidden, discount=0.0, reward_scale=1.0, policy_delay=1)
same |= dict(num_candidates=1, num_eval_candidates=1, num_target_candidates=1, num_particles=1)
rates = ("learning_rate", "critic_learning_rate", "actor_learning_rate")
same |= {name: learning_rate for name in rates}
num_updates = num_chunks * updates_per_chunk
same |= dict(final_actor_learning_rate=1e-5, decay_start=0, decay_updates=num_updates)


def on_one_footing(agent):
    names = {field.name for field in dataclasses.fields(agent)}
    return dataclasses.replace(agent, **{name: value for name, value in same.items() if name in names})


agents = {name: on_one_footing(agent) for name, agent in AGENTS.items()}

# %% [markdown]
# A chunk of updates is one compiled program. PPO learns from what it did itself, so it draws its own actions;
# the others draw from replay.


# %%
def draw(agent, state, n, key, explore=False):
    act = lambda key: agent.act(state, blind, key=key, explore=explore)
    return jax.vmap(act)(jr.split(key, n))


def experience(agent, state, key):
    if isinstance(agent, AbstractOnPolicyAgent):
        rollout = transitions(draw(agent, state, batch_size, key, explore=True))
        return jax.tree.map(lambda x: x.reshape(-1, 8, *x.shape[1:]), rollout)  # of 8 environments
    rows = jr.randint(key, (batch_size,), 0, num_transitions)
    return jax.tree.map(lambda x: x[rows], replay)


def chunk(agent, state, key):
    def step(state, key):
        batch_key, key = jr.split(key)
        return agent.update(state, experience(agent, state, batch_key), key=key)

    return filter_scan(step, state, jr.split(key, updates_per_chunk))[0]


def learn(name):
    """The state after all chunks, and the two compiled programs that made it and act by it."""
    agent = agents[name]
    init = eqx.filter_jit(lambda key: agent.init(example_transition((1,), 2), key=key))
    learn_on = eqx.filter_jit(lambda state, key: chunk(agent, state, key))
    by_noise = isinstance(agent, SAC | PPO)  # whose greedy action is no draw
    act = eqx.filter_jit(lambda state, key: draw(agent, state, num_actions, key, explore=by_noise))
    state = init(jr.key(seed))
    for key in jr.split(jr.key(seed + 1), num_chunks):
        state = learn_on(state, key)
    return state, learn_on, act, np.array(act(state, jr.key(seed + 2)))


with ThreadPoolExecutor(2) as pool:  # while one is compiled, another learns
    learned = dict(zip(agents, pool.map(learn, agents)))

# %% [markdown]
# ## 3. Side by side
#
# The soft policy in blue; in each panel six hundred actions of one method.

# %% tags=["thumbnail"]
fig, axes = plotting.subplots(4, 5, width=plotting.TEXT_WIDTH, aspect=1.12, sharex=True, sharey=True)
panels = axes.ravel()
exact = np.array(bandit.sample_optimal(num_actions, key=jr.key(seed + 3)))
panels[0].set_title("exact draws")
drawn = {"exact draws": exact} | {name: run[3] for name, run in learned.items()}
for ax, (name, actions) in zip(panels, drawn.items()):
    plotting.density(ax, bandit.log_density)
    color = "k" if name == "exact draws" else colors[1] if name in SOFT else colors[2]
    ax.plot(*actions[:600].T, ".", color=color, markersize=1.5, markeredgewidth=0)
    ax.set_title(name)
    ax.set(xlim=(-1.03, 1.03), ylim=(-1.03, 1.03), xticks=[-1, 0, 1], yticks=[-1, 0, 1])
panels[-1].axis("off")
soft = plt.Line2D([], [], color=colors[1], marker=".", linestyle="", label="aims at exp(Q)")
other = plt.Line2D([], [], color=colors[2], marker=".", linestyle="", label="aims at\nsomething else")
panels[-1].legend(handles=[soft, other], loc="center")
plt.show()

# %% [markdown]
# ## 4. Costs and distances
#
# *Actor*, *critic*: evaluations of networks for one action (backward passes counted as one more), by the settings
# above; a TD target draws one such action for each transition. *Milliseconds*: of one update of the batch, after
# compilation. *Microseconds*: of one action in a batch of all that are drawn above. *TV*: total variation to $p$ on
# a grid of cells, where exact draws have what the first row says. $\bar Q$: the mean value of actions.


# %%
def evaluations(agent):
    """(actor, critic) per action, of one candidate."""
    match agent:
        case LQL():
            return 0, 2 * agent.num_steps
        case NCLQL():
            return 0, 2 * agent.num_levels * agent.steps_per_level
        case ACA():
            return 0, 2 * (agent.chain.num_steps - 1)
        case QSM():
            return agent.num_steps, 0
        case FPMDR() | FPMDM():
            return agent.num_eval_steps, 0
        case AbstractDiffusionAgent():
            return agent.chain.num_steps, 0
        case _:
            return 1, 0


fine = (jnp.arange(20 * num_cells) + 0.5) / (10 * num_cells) - 1
points = jnp.stack(jnp.meshgrid(fine, fine, indexing="ij"), axis=-1)
soft_policy = jnp.exp(jax.vmap(jax.vmap(bandit.log_density))(points))
cells = np.array(soft_policy / soft_policy.sum()).reshape(num_cells, 20, num_cells, 20).sum((1, 3))


def measured(actions):
    """Total variation, mean value, share of each mode."""
    counts = np.histogram2d(*actions.T, bins=num_cells, range=[[-1, 1]] * 2)[0]
    shares = np.bincount(np.array(jax.vmap(bandit.mode)(actions)), minlength=4) / len(actions)
    value = float(jnp.mean(jax.vmap(bandit.log_density)(actions)))
    return 0.5 * np.abs(counts / len(actions) - cells).sum(), value, shares


def milliseconds(call, repeats=3):
    """The least of some calls."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(eqx.filter(call(), eqx.is_array))
        times.append(1e3 * (time.perf_counter() - begun))
    return min(times)


results = {name: measured(actions) for name, actions in drawn.items()}
print("method          actor critic   update ms   action us      TV   mean Q   shares of the modes")
for name, (tv, value, shares) in results.items():
    costs = f"{'':39}"
    if name in learned:
        state, learn_on, act, _ = learned[name]
        update = milliseconds(lambda: learn_on(state, jr.key(0))) / updates_per_chunk  # noqa: B023
        action = milliseconds(lambda: act(state, jr.key(0))) / num_actions * 1e3  # noqa: B023
        actor, critic = evaluations(agents[name])
        costs = f"{actor:6} {critic:6} {update:11.2f} {action:11.1f}"
    print(f"{name:14} {costs:>37}   {tv:.3f}   {value:6.2f}   {shares.round(2)}")

# %% [markdown]
# TV has two errors in it, a blur within the modes, which is what is left of a short training, and wrong weights of
# the modes. The last column has the second alone:
#
# - SOM, SDAC, iDEM and MaxEntDP regress on means over proposals that are weighted by $\exp(Q)$, and a proposal may
#   fall on any hill: about .4, .3, .2, .1.
# - LQL, NC-LQL and QSM follow slopes, of $Q$ or of a network that has learned them. A slope does not know how high
#   the next hill is, so that chains end on the hill they started below: nearer to a quarter each.
# - Denoising QSM takes the slope of $Q$ at noised actions for that of a noised $Q$. They are not the same, and its
#   actions lie where neither is large.
# - DPMD, DIPO, QVPO, DACER, ACA, TD3 and PPO are after the best, and end on the highest hill or on their way to it.
#   Mirror descent (DPMD, FPMD) is a matter of time: every update sharpens the policy once more.
#
# ## 5. Pendulum
#
# The same methods where values must be learned too: `eqgen benchmark --suite gymnax --preset cpu`, 50,000 steps
# and some 10,000 updates of small networks, three seeds, each method with its own published settings but for at
# most four candidates. These runs are recorded in `benchmarks/results/pendulum`, whose `table.md` has all numbers;
# nothing is trained here.

# %%
folder = Path(eqgen.__file__).parents[1] / "benchmarks" / "results" / "pendulum"
finished = [row for row in read_rows(folder).values() if row["status"] == "finished"]
finished.sort(key=lambda row: -np.mean(row["final_return"]))
fig, axes = plotting.subplots(1, 3, width=plotting.TEXT_WIDTH, aspect=1.15, sharex=True, sharey=True)
for ax, group in zip(axes, np.array_split(np.array(finished, dtype=object), 3)):
    for row, color, dash in zip(group, colors, ("-", "--", "-.", ":") * 2):
        evaluations_of = [record for record in row["records"] if "eval/return" in record]
        steps = np.unique([record["env_step"] for record in evaluations_of])
        returns = np.array([record["eval/return"] for record in evaluations_of]).reshape(len(steps), -1).T
        look = dict(color=color, linestyle=dash, band="range")
        label = f"{row['algorithm']} ({np.mean(row['final_return']):.0f})"
        plotting.learning_curve(ax, steps / 1000, returns, label=label, **look)
    ax.axhline(-250, color="0.6", linewidth=0.8)
    ax.set(xlabel="thousand steps")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32))
axes[0].set_ylabel("return")
plt.show()

# %% [markdown]
# Mean and range over three seeds, in three panels by the mean final return, which the legend has; grey: -250.
#
# Are those on the right lost, or slow? The suite `gymnax-dense` is the same with three times the updates, as far as
# it was run. DACER is there at the rates of its profile `common-rates`; its authors' are for a million updates.

# %%
dense = [row for row in read_rows(folder.with_name("pendulum-dense")).values() if row["status"] == "finished"]
by_name = {row["algorithm"].partition(":")[0]: row for row in dense}
print("final return of three seeds     10,000 updates          30,000 updates")
for row in finished:
    cells = [row, by_name.get(row["algorithm"])]
    text = ["   ".join(f"{x:5.0f}" for x in cell["final_return"]) if cell else "not run" for cell in cells]
    print(f"{row['algorithm']:24} {text[0]:>23} {text[1]:>23}")

# %% [markdown]
# ## Things to try
#
# - `broad_sharp()` of `eqgen.envs.toys`: a broad mode with most of the mass and a sharp one with the best value.
#   Who ends where?
# - `num_candidates=8, num_eval_candidates=8`: what is left of $\exp(Q)$ if the critics choose among draws?
# - `inverse_temperature=3.0` (and its like): which chains lose modes, and which weights?
# - Exploration as each method does it: `draw(..., explore=True)`.

# %% tags=["claims"]
shares = {name: result[2] for name, result in results.items()}
assert all(np.all(np.isfinite(run[3])) for run in learned.values())
for name in ("SOM", "SDAC", "iDEM", "MaxEntDP"):
    assert np.abs(shares[name] - weights).max() < 0.12
for name in ("LQL", "QSM"):
    assert np.abs(shares[name] - 0.25).max() < 0.12 and shares[name][3] > 0.13
for name in ("DPMD", "DACER", "TD3"):
    assert shares[name].max() > 0.9
assert len(finished) == len(AGENTS)
assert all(min(by_name[name]["final_return"]) > -250 for name in ("dpmd", "fpmdm", "fpmdr", "lql", "nclql"))
