"""Our agents beside two libraries that we did not write: returns and speed on the same task, budget and seeds.

    pip install -e '.[peers]'             sbx-rl (which brings PyTorch) and rejax
    python benchmarks/peers.py            all matches; prints a table, writes benchmarks/results/peers.json
    python benchmarks/peers.py sac-rejax  one of them; the others are kept as they were

- *sac-rejax*, *ppo-rejax*: gymnax's Pendulum-v1, the seeds side by side in one compiled program in both.
- *sac-sbx*: HalfCheetah-v5 of Gymnasium, one environment, one update a step, one seed after the other in both.

Widths, batches, rates, discounts and counts of updates are equal; what else an implementation does is its own. Both
policies are judged by the same episodes. `seconds` are those of the steps at which something is learned, without
compilation: at the rate from the first report after updates began to the last; of rejax, whose program reports
nothing, all of the program, compiled beforehand. `compile_seconds` is what went before, the first learning steps
at that rate taken off.

rejax 0.1.3 expects the step of an earlier gymnax: `FiveValues` makes it of the present one. To rejax, as to that
gymnax, a time limit is an end.
"""

import os


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import equinox as eqx
import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqgen.algorithms.base import AbstractAgent
from eqgen.algorithms.ppo import PPO
from eqgen.algorithms.sac import SAC
from eqgen.envs import catalog
from eqgen.evaluation import rollout_returns
from eqgen.provenance import provenance
from eqgen.training import OnlineSettings, greedy_policy, seed_slice, train_online
from measure import RESULTS, cpu_seconds, write


SEEDS = (0, 1, 2)
EPISODES = 20


@dataclasses.dataclass(frozen=True)
class Match:
    """One agent of ours with its loop, and the function that trains its peer."""

    env: str
    peer: str
    agent: AbstractAgent
    settings: OnlineSettings
    train_peer: Callable[["Match"], tuple[list[Any], dict[str, float]]]
    """**Returns** a policy for each seed, a function of observation and key, and the costs."""
    side_by_side: bool
    """Whether the seeds are trained in one program."""


# --- Ours ---


def train_ours(match: Match) -> tuple[list[Any], dict[str, float]]:
    groups = [SEEDS] if match.side_by_side else [(seed,) for seed in SEEDS]
    policies, costs = [], []
    for seeds in groups:
        watch = Watch(match.settings)
        for progress in train_online(match.agent, catalog.make(match.env), match.settings, seeds=seeds):
            watch(progress.env_step, learning=progress.num_updates > 0)
        policies += [
            greedy_policy(match.agent, seed_slice(progress.state.agent, i)) for i in range(len(seeds))
        ]
        costs.append(watch.costs())
    return policies, sum_of(costs)


class Watch:
    """Times a run by what it reports: steps per second once it learns, and what it took to get there."""

    def __init__(self, settings: OnlineSettings):
        self.settings, self.first = settings, None
        self.begun = time.perf_counter(), cpu_seconds()

    def __call__(self, step: int, *, learning: bool) -> None:
        self.now = step, time.perf_counter(), cpu_seconds()
        if learning and self.first is None:
            self.first = self.now

    def costs(self) -> dict[str, float]:
        (first, wall, cpu), (last, wall_end, cpu_end) = self.first, self.now
        wall_each, cpu_each = (wall_end - wall) / (last - first), (cpu_end - cpu) / (last - first)
        learning = self.settings.total_steps - self.settings.warmup_steps
        return {
            "seconds": wall_each * learning,
            "cpu_seconds": cpu_each * learning,
            "compile_seconds": wall - self.begun[0] - wall_each * (first - self.settings.warmup_steps),
        }


def sum_of(costs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of runs one after another; what is compiled is compiled in the first."""
    total = {name: sum(cost[name] for cost in costs) for name in ("seconds", "cpu_seconds")}
    return total | {"compile_seconds": costs[0]["compile_seconds"]}


# --- rejax ---


class FiveValues:
    """A gymnax environment whose step returns `done` for `terminated | truncated`."""

    def __init__(self, env: Any):
        self.env = env

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying asks for these before there is an `env`
            raise AttributeError(name)
        return getattr(self.env, name)

    def step(self, key, state, action, params):
        obs, state, reward, terminated, truncated, info = self.env.step(key, state, action, params)
        return obs, state, reward, terminated | truncated, info


def train_rejax(match: Match) -> tuple[list[Any], dict[str, float]]:
    import rejax

    env, params = gymnax.make(match.env.partition("/")[2])
    agent, settings = match.agent, match.settings
    shared = dict(
        env=FiveValues(env),
        env_params=params,
        total_timesteps=settings.total_steps,
        eval_freq=settings.total_steps,
        skip_initial_evaluation=True,
        num_envs=settings.num_envs,
        gamma=agent.discount,
    )
    if isinstance(agent, SAC):
        peer = rejax.SAC.create(
            **shared,
            learning_rate=agent.critic_learning_rate,
            polyak=1 - agent.tau,
            buffer_size=settings.total_steps,
            fill_buffer=settings.warmup_steps,
            batch_size=settings.batch_size,
            num_epochs=settings.updates_per_iteration,
            hidden_layer_sizes=agent.hidden,
        )
    else:
        samples = settings.num_envs * agent.rollout_length
        peer = rejax.PPO.create(
            **shared,
            learning_rate=agent.learning_rate,
            num_steps=agent.rollout_length,
            num_epochs=agent.epochs,
            num_minibatches=samples // agent.minibatch_size,
            gae_lambda=agent.trace_decay,
            clip_eps=agent.clip,
            ent_coef=agent.entropy_weight,
            vf_coef=agent.value_weight,
            max_grad_norm=agent.max_gradient_norm,
            normalize_observations=agent.normalize_observations,
            agent_kwargs=dict(hidden_layer_sizes=agent.hidden, activation=agent.activation),
        )
    peer = peer.replace(eval_callback=lambda peer, state, key: jnp.zeros(()))
    keys = jnp.stack([jr.PRNGKey(seed) for seed in SEEDS])
    begun = time.perf_counter()
    train = jax.jit(jax.vmap(peer.train)).lower(keys).compile()
    compiled, used = time.perf_counter(), cpu_seconds()
    state = jax.block_until_ready(train(keys))[0]
    costs = {
        "seconds": time.perf_counter() - compiled,
        "cpu_seconds": cpu_seconds() - used,
        "compile_seconds": compiled - begun,
    }
    states = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(len(SEEDS))]
    return [eqx.Partial(rejax_policy, peer, state) for state in states], costs


def rejax_policy(peer, state, obs, key):
    """The greedy action, in our box [-1, 1]: the tanh of SAC's mean; PPO's mean, cut at the bounds."""
    if peer.normalize_observations:
        obs = peer.normalize_obs(state.obs_rms_state, obs)
    mean = peer.actor.apply(state.actor_ts.params, obs[None], method="_action_dist").mean()[0]
    return jnp.tanh(mean) if "SAC" in type(peer).__name__ else jnp.clip(mean / peer.action_space.high, -1, 1)


# --- sbx ---


def train_sbx(match: Match) -> tuple[list[Any], dict[str, float]]:
    import sbx
    from stable_baselines3.common.callbacks import BaseCallback

    class Report(BaseCallback):
        def __init__(self, watch, every):
            super().__init__()
            self.watch, self.every = watch, every

        def _on_step(self) -> bool:
            # Learning begins behind this step; the first record counts that is `every` steps later.
            if self.num_timesteps % self.every == 0:
                jax.block_until_ready(self.model.policy.actor_state.params)
                self.watch(self.num_timesteps, learning=self.num_timesteps > match.settings.warmup_steps)
            return True

    agent, settings = match.agent, match.settings
    policies, costs = [], []
    for seed in SEEDS:
        peer = sbx.SAC(
            "MlpPolicy",
            gymnasium.make(match.env.partition("/")[2]),
            learning_rate=agent.actor_learning_rate,
            qf_learning_rate=agent.critic_learning_rate,
            buffer_size=settings.total_steps,
            learning_starts=settings.warmup_steps,
            batch_size=settings.batch_size,
            tau=agent.tau,
            gamma=agent.discount,
            gradient_steps=settings.updates_per_iteration,
            policy_kwargs=dict(net_arch=list(agent.hidden)),
            seed=seed,
        )
        watch = Watch(settings)
        peer.learn(settings.total_steps, callback=Report(watch, settings.log_every))
        policies.append(
            eqx.Partial(sbx_policy, peer.policy.actor_state.apply_fn, peer.policy.actor_state.params)
        )
        costs.append(watch.costs())
    return policies, sum_of(costs)


def sbx_policy(apply, parameters, obs, key):
    """tanh of the Gaussian's mean."""
    return apply(parameters, obs[None]).mode()[0]


# --- The matches ---


RATES = dict(actor_learning_rate=1e-3, critic_learning_rate=1e-3, temperature_learning_rate=1e-3)
QUIET = dict(eval_every=0, checkpoint_every=0)
MATCHES = {
    "sac-rejax": Match(
        "gymnax/Pendulum-v1",
        "rejax",
        SAC(hidden=(64, 64), **RATES),
        OnlineSettings(total_steps=20_000, log_every=1_000, **QUIET),
        train_rejax,
        side_by_side=True,
    ),
    "ppo-rejax": Match(
        "gymnax/Pendulum-v1",
        "rejax",
        PPO(rollout_length=256, learning_rate=1e-3, discount=0.95),
        OnlineSettings(204_800, 8, warmup_steps=0, batch_size=None, log_every=2048, **QUIET),
        train_rejax,
        side_by_side=True,
    ),
    "sac-sbx": Match(
        "mujoco/HalfCheetah-v5",
        "sbx-rl",
        SAC(hidden=(256, 256)),
        OnlineSettings(total_steps=10_000, log_every=500, **QUIET),
        train_sbx,
        side_by_side=False,
    ),
}


def play(match: Match) -> dict[str, Any]:
    """Trains and judges both."""
    sides = {}
    for name, train in (("eqgen", train_ours), (match.peer, match.train_peer)):
        policies, costs = train(match)
        env = catalog.make(match.env)
        returns = [rollout_returns(policy, env, EPISODES, key=jr.key(10))[0] for policy in policies]
        means = [round(float(np.mean(values)), 1) for values in returns]
        sides[name] = {"version": version(name), "returns": means} | {
            name: round(value, 2) for name, value in costs.items()
        }
        print(f"  {name}: {sides[name]}", flush=True)
    settings = {"agent": str(match.agent), "loop": dataclasses.asdict(match.settings), "seeds": list(SEEDS)}
    return {"env": match.env, "settings": settings, "sides": sides, "provenance": provenance()}


def main(names: Sequence[str]) -> None:
    path = RESULTS / "peers.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in names or MATCHES:
        module = MATCHES[name].peer.removesuffix("-rl")
        if find_spec(module) is None:
            print(f"{name}: left out, since there is no {MATCHES[name].peer}: pip install -e '.[peers]'")
            continue
        print(name, flush=True)
        results[name] = play(MATCHES[name])
        write("peers", results)
    print("| match | steps | library | returns by seed | seconds | CPU-s | compile s | our speed / its |")
    print("|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        steps, sides = result["settings"]["loop"]["total_steps"], result["sides"]
        for library, side in sides.items():
            ratio = side["seconds"] / sides["eqgen"]["seconds"]
            cells = name, steps, library, *(side[key] for key in ("returns", "seconds", "cpu_seconds"))
            print("|", *(f"{cell} |" for cell in (*cells, side["compile_seconds"], f"{ratio:.2f}")))


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - MATCHES.keys():
        sys.exit(f"no match {', '.join(sorted(unknown))}; there are {', '.join(MATCHES)}")
    main(sys.argv[1:])
