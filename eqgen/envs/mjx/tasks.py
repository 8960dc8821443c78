"""Gymnasium's MuJoCo tasks in pure JAX, on MJX: the same XML files, observations, rewards, terminations, resets.

Version 5 is Gymnasium's present one; version 4 is the one that most papers report. What differs for us:

    task                     v4                                          v5
    Hopper, Walker2d         +1 also for the step that falls             +1 only while healthy
    Walker2d                 left foot has friction 0.9                  both feet 1.9
    Ant                      27 observations                             105: also contact forces, in [-1, 1]
                             +1 always, no contact cost                  +1 while healthy, 5e-4 |contact forces|^2
    Humanoid                 376 observations                            348: without what is constant
                             +5 always, no contact cost                  +5 while healthy, contact cost up to 10
    InvertedPendulum         reward 1 always                             reward 0 for the step that falls
    InvertedDoublePendulum   11 observations, +10 always                 9 observations, +10 until it falls
    Reacher                  11 observations, reward before the step     10 observations, reward after the step
    Pusher                   needs a MuJoCo before 3: not here           reward after the step
    HalfCheetah, Swimmer     (no difference)

Differs from Gymnasium in: the random numbers of a reset (their laws are equal), and Humanoid's solver (Newton's
method for projected Gauss-Seidel, which MJX lacks). `benchmarks/results/parity.json` has the measured differences.

On a CPU the C engine (`mujoco/` in the catalog) steps a few environments many times faster; MJX is for GPUs and
for loops that are compiled whole. Both give the same task, not the same chaotic trajectory.
"""

from abc import abstractmethod
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float

from eqgen.envs.mjx.base import AbstractMJXEnv, MJXState, mjx  # pyright: ignore[reportAttributeAccessIssue]  # of an untyped module


def _cost(weight: float, x: Array) -> Array:
    return weight * jnp.sum(x**2)


# --- Running ---


class HalfCheetah(AbstractMJXEnv):
    """A planar cheetah with six motors; runs as fast as it can and never ends early."""

    xml, frame_skip, reset_noise, normal_velocities = "half_cheetah.xml", 5, 0.1, True

    def observe(self, data):
        return jnp.concatenate([data.qpos[1:], data.qvel])

    def judge(self, before, data, control):
        velocity = (data.qpos[0] - before.qpos[0]) / self.dt
        return velocity - _cost(0.1, control), jnp.array(False)


class Swimmer(AbstractMJXEnv):
    """Three links in a viscous fluid; never ends early."""

    xml, frame_skip, reset_noise = "swimmer.xml", 4, 0.1

    def observe(self, data):
        return jnp.concatenate([data.qpos[2:], data.qvel])

    def judge(self, before, data, control):
        velocity = (data.qpos[0] - before.qpos[0]) / self.dt
        return velocity - _cost(1e-4, control), jnp.array(False)


class _Balancing(AbstractMJXEnv):
    """Those that run and must not fall: forward velocity, a bonus, less the costs."""

    forward_weight: ClassVar[float] = 1.0
    bonus: ClassVar[float] = 1.0
    control_weight: ClassVar[float] = 1e-3

    @abstractmethod
    def healthy(self, data: mjx.Data) -> Bool[Array, ""]:
        """Whether it has not fallen."""

    def velocity(self, before: MJXState, data: mjx.Data) -> Float[Array, ""]:
        """How fast it went forward."""
        return (data.qpos[0] - before.qpos[0]) / self.dt

    def contact_cost(self, data: mjx.Data) -> Float[Array, ""] | float:
        """What the forces on its body cost."""
        return 0.0

    def judge(self, before, data, control):
        healthy = self.healthy(data)
        bonus = self.bonus if self.version == 4 else self.bonus * healthy
        costs = _cost(self.control_weight, control) + self.contact_cost(data)
        return self.forward_weight * self.velocity(before, data) + bonus - costs, ~healthy


class Hopper(_Balancing):
    """A planar leg with three motors."""

    xml, frame_skip, reset_noise = "hopper.xml", 4, 5e-3

    def observe(self, data):
        return jnp.concatenate([data.qpos[1:], jnp.clip(data.qvel, -10, 10)])

    def healthy(self, data):
        rest = jnp.concatenate([data.qpos[2:], data.qvel])
        return (data.qpos[1] > 0.7) & (jnp.abs(data.qpos[2]) < 0.2) & jnp.all(jnp.abs(rest) < 100)


class Walker2d(_Balancing):
    """Two planar legs with six motors."""

    frame_skip, reset_noise = 4, 5e-3

    def _xml(self):
        return "walker2d.xml" if self.version == 4 else "walker2d_v5.xml"

    def observe(self, data):
        return jnp.concatenate([data.qpos[1:], jnp.clip(data.qvel, -10, 10)])

    def healthy(self, data):
        height, angle = data.qpos[1:3]
        return (0.8 < height) & (height < 2.0) & (jnp.abs(angle) < 1.0)


class Ant(_Balancing):
    """Four legs with eight motors."""

    xml, frame_skip, reset_noise, normal_velocities = "ant.xml", 5, 0.1, True
    control_weight = 0.5

    @property
    def forces(self):  # pyright: ignore[reportIncompatibleVariableOverride]  # read from instances only
        return self.version == 5

    def observe(self, data):
        parts = [data.qpos[2:], data.qvel]
        if self.version == 5:
            parts.append(jnp.clip(data._impl.cfrc_ext[1:], -1, 1).ravel())
        return jnp.concatenate(parts)

    def keep(self, data):
        return {"x": self.body(data, "torso")[0]}

    def velocity(self, before, data):
        return (self.body(data, "torso")[0] - before.kept["x"]) / self.dt

    def contact_cost(self, data):
        return _cost(5e-4, jnp.clip(data._impl.cfrc_ext, -1, 1)) if self.version == 5 else 0.0

    def healthy(self, data):
        height = data.qpos[2]
        finite = jnp.all(jnp.isfinite(data.qpos)) & jnp.all(jnp.isfinite(data.qvel))
        return finite & (0.2 <= height) & (height <= 1.0)


class Humanoid(_Balancing):
    """Two legs and two arms with 17 motors."""

    xml, frame_skip, reset_noise = "humanoid.xml", 5, 1e-2
    forward_weight, bonus, control_weight, forces = 1.25, 5.0, 0.1, True

    def observe(self, data):
        parts, actuators = [data._impl.cinert, data.cvel, data._impl.cfrc_ext], data.qfrc_actuator
        if self.version == 5:
            parts, actuators = [part[1:] for part in parts], actuators[6:]
        inertia, velocity, forces = [part.ravel() for part in parts]
        return jnp.concatenate([data.qpos[2:], data.qvel, inertia, velocity, actuators, forces])

    def keep(self, data):
        return {"x": self._centre(data)}

    def velocity(self, before, data):
        return (self._centre(data) - before.kept["x"]) / self.dt

    def contact_cost(self, data):
        return jnp.minimum(_cost(5e-7, data._impl.cfrc_ext), 10.0) if self.version == 5 else 0.0

    def healthy(self, data):
        return (1.0 < data.qpos[2]) & (data.qpos[2] < 2.0)

    def _centre(self, data):
        mass = self.model.body_mass
        return jnp.asarray(mass / mass.sum(), float) @ data.xipos[:, 0]


# --- Balancing a pole ---


class InvertedPendulum(AbstractMJXEnv):
    """A cart that keeps a pole upright."""

    xml, frame_skip, reset_noise = "inverted_pendulum.xml", 2, 0.01

    def observe(self, data):
        return jnp.concatenate([data.qpos, data.qvel])

    def judge(self, before, data, control):
        obs = self.observe(data)
        fell = ~jnp.all(jnp.isfinite(obs)) | (jnp.abs(data.qpos[1]) > 0.2)
        return jnp.where(fell & (self.version == 5), 0.0, 1.0), fell


class InvertedDoublePendulum(AbstractMJXEnv):
    """A cart that keeps two poles upright, one on the other."""

    xml, frame_skip, reset_noise, normal_velocities = "inverted_double_pendulum.xml", 5, 0.1, True

    def observe(self, data):
        force = jnp.clip(data.qfrc_constraint, -10, 10)
        force = force if self.version == 4 else force[:1]
        angles, velocities = data.qpos[1:], jnp.clip(data.qvel, -10, 10)
        return jnp.concatenate([data.qpos[:1], jnp.sin(angles), jnp.cos(angles), velocities, force])

    def judge(self, before, data, control):
        (x, _, y), (v1, v2) = data.site_xpos[0], data.qvel[1:3]
        fell = y <= 1
        bonus = jnp.where(fell & (self.version == 5), 0.0, 10.0)
        return bonus - 0.01 * x**2 - (y - 2) ** 2 - 1e-3 * v1**2 - 5e-3 * v2**2, fell


# --- Reaching and pushing ---


class Reacher(AbstractMJXEnv):
    """A planar arm with two motors whose fingertip goes to a target, drawn anew in each episode."""

    xml, frame_skip, reset_noise, time_limit = "reacher.xml", 2, 0.1, 50

    def draw(self, *, key):
        arm_key, radius_key, angle_key, speed_key = jr.split(key, 4)
        arm = jr.uniform(arm_key, (2,), minval=-0.1, maxval=0.1)
        radius = 0.2 * jnp.sqrt(
            jr.uniform(radius_key)
        )  # uniform in the disc, as repeated draws from a square are
        angle = 2 * jnp.pi * jr.uniform(angle_key)
        target = radius * jnp.array([jnp.cos(angle), jnp.sin(angle)])
        speed = jr.uniform(speed_key, (2,), minval=-0.005, maxval=0.005)
        return jnp.concatenate([arm, target]), jnp.concatenate([speed, jnp.zeros(2)])

    def _distance(self, data):
        return self.body(data, "fingertip") - self.body(data, "target")

    def observe(self, data):
        distance = self._distance(data)
        distance = distance if self.version == 4 else distance[:2]
        angles = data.qpos[:2]
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles), data.qpos[2:], data.qvel[:2], distance])

    def keep(self, data):
        return {"distance": self._distance(data)} if self.version == 4 else {}

    def judge(self, before, data, control):
        distance = before.kept["distance"] if self.version == 4 else self._distance(data)
        return -jnp.linalg.norm(distance) - _cost(1.0, control), jnp.array(False)


class Pusher(AbstractMJXEnv):
    """An arm with seven motors that pushes a cylinder, drawn anew in each episode, to a goal."""

    xml, frame_skip, reset_noise, time_limit, versions = "pusher_v5.xml", 5, 0.005, 100, (5,)

    def draw(self, *, key):
        place_key, speed_key = jr.split(key)
        low, high = jnp.array([-0.3, -0.2]), jnp.array([0.0, 0.2])

        def again(carry):
            key, redo = jr.split(carry[0])
            return key, jr.uniform(redo, (2,), minval=low, maxval=high)

        near = lambda carry: jnp.linalg.norm(carry[1]) <= 0.17
        cylinder = jax.lax.while_loop(near, again, (place_key, jnp.zeros(2)))[1]
        qpos = jnp.asarray(self.model.qpos0, float).at[-4:].set(jnp.concatenate([cylinder, jnp.zeros(2)]))
        speed = jr.uniform(speed_key, (self.model.nv,), minval=-self.reset_noise, maxval=self.reset_noise)
        return qpos, speed.at[-4:].set(0.0)

    def observe(self, data):
        places = [self.body(data, name) for name in ("tips_arm", "object", "goal")]
        return jnp.concatenate([data.qpos[:7], data.qvel[:7], *places])

    def judge(self, before, data, control):
        arm, cylinder, goal = (self.body(data, name) for name in ("tips_arm", "object", "goal"))
        near, far = jnp.linalg.norm(cylinder - arm), jnp.linalg.norm(cylinder - goal)
        return -0.5 * near - far - _cost(0.1, control), jnp.array(False)


_RUNNING = (HalfCheetah, Swimmer, Hopper, Walker2d, Ant, Humanoid)
_OTHERS = (InvertedPendulum, InvertedDoublePendulum, Reacher, Pusher)
TASKS: dict[str, type[AbstractMJXEnv]] = {task.__name__: task for task in (*_RUNNING, *_OTHERS)}
"""The tasks by their names without a version."""


def make_mjx(task: str) -> AbstractMJXEnv:
    """The task of a Gymnasium id such as `"HalfCheetah-v5"`.

    **Raises:** `ValueError` when there is no such task or version here.
    """
    name, _, version = task.rpartition("-v")
    if name not in TASKS or not version.isdigit():
        raise ValueError(f"There is no MJX task {task!r}.")
    return TASKS[name](version=int(version))
