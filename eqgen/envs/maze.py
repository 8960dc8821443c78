"""Maze2D of D4RL in closed form: a ball driven by a force through a maze of square cells, and its controller.

MuJoCo's point maze has no dynamics but a damped point mass and contacts of a ball with boxes, so one step is a
few additions. Off contact it equals MuJoCo's to rounding; contacts here are hard and inelastic, MuJoCo's give
way by some millimetres. Any layout can be given as text; `UMAZE`, `MEDIUM` and `LARGE` are D4RL's (Fu et al.,
2020, "D4RL: Datasets for Deep Data-Driven Reinforcement Learning").

Positions are in the units of the observation: cell (i, j), of row i and column j counted from 0 at the top left,
is the square of side 1 centred at (i - 0.2, j - 0.2). Starts and goals lie at the integers (i, j), off-centre.
"""

import functools
import textwrap
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from eqgen.envs.base import AbstractEnv
from eqgen.types import TimeStep


UMAZE = """
#####
#GOO#
###O#
#OOO#
#####
"""

MEDIUM = """
########
#OO##OO#
#OO#OOO#
##OOO###
#OO#OOO#
#O#OO#O#
#OOO#OG#
########
"""

LARGE = """
############
#OOOO#OOOOO#
#O##O#O#O#O#
#OOOOOO#OOO#
#O####O###O#
#OO#O#OOOOO#
##O#O#O#O###
#OO#OOO#OGO#
############
"""

REFERENCE_SCORES = {
    "maze2d/umaze": (23.85, 161.86),
    "maze2d/medium": (13.13, 277.39),
    "maze2d/large": (6.7, 273.99),
}
"""Mean returns in D4RL (d4rl/infos.py, sparse v1) of random actions and of a waypoint controller, 100 episodes
each. The latter (scripts/reference_scores/maze2d_controller.py) keeps the plan of its first episode in all others,
so a controller that plans in every episode scores well above 100."""


def normalised_score(name: str, returns: Float[ArrayLike, "*n"]) -> Float[ArrayLike, "*n"]:
    """D4RL's score 100 (return - min) / (max - min) of undiscounted returns in the maze of this name.

    **Raises:** `ValueError` when D4RL has no reference for the name.
    """
    if name not in REFERENCE_SCORES:
        raise ValueError(f"D4RL scores {', '.join(REFERENCE_SCORES)}, not {name!r}; compare returns instead.")
    low, high = REFERENCE_SCORES[name]
    return 100 * (returns - low) / (high - low)


TIME_STEP = 0.01
RADIUS = 0.1
MASS = 1000 * 4 / 3 * np.pi * RADIUS**3
"""Of a ball of density 1000."""

FORCE = 100.0
"""The force of action 1."""

DAMPING = 1.0
MAX_SPEED = 5.0
"""To which each component of the velocity is clipped before a step. The step itself may exceed it."""

GOAL_RADIUS = 0.5
"""The distance from the goal up to which the reward is 1."""

CORNER = 0.7
"""Cell (i, j) reaches from (i, j) - 0.7 to (i, j) + 0.3."""


class MazeState(eqx.Module):
    """Where the ball is, how it moves, what it is rewarded for, and the steps since the reset."""

    position: Float[Array, " 2"]
    velocity: Float[Array, " 2"]
    goal: Float[Array, " 2"]
    elapsed: Int[Array, ""]


class Maze2D(AbstractEnv):
    """A maze whose reward is 1 within 0.5 of the goal and 0 elsewhere; it never terminates.

    The observation is (x, y, vx, vy); the goal is not observed. An episode starts at a free cell drawn uniformly,
    the goal's included, plus U(-0.1, 0.1)^2, with velocity 0.1 N(0, I).
    """

    name: str
    layout: tuple[str, ...]
    """The rows of the maze, walls as # and all else free."""
    max_steps: int
    cells: Float[Array, "cells 2"]
    """The integer positions (i, j) of the free cells, row by row."""
    goal: Float[Array, " 2"]
    _walls: Int[Array, " quadrants"]
    """For each quarter of a cell, bits that tell whether there is a wall beside it along x (1), along y (2) and
    across its corner (4): the only boxes that a ball in it can touch."""
    obs_shape: tuple[int, ...] = (4,)
    action_dim: int = 2

    def __init__(self, layout: str, *, name: str = "maze2d/custom", max_steps: int = 800):
        """**Arguments:**

        - `layout`: one line per row of cells: `#` is a wall, `O`, `.` or a space is free, one `G` is the goal.
            Blank lines around it and common indentation do not count.
        - `name`: what the environment calls itself.
        - `max_steps`: after which an episode is truncated; 800 is D4RL's limit for its largest maze, 600 and 300
            those for medium and umaze.

        **Raises:** `ValueError` when the layout is not a rectangle enclosed by walls, has other characters, not
        exactly one goal, or cells from which the goal cannot be reached, naming row and column; and when
        `max_steps` is not positive.
        """
        if max_steps < 1:
            raise ValueError(f"max_steps is {max_steps}; an episode has at least one step.")
        self.name, self.max_steps = name, max_steps
        self.layout = _parse(layout)
        grid = np.array([list(row) for row in self.layout])
        free = grid != "#"
        self.cells = jnp.asarray(np.argwhere(free), float)
        self.goal = jnp.asarray(np.argwhere(grid == "G")[0], float)
        self._walls = jnp.asarray(_neighbouring_walls(~free).ravel())

    @property
    def walls(self) -> np.ndarray:
        """The centres of the wall boxes, whose sides are 1, (walls, 2)."""
        return np.argwhere(_cell_numbers(self.layout) < 0) + (0.5 - CORNER)

    def reset(self, *, key: Key[Array, ""]) -> tuple[MazeState, Float[Array, " 4"]]:
        # One draw of all numbers: with auto-reset every step pays for a reset, most of it random bits.
        which, shift_x, shift_y, spread, turn = jr.uniform(key, (5,))
        cell = self.cells[(which * len(self.cells)).astype(jnp.int32)]
        position = cell + 0.1 * (2 * jnp.stack([shift_x, shift_y]) - 1)
        # Box and Muller's two normals.
        speed, angle = 0.1 * jnp.sqrt(-2 * jnp.log1p(-spread)), 2 * jnp.pi * turn
        return self.start(position, speed * jnp.stack([jnp.cos(angle), jnp.sin(angle)]))

    def start(
        self,
        position: Float[Array, " 2"],
        velocity: Float[Array, " 2"] | None = None,
        goal: Float[Array, " 2"] | None = None,
    ) -> tuple[MazeState, Float[Array, " 4"]]:
        """A first state of one's choosing and its observation: by default at rest and with the maze's own goal.

        The ball must be clear of the walls, which is not checked: anywhere within 0.2 of an entry of `cells` is.
        """
        velocity = jnp.zeros(2) if velocity is None else velocity
        goal = self.goal if goal is None else goal
        state = MazeState(position, velocity, goal, jnp.zeros((), jnp.int32))
        return state, jnp.concatenate([position, velocity])

    def step(
        self, state: MazeState, action: Float[Array, " 2"], *, key: Key[Array, ""]
    ) -> tuple[MazeState, TimeStep]:
        velocity = jnp.clip(state.velocity, -MAX_SPEED, MAX_SPEED)
        # Euler, implicit in the damping, as MuJoCo integrates joints.
        force = FORCE * jnp.clip(action, -1, 1) - DAMPING * velocity
        velocity = velocity + TIME_STEP * force / (MASS + TIME_STEP * DAMPING)
        position = state.position + TIME_STEP * velocity
        position, velocity = self._collide(position, velocity)
        elapsed = state.elapsed + 1
        to_goal = position - state.goal
        reward = jnp.where(_dot(to_goal, to_goal) <= GOAL_RADIUS**2, 1.0, 0.0)
        outcome = TimeStep(
            jnp.concatenate([position, velocity]),
            reward,
            terminated=jnp.array(False),
            truncated=elapsed >= self.max_steps,
        )
        return MazeState(position, velocity, state.goal, elapsed), outcome

    def _collide(self, position, velocity):
        """The ball pushed out of the boxes that it overlaps, without its velocity into them.

        A step moves the ball by less than its radius, so its centre is in a free cell, and only the boxes that
        its quarter of the cell borders on are near. Contacts with the two beside it do not affect each other;
        the one across the corner is touched only where these two are no walls.
        """
        quadrant = jnp.floor(2 * (position + CORNER)).astype(jnp.int32)
        bits = self._walls[quadrant[0] * 2 * len(self.layout[0]) + quadrant[1]]
        centre = quadrant // 2 + (0.5 - CORNER)
        side = 2.0 * (quadrant % 2) - 1  # to which the borders lie
        beside = (bits & jnp.array([1, 2])) > 0

        # Coordinates from the centre towards the borders: the boxes begin at 0.5.
        offset, speed = side * (position - centre), side * velocity
        hit = beside & (offset > 0.5 - RADIUS)
        offset = jnp.where(hit, 0.5 - RADIUS, offset)
        speed = jnp.where(hit, jnp.minimum(speed, 0.0), speed)

        to_corner = 0.5 - offset
        distance = jnp.sqrt(jnp.maximum(_dot(to_corner, to_corner), 1e-12))
        hit = (bits >= 4) & (distance < RADIUS)
        normal = to_corner / distance
        offset = jnp.where(hit, 0.5 - RADIUS * normal, offset)
        inward = jnp.maximum(_dot(speed, normal), 0.0)
        speed = jnp.where(hit, speed - inward * normal, speed)
        return centre + side * offset, side * speed

    def cell_of(self, position: Float[Array, " 2"]) -> Int[Array, ""]:
        """The row of `cells` in which the position lies; -1 inside a wall."""
        row, column = jnp.floor(position + CORNER).astype(jnp.int32)
        return jnp.asarray(_cell_numbers(self.layout))[row, column]


def _dot(a, b):
    """The inner product, spelled out: a reduction over two numbers is a kernel of its own, which costs more."""
    return a[0] * b[0] + a[1] * b[1]


# --- The layout ---


def _parse(layout: str) -> tuple[str, ...]:
    """The rows of a valid layout, with O for what is free."""
    lines = textwrap.dedent(layout).split("\n")
    filled = [number for number, line in enumerate(lines) if line.strip()]
    rows = lines[filled[0] : filled[-1] + 1] if filled else []
    remedy = "Draw walls as #, free cells as O, . or a space, and one goal as G."
    if not rows:
        raise ValueError(f"The layout has no rows. {remedy}")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"Row {i} of the layout, {row!r}, has {len(row)} cells and row 0 has {len(rows[0])}. "
                "Fill the shorter one up with #."
            )
        for j, char in enumerate(row):
            if char not in "#O. G":
                raise ValueError(f"Row {i}, column {j} of the layout is {char!r}. {remedy}")
            if char != "#" and (i in (0, len(rows) - 1) or j in (0, len(row) - 1)):
                raise ValueError(
                    f"Row {i}, column {j} of the layout is on its border and free. Enclose the maze with #."
                )
    rows = tuple(row.replace(".", "O").replace(" ", "O") for row in rows)
    goals = [
        f"row {i}, column {j}" for i, row in enumerate(rows) for j, char in enumerate(row) if char == "G"
    ]
    if len(goals) != 1:
        found = f"{len(goals)} goals ({'; '.join(goals)})" if goals else "no goal"
        raise ValueError(f"The layout has {found}. Mark exactly one cell as G.")
    numbers = _cell_numbers(rows)
    cells = np.argwhere(numbers >= 0)
    goal = next(number for number, (i, j) in enumerate(cells) if rows[i][j] == "G")
    cut_off = cells[np.isinf(_distances(rows)[:, goal])]
    if len(cut_off):
        named = "; ".join(f"row {i}, column {j}" for i, j in cut_off[:4]) + (
            "; ..." if len(cut_off) > 4 else ""
        )
        raise ValueError(
            f"No path leads to the goal from {named}. Open a way through cells that share a side, or make "
            "these cells walls."
        )
    return rows


@functools.cache
def _cell_numbers(rows: tuple[str, ...]) -> np.ndarray:
    """The number of each free cell in reading order, -1 for walls."""
    free = np.array([list(row) for row in rows]) != "#"
    return np.where(free, np.cumsum(free).reshape(free.shape) - 1, -1).astype(np.int32)


def _neighbouring_walls(wall: np.ndarray) -> np.ndarray:
    """The bits of `Maze2D._walls`, (2 rows, 2 columns); 7 within walls, where no ball gets."""
    bits = np.full((2 * wall.shape[0], 2 * wall.shape[1]), 7, np.int32)
    for i, j in np.argwhere(~wall):
        for a in (0, 1):
            for b in (0, 1):
                x, y = i + 2 * a - 1, j + 2 * b - 1
                bits[2 * i + a, 2 * j + b] = wall[x, j] + 2 * wall[i, y] + 4 * wall[x, y]
    return bits


def _neighbours(rows: tuple[str, ...]) -> np.ndarray:
    """The free cells that share a side with each, (cells, 4); a cell itself where there is a wall."""
    numbers = _cell_numbers(rows)
    cells = np.argwhere(numbers >= 0)
    beside = np.stack(
        [numbers[tuple((cells + step).T)] for step in ((0, -1), (0, 1), (-1, 0), (1, 0))], axis=1
    )
    return np.where(beside < 0, np.arange(len(cells))[:, None], beside)


@functools.cache
def _distances(rows: tuple[str, ...]) -> np.ndarray:
    """The length of the shortest path from each free cell to each, infinite without one, (cells, cells)."""
    neighbours = _neighbours(rows)
    distances = np.where(np.eye(len(neighbours), dtype=bool), 0.0, np.inf)
    while True:
        # One sweep of value iteration reaches one cell further in all directions.
        closer = np.minimum(distances, 1 + distances[neighbours].min(axis=1))
        if np.array_equal(closer, distances):
            return distances
        distances = closer


# --- The controller ---


class WaypointPlan(eqx.Module):
    """The cell that a controller goes to, the one on the way that is next, and the point in it to steer for."""

    target: Int[Array, ""]
    cell: Int[Array, ""]
    waypoint: Float[Array, " 2"]


class WaypointController(eqx.Module):
    """D4RL's controller: PD control towards one cell after another of a shortest path.

    Cells are rows of `Maze2D.cells`. The point to steer for in a cell on the way is its integer position minus
    U(0, jitter)^2, which is nearer to its centre, drawn when it becomes current; in the target cell it is the
    integer position itself.

    D4RL's plans anew only when the target changes, so with the same target after a reset it steers through walls.
    Here plans are values: call `plan` whenever the ball was moved or the target changed.
    """

    maze: Maze2D
    successors: Int[Array, "cells cells"]
    """Which cell to go to next, by current cell and target."""
    gain: float
    damping: float
    reach: float
    """The distance at which a waypoint counts as reached."""
    jitter: float

    def __init__(
        self,
        maze: Maze2D,
        *,
        gain: float = 10.0,
        damping: float = 1.0,
        reach: float = 0.1,
        jitter: float = 0.2,
    ):
        self.maze = maze
        self.gain, self.damping, self.reach, self.jitter = gain, damping, reach, jitter
        neighbours, distances = _neighbours(maze.layout), _distances(maze.layout)
        first = np.argmin(distances[neighbours], axis=1)
        successors = np.take_along_axis(neighbours, first, axis=1)
        np.fill_diagonal(successors, np.arange(len(successors)))
        self.successors = jnp.asarray(successors, jnp.int32)

    def plan(self, obs: Float[Array, " 4"], target: Int[Array, ""], *, key: Key[Array, ""]) -> WaypointPlan:
        """A new plan: from where the ball is to the target cell."""
        cell = self.successors[self.maze.cell_of(obs[:2]), target]
        return WaypointPlan(target, cell, self._waypoint(cell, target, key))

    def act(
        self, plan: WaypointPlan, obs: Float[Array, " 4"], *, key: Key[Array, ""]
    ) -> tuple[WaypointPlan, Float[Array, " 2"], Bool[Array, ""]]:
        """**Returns:** the plan to go on with, the action, and whether the ball has arrived: is within reach of
        the integer position of its target."""
        position, velocity = obs[:2], obs[2:]
        within = lambda point: _dot(position - point, position - point) < self.reach**2
        goal = self.maze.cells[plan.target]
        arrived = within(goal)
        aim = jnp.where(arrived, goal, plan.waypoint)
        action = jnp.clip(self.gain * (aim - position) - self.damping * velocity, -1, 1)

        cell = self.successors[plan.cell, plan.target]
        further = WaypointPlan(plan.target, cell, self._waypoint(cell, plan.target, key))
        advance = within(plan.waypoint) & ~arrived
        plan = jax.tree.map(lambda new, old: jnp.where(advance, new, old), further, plan)
        return plan, action, arrived

    def _waypoint(self, cell, target, key):
        shift = self.jitter * jr.uniform(key, (2,))
        return self.maze.cells[cell] - jnp.where(cell == target, 0.0, shift)


MAZES: dict[str, Callable[[], Maze2D]] = {
    "umaze": functools.partial(Maze2D, UMAZE, name="maze2d/umaze", max_steps=300),
    "medium": functools.partial(Maze2D, MEDIUM, name="maze2d/medium", max_steps=600),
    "large": functools.partial(Maze2D, LARGE, name="maze2d/large", max_steps=800),
}
"""The constructors by catalog name."""
