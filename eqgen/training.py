"""Online training as a generator: jitted chunks inside, ordinary Python between them.

All seeds of a run are stacked along the leading axis of one `OnlineState` and vmapped, so a run of one seed and
a run of twenty are the same program. `eqgen.loops` advances that state; here is what happens between: the
schedule, records, evaluation.
"""

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Key, PyTree

from eqgen.algorithms.base import AbstractAgent, AbstractOnPolicyAgent, Size
from eqgen.data.replay import ReplayBuffer
from eqgen.devices import spread_seeds, training_mesh
from eqgen.envs.base import AbstractEnv, example_transition
from eqgen.evaluation import rollout_returns
from eqgen.loops import EVAL, INIT, HostLoop, JaxLoop, NonFiniteError, OnlineState, run_key
from eqgen.tree import compile_bound


@dataclasses.dataclass(frozen=True)
class OnlineSettings:
    """How to run an online agent. All steps are environment steps of one seed.

    One iteration is one step of each of `num_envs` environments, followed by `updates_per_iteration` updates: the
    ratio of updates to data is `updates_per_iteration / num_envs`. An on-policy agent updates once after
    `rollout_length` iterations, on all transitions of them.
    """

    total_steps: int = 20_000
    num_envs: int = 1
    warmup_steps: int = 1_000
    """Steps with uniformly random actions before anything is learned. On-policy agents never see them."""
    updates_per_iteration: int = 1
    """Of agents that learn from replay; 1 for an on-policy agent."""
    batch_size: int | None = 256
    """Transitions that an update draws from replay; None for an on-policy agent, which draws none."""
    buffer_capacity: int = 1_000_000
    """Transitions kept; never more are allocated than `total_steps`, or than an on-policy agent's rollout."""
    acting: Literal["lockstep", "overlap"] = "lockstep"
    """Which parameters choose actions: the newest, or, one update older, those that are at hand while the newest
    are computed and the environments stepped (host environments only, and not for on-policy agents)."""
    log_every: int = 1_000
    eval_every: int = 5_000
    """0 evaluates never."""
    eval_episodes: int = 10
    checkpoint_every: int = 5_000
    """0 saves at the end only."""

    def __post_init__(self):
        if self.acting not in ("lockstep", "overlap"):
            raise ValueError(f"acting is {self.acting!r}; it must be 'lockstep' or 'overlap'.")
        for name in (
            "total_steps",
            "num_envs",
            "updates_per_iteration",
            "batch_size",
            "log_every",
            "eval_episodes",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.total_steps >= 2**31:
            raise ValueError(f"total_steps is {self.total_steps}; steps are counted by 32 bits.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be at least 0.")
        if self.buffer_capacity < self.num_envs:
            raise ValueError(
                f"buffer_capacity is {self.buffer_capacity}, less than one step of {self.num_envs} environments."
            )
        for name in ("total_steps", "warmup_steps", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, name) % self.num_envs:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of num_envs={self.num_envs}."
                )

    def check(self, env: Any, agent: AbstractAgent) -> None:
        """**Raises:** `ValueError` when `env` or `agent` cannot be trained in this way."""
        if self.acting == "overlap" and isinstance(env, AbstractEnv):
            raise ValueError(
                f"{env.name} is stepped inside the compiled loop, where there is nothing to overlap: "
                "acting='overlap' is for host environments, such as mujoco/HalfCheetah-v5. "
                "Remedy: acting='lockstep'."
            )
        if isinstance(agent, AbstractOnPolicyAgent):
            self._check_on_policy(agent)
        elif self.batch_size is None:
            raise ValueError(
                f"batch_size is None, but {type(agent).__name__} draws batches from replay. Remedy: batch_size=256."
            )

    def _check_on_policy(self, agent):
        name, rollout = type(agent).__name__, self.capacity(agent)
        for field, value in dict(batch_size=None, updates_per_iteration=1, acting="lockstep").items():
            if getattr(self, field) != value:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}, but {name} is on-policy: it learns once from each whole "
                    f"rollout of its newest parameters. Remedy: {field}={value!r}."
                )
        if (room := min(self.buffer_capacity, self.total_steps - self.warmup_steps)) < rollout:
            raise ValueError(
                f"A rollout of {name} takes {rollout} steps, {agent.rollout_length} in each of {self.num_envs} "
                f"environments; total_steps, less warmup_steps, and buffer_capacity leave room for {room}."
            )

    def capacity(self, agent: AbstractAgent) -> int:
        """Transitions for which memory is allocated."""
        if isinstance(agent, AbstractOnPolicyAgent):
            return agent.rollout_length * self.num_envs
        return min(self.buffer_capacity, self.total_steps)

    def num_updates(self, agent: AbstractAgent, iteration: int) -> int:
        """Calls of `agent.update` in the iterations before this one."""
        learning = max(0, iteration - self.warmup_steps // self.num_envs)
        if isinstance(agent, AbstractOnPolicyAgent):
            return learning // agent.rollout_length
        return learning * self.updates_per_iteration

    @classmethod
    def preset(cls, size: Size, env: str, agent: AbstractAgent | None = None) -> Self:
        """The settings for an amount of computation.

        For agents that learn from replay they differ by the environment's family (the part before the slash). An
        on-policy agent needs more steps, each of which costs less.
        """
        if isinstance(agent, AbstractOnPolicyAgent):
            return cls._on_policy_preset(size)
        if size == "smoke":
            return cls(
                total_steps=300,
                warmup_steps=100,
                batch_size=32,
                log_every=100,
                eval_every=300,
                eval_episodes=2,
                checkpoint_every=100,
            )
        if not env.startswith("mujoco/"):
            return cls()
        if size == "cpu":
            return cls(
                total_steps=100_000,
                num_envs=4,
                warmup_steps=5_000,
                log_every=1_000,
                eval_every=5_000,
                checkpoint_every=10_000,
            )
        return cls(
            total_steps=1_000_000,
            num_envs=5,
            warmup_steps=30_000,
            log_every=5_000,
            eval_every=25_000,
            eval_episodes=20,
            checkpoint_every=50_000,
        )

    @classmethod
    def _on_policy_preset(cls, size):
        common: dict[str, Any] = dict(warmup_steps=0, batch_size=None)
        if size == "smoke":
            every: dict[str, Any] = dict(log_every=100, eval_every=300, eval_episodes=2, checkpoint_every=100)
            return cls(total_steps=300, num_envs=2, **every, **common)
        every = dict(log_every=10_000, eval_every=50_000, eval_episodes=20, checkpoint_every=100_000)
        return cls(total_steps=1_000_000, num_envs=8 if size == "cpu" else 1, **every, **common)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the generator yields. `records` has one flat, JSON-able dict per seed.

    `state` may be saved or inspected until the generator is asked for more: then its replay and environments are
    reused in place (`state.agent` stays valid).
    """

    env_step: int
    num_updates: int
    records: list[dict[str, Any]]
    state: OnlineState

    @property
    def step(self) -> int:
        """The run's clock: environment steps."""
        return self.env_step


# --- The generator ---


def _loop(agent, env, settings, seeds):
    settings.check(env, agent)
    return (JaxLoop if isinstance(env, AbstractEnv) else HostLoop)(agent, env, settings, tuple(seeds))


def _start(loop, agent, env, settings, seeds):
    example = example_transition(env.obs_shape, env.action_dim)
    capacity = settings.capacity(agent)
    # Compiled as one program; run as it stands, every operation of an initialisation would be one of its own.
    init = eqx.filter_jit(eqx.filter_vmap(lambda seed: agent.init(example, key=run_key(seed, INIT, 0))))
    agents = init(loop.seeds)
    replay = eqx.filter_jit(eqx.filter_vmap(lambda _: ReplayBuffer.create(example, capacity)))(loop.seeds)
    env_state, obs = loop.start()
    returns = jnp.zeros((len(seeds), settings.num_envs))
    return OnlineState(agents, replay, env_state, obs, returns, iteration=jnp.int32(0))


def _spread(state, env, mesh):
    """Where there are several devices, each gets some of the seeds; what host environments keep stays here."""
    parts = ("agent", "replay", "obs", "episode_return", *(("env",) if isinstance(env, AbstractEnv) else ()))
    on_devices = {name: spread_seeds(getattr(state, name), mesh) for name in parts}
    return dataclasses.replace(state, **on_devices)


def init_online(
    agent: AbstractAgent, env: Any, settings: OnlineSettings, *, seeds: Sequence[int]
) -> OnlineState:
    """The state of a run that has not begun; also the skeleton into which a checkpoint is read."""
    loop = _loop(agent, env, settings, seeds)
    try:
        return _start(loop, agent, env, settings, seeds)
    finally:
        loop.close()


def train_online(
    agent: AbstractAgent,
    env: Any,
    settings: OnlineSettings,
    *,
    seeds: Sequence[int],
    state: OnlineState | None = None,
) -> Generator[Progress, None, None]:
    """Trains one agent per seed and yields after every `log_every`, `eval_every` and `checkpoint_every` steps.

    **Arguments:**

    - `agent`: the algorithm with its hyperparameters.
    - `env`: an `AbstractEnv`, or a host environment's specification (`eqgen.envs.catalog.make` returns either).
    - `seeds`: one run each; seed s gives the same run whichever seeds stand beside it.
    - `state`: where to go on from, as `Progress.state` was; None begins anew.

    **Returns:** a generator of `Progress`. The evaluation at a step uses the agent as it is then, in
    environments of its own, with `explore=False`, and random numbers that depend on (seed, step) alone.

    **Raises:** `NonFiniteError` when a metric, an observation or a reward is NaN or infinite. Nothing is yielded
    for that chunk, so the last state that was yielded (and saved) is a good one.
    """
    loop = _loop(agent, env, settings, seeds)
    begun = time.perf_counter()
    try:
        if state is None:
            state = _start(loop, agent, env, settings, seeds)
            records = [{"seed": int(seed), "env_step": 0, "updates": 0, "wall_time": 0.0} for seed in seeds]
            if settings.eval_every:
                _evaluate(records, agent, env, settings, state)
            yield Progress(0, 0, records, state)
        state = _spread(state, env, training_mesh(len(seeds)))
        while (first := int(state.iteration)) < settings.total_steps // settings.num_envs:
            stop, learning = _next_stop(first, settings)
            state, sums = loop.advance(state, stop, learning)
            records = _records(sums, first, stop, agent, settings, seeds)
            step = stop * settings.num_envs
            if settings.eval_every and (step % settings.eval_every == 0 or step == settings.total_steps):
                _evaluate(records, agent, env, settings, state)
            for record in records:
                record["wall_time"] = time.perf_counter() - begun
            yield Progress(step, records[0]["updates"], records, state)
    finally:
        loop.close()


def _next_stop(first, settings):
    """The iteration at which to stop next, and whether there are updates until then."""
    warmup = settings.warmup_steps // settings.num_envs
    stops = [settings.total_steps // settings.num_envs] + ([warmup] if first < warmup else [])
    for name in ("log_every", "eval_every", "checkpoint_every"):
        if every := getattr(settings, name) // settings.num_envs:
            stops.append((first // every + 1) * every)
    return min(stops), first >= warmup


def _records(sums, first, stop, agent, settings, seeds):
    """What happened in iterations first..stop. Metrics are means over updates, and None where there were none."""
    sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    step = stop * settings.num_envs
    before, updates = (settings.num_updates(agent, iteration) for iteration in (first, stop))
    records = []
    for i, seed in enumerate(seeds):
        values = {name: float(value[i]) for name, value in sums.items()}
        finished, finished_return = values.pop("finished"), values.pop("finished_return")
        bad = [name for name in ("observation", "reward") if values.pop(_BAD[name]) > 0]
        new = updates - before
        means = {name: value / new if new else None for name, value in values.items()}
        _check_finite(means, bad, seed, step)
        record = {"seed": int(seed), "env_step": step, "updates": updates, "train/episodes": int(finished)}
        records.append(record | {"train/return": finished_return / finished if finished else None} | means)
    return records


_BAD = {"observation": "bad_obs", "reward": "bad_reward"}


def _check_finite(means, bad, seed, step):
    """Names what is not finite: of an agent that diverges and so breaks the observations, both.

    What comes from the environment is looked at before anything is learned too: replay keeps it, and no checkpoint
    that holds it could be gone on from.
    """
    metric = next((name for name, x in means.items() if x is not None and not np.isfinite(x)), None)
    causes = [f"the metric {metric} of seed {seed} is {means[metric]}"] if metric else []
    causes += [f"{'an' if name[0] == 'o' else 'a'} {name} of seed {seed} was NaN or infinite" for name in bad]
    if causes:
        message = " and ".join(causes)
        raise NonFiniteError(f"{message[0].upper()}{message[1:]} at environment step {step}.")


@eqx.filter_jit
def greedy_action(agent: AbstractAgent, agent_state: PyTree, obs: Array, key: Key[Array, ""]) -> Array:
    """What the agent does when it is judged: `act(..., explore=False)`."""
    return agent.act(agent_state, obs, key=key, explore=False)


def greedy_policy(agent: AbstractAgent, agent_state: PyTree) -> eqx.Partial:
    """The policy `(obs, key) -> action` to hand to evaluation and rendering; `agent_state` is of one seed."""
    return eqx.Partial(greedy_action, agent, agent_state)


def compiled_policy(
    agent: AbstractAgent, agent_state: PyTree, obs_shape: tuple[int, ...], *, batch: int | None = None
) -> Callable[[ArrayLike, Key[Array, ""]], Array]:
    """The same policy as a program of its own, for where a single action should take as little time as it can.

    **Arguments:**

    - `obs_shape`: of one observation.
    - `batch`: how many observations a call gets, each with noise of its own; None for one without a batch axis.

    **Returns:** `(obs, key) -> action` with `obs` in float32, NumPy's or JAX's. It raises `TypeError` for other
    shapes or dtypes, and does not wait for its result.
    """
    act = lambda obs, key: agent.act(agent_state, obs, key=key, explore=False)
    many = lambda obs, key: jax.vmap(act)(obs, jr.split(key, len(obs)))
    leading = () if batch is None else (batch,)
    obs = np.zeros((*leading, *obs_shape), np.float32)
    return compile_bound(act if batch is None else many, obs, jr.key(0))


def seed_slice(state: PyTree, index: int) -> PyTree:
    """One seed's part of a tree stacked over seeds."""
    return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, state)


def _evaluate(records, agent, env, settings, state):
    for i, record in enumerate(records):
        policy = greedy_policy(agent, seed_slice(state.agent, i))
        key = run_key(record["seed"], EVAL, record["env_step"])
        returns, lengths = rollout_returns(policy, env, settings.eval_episodes, key=key)
        returns = np.asarray(returns, np.float64)
        record |= {
            "eval/return": float(returns.mean()),
            "eval/returns": [float(x) for x in returns],
            "eval/length": float(np.mean(lengths)),
            "eval/episodes": settings.eval_episodes,
            "eval/policy": f"last parameters, {agent.evaluation_policy}",
        }
