"""Datasets of the mazes, made by the waypoint controller with noise on its actions.

`collect_maze2d` follows D4RL's script (scripts/generation/generate_maze2d_datasets.py): the ball is never reset;
when the controller has reached its target, or the environment's step limit has passed, another is drawn. Two things
differ. There are many streams of 5000 steps beside each other instead of one, so of about 60 targets (umaze) or
20 (large) one is approached from a reset, and one given up because the stream ends. And D4RL's script stores an
observation twice where the target changes, since it does not refresh it; here rows follow each other throughout.

`collect_navigate` follows OGBench's navigate sets instead: episodes of 1001 states from a reset at a random cell,
with goals at cells that are not within corridors. The physics remains that of Maze2D.

Rewards are relabelled, as D4RL's are, to the maze's own goal: 1 where the *current* position is within 0.5 of it
(the environment rewards the position after the step).
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqgen.data.episodes import DataError, Episodes, from_flat
from eqgen.data.reference import Scale
from eqgen.envs.maze import GOAL_RADIUS, MAZES, Maze2D, WaypointController


SIZES = {"umaze": 1_000_000, "medium": 2_000_000, "large": 4_000_000}
"""Steps of D4RL's sets."""


def collect_maze2d(
    maze: Maze2D, *, size: int, noise: float = 0.5, stream_length: int = 5000, seed: int = 0
) -> tuple[Episodes, np.ndarray]:
    """A never-reset set; episodes end, truncated, where targets change.

    **Arguments:**

    - `size`: steps; rounded up to streams of one length.
    - `noise`: the standard deviation of what is added to actions before they are clipped. 0.5 is D4RL's.
    - `stream_length`: of each stream; `size` gives D4RL's single one.

    **Returns:** the episodes, whose streams are the simulations, and the target of each step, (n, 2).
    """
    _check(size, noise)
    streams = max(1, round(size / stream_length))
    steps = -(-size // streams)
    cells = jnp.arange(len(maze.cells))
    run = lambda key: _stream(maze, cells, maze.max_steps, noise, steps, key)
    return _assemble(maze, "maze2d", run, streams, steps, True, seed)


def collect_navigate(
    maze: Maze2D, *, size: int = 1_001_000, noise: float = 0.5, episode_length: int = 1001, seed: int = 0
) -> tuple[Episodes, np.ndarray]:
    """Episodes of one length, each from a reset, in which a new goal is drawn whenever one is reached.

    **Arguments:** as `collect_maze2d`; `size` is rounded up to whole episodes.
    """
    _check(size, noise)
    goals = jnp.asarray(_junctions(maze))
    run = lambda key: _stream(maze, goals, episode_length, noise, episode_length, key)
    return _assemble(maze, "navigate", run, -(-size // episode_length), episode_length, False, seed)


def reference_scale(maze: Maze2D, name: str, *, episodes: int = 1000, seed: int = 0) -> Scale:
    """The scale of a set of ours: 0 is the mean return of uniform actions, 100 that of the controller.

    The controller is without noise and plans in every episode. Episodes have the environment's length.
    """

    def random(carry, obs, key):
        return carry, jr.uniform(key, (2,), minval=-1.0, maxval=1.0)

    controller = WaypointController(maze)
    goal = maze.cell_of(maze.goal)

    def expert(plan, obs, key):
        return controller.act(plan, obs, key=key)[:2]

    start = lambda obs, key: controller.plan(obs, goal, key=key)
    keys = jr.split(jr.fold_in(jr.key(seed), 1), 2)
    low, high = (
        float(_mean_return(maze, policy, start, episodes, key)) for policy, key in zip((random, expert), keys)
    )
    source = f"eqgen, {episodes} episodes of {maze.max_steps} steps: uniform actions; the waypoint controller"
    return Scale(name, low, high, "eqgen", source)


def make(
    kind: str, layout: str, *, size: int | None = None, noise: float = 0.5, seed: int = 0
) -> dict[str, Any]:
    """A set with everything that its file needs: the arguments of `d4rl.save`.

    **Arguments:**

    - `kind`: "maze2d" or "navigate".
    - `layout`: "umaze", "medium" or "large".
    - `size`: steps; None: as many as the originals have.
    """
    maze = MAZES[layout]()
    name = f"eqgen/maze2d-{layout}" if kind == "maze2d" else f"eqgen/maze2d-{layout}-navigate"
    if kind == "maze2d":
        size = SIZES[layout] if size is None else size
        episodes, targets = collect_maze2d(maze, size=size, noise=noise, seed=seed)
    elif kind == "navigate":
        size = SIZES["umaze"] if size is None else size
        episodes, targets = collect_navigate(maze, size=size, noise=noise, seed=seed)
    else:
        raise ValueError(f"kind is {kind!r}; it must be 'maze2d' or 'navigate'.")
    scale = reference_scale(maze, name, seed=seed)
    episodes = dataclasses.replace(episodes, name=name, scale=scale)
    settings = {
        "kind": kind,
        "maze": maze.name,
        "size": len(episodes),
        "streams": len(episodes.streams) - 1,
        "noise": noise,
        "seed": seed,
    }
    return {
        "episodes": episodes,
        "resets": "never" if kind == "maze2d" else "ends",
        "settings": settings,
        "infos": {"goal": targets},
    }


# --- The simulation ---


def _stream(maze, targets, limit, noise, steps, key):
    """One simulation from a reset: observations, actions, targets, and where a target was reached or given up."""
    controller = WaypointController(maze)
    reset_key, first_key, run_key = jr.split(key, 3)
    state, obs = maze.reset(key=reset_key)

    def aim(obs, key):
        which, shift_x, shift_y, plan_key = jr.split(key, 4)
        cell = targets[jr.randint(which, (), 0, len(targets))]
        # D4RL plans to the cell, and notes the target within it, shifted, without using it further.
        shift = jnp.stack([jr.uniform(shift_x), jr.uniform(shift_y)])
        return controller.plan(obs, cell, key=plan_key), maze.cells[cell] + 0.1 * (2 * shift - 1)

    def step(carry, key):
        state, obs, plan, target, elapsed = carry
        act_key, noise_key, step_key, aim_key = jr.split(key, 4)
        plan, action, arrived = controller.act(plan, obs, key=act_key)
        action = jnp.clip(action + noise * jr.normal(noise_key, (2,)), -1, 1)
        done = arrived | (elapsed >= limit)
        row = obs, action, target, done
        state, timestep = maze.step(state, action, key=step_key)
        pick = lambda new, old: jnp.where(done, new, old)
        plan, target = jax.tree.map(pick, aim(timestep.obs, aim_key), (plan, target))
        return (state, timestep.obs, plan, target, pick(0, elapsed + 1)), row

    carry = (state, obs, *aim(obs, first_key), jnp.zeros((), jnp.int32))
    return jax.lax.scan(step, carry, jr.split(run_key, steps))[1]


def _assemble(maze, kind, run, streams, steps, ends_at_targets, seed):
    keys = jr.split(jr.fold_in(jr.key(seed), 0), streams)
    observations, actions, targets, done = (
        np.asarray(x).reshape(streams * steps, *x.shape[2:]) for x in jax.jit(jax.vmap(run))(keys)
    )
    distance = np.linalg.norm(observations[:, :2] - np.asarray(maze.goal), axis=1)
    rewards = (distance <= GOAL_RADIUS).astype(np.float32)
    truncated = done if ends_at_targets else np.zeros(len(done), bool)
    starts = np.arange(0, streams * steps + 1, steps)
    truncated = truncated.copy()
    truncated[starts[1:] - 1] = True
    terminated = np.zeros(len(done), bool)
    name = f"{maze.name}-{kind}"
    episodes = from_flat(observations, actions, rewards, terminated, truncated, streams=starts, name=name)
    return episodes, targets


@eqx.filter_jit
def _mean_return(maze, policy, start, episodes, key):
    def episode(key):
        reset_key, start_key, run_key = jr.split(key, 3)
        state, obs = maze.reset(key=reset_key)

        def step(carry, key):
            state, obs, plan = carry
            plan, action = policy(plan, obs, key)
            state, timestep = maze.step(state, action, key=key)
            return (state, timestep.obs, plan), timestep.reward

        carry = state, obs, start(obs, start_key)
        return jax.lax.scan(step, carry, jr.split(run_key, maze.max_steps))[1].sum()

    return jax.vmap(episode)(jr.split(key, episodes)).mean()


def _junctions(maze: Maze2D) -> np.ndarray:
    """The numbers of the cells that are not within a corridor: more or less than two opposite ways lead on."""
    free = np.array([list(row) for row in maze.layout]) != "#"
    i, j = np.asarray(maze.cells, int).T
    along_i, along_j = (free[i - 1, j], free[i + 1, j]), (free[i, j - 1], free[i, j + 1])
    both, neither = np.logical_and, lambda a, b: ~(a | b)
    corridor = (both(*along_i) & neither(*along_j)) | (both(*along_j) & neither(*along_i))
    return np.flatnonzero(~corridor)


def _check(size, noise):
    if size < 1 or not noise >= 0:
        raise DataError(
            f"size is {size} and noise {noise}; at least one step and no negative noise are needed."
        )
