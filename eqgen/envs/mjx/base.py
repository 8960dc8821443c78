"""What MJX tasks have in common: a model, its physics step, resets, the time limit.

A task of your own is a subclass with an XML file, `observe` and `judge`; `eqgen/envs/mjx/tasks.py` has ten.

Forces and poses that enter an observation or reward are, as in Gymnasium, those of the last forward pass *within*
the last physics step (for Runge-Kutta, of its last stage), not of the final state; what of them outlives a step is
kept in the state. `qpos` and `qvel` are of the final state.

Two things are not MJX's own. A model whose solver it lacks (projected Gauss-Seidel) gets Newton's method, which
solves the same constraints to a smaller residual. And the friction of a capsule on a plane is mended, for our tasks
only: see `_plane_capsule`.
"""

import contextlib
import functools
import io
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import mujoco
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from eqgen.envs.base import AbstractEnv
from eqgen.types import TimeStep


with contextlib.redirect_stdout(io.StringIO()):  # prints that its optional back-end Warp is missing
    from mujoco import mjx
    from mujoco.mjx._src import collision_driver
    from mujoco.mjx._src.collision_primitive import collider


_ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


# --- MJX ---


@collider(ncon=2)
def _plane_capsule(plane, capsule):
    """Contacts of both ends of a capsule, with tangents along its axis, as the C engine has them.

    MJX (seen in 3.17; MuJoCo issue 2774) takes fixed tangents instead when a capsule is steeper than 60 degrees.
    Pyramidal friction depends on the tangents: an ant is off by a hundredth after its first touch.
    """
    normal, axis = plane.mat[:, 2], capsule.mat[:, 2]
    along = axis - normal * jnp.dot(normal, axis)
    length = jnp.linalg.norm(along)
    along = jnp.where(length < 1e-15, jnp.array([1.0, 0.0, 0.0]), along / jnp.maximum(length, 1e-15))
    frame = jnp.stack([normal, along, jnp.cross(normal, along)])
    ends = capsule.pos + jnp.outer(jnp.array([1.0, -1.0]) * capsule.size[1], axis)
    distance = (ends - plane.pos) @ normal - capsule.size[0]
    position = ends - jnp.outer(capsule.size[0] + distance / 2, normal)
    return distance, position, jnp.stack([frame, frame])


@contextlib.contextmanager
def _mjx():
    """Where MJX is called: with our collider in place of its own, and with its implicit broadcasting."""
    functions, pair = collision_driver._COLLISION_FUNC, (mjx.GeomType.PLANE, mjx.GeomType.CAPSULE)
    theirs, functions[pair] = functions[pair], _plane_capsule
    try:
        with jax.numpy_rank_promotion("allow"):
            yield
    finally:
        functions[pair] = theirs


class MJXState(eqx.Module):
    """What a step needs of the one before."""

    qpos: Float[Array, " nq"]
    qvel: Float[Array, " nv"]
    warmstart: Float[Array, " nv"]
    """Accelerations from which the constraint solver starts."""
    kept: dict[str, Array]
    """What a task reads of the last forward pass before its next step, such as the position of a body."""
    elapsed: Int[Array, ""]


class _Physics:
    """A compiled model and an empty simulation; one object per task, so that compiled functions are shared."""

    def __init__(self, xml_file: str):
        previous = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(lambda message: None)  # the files use old spellings
        try:
            self.host = mujoco.MjModel.from_xml_path(str(_ASSETS / xml_file))
        finally:
            mujoco.set_mju_user_warning(previous)
        if self.host.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
            self.host.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
        self.model = mjx.put_model(self.host, impl="jax")
        self.data = mjx.put_data(self.host, mujoco.MjData(self.host), impl="jax")


@functools.cache
def _physics(xml_file: str, x64: bool) -> _Physics:
    """JAX's precision is part of the name: arrays of the model have it."""
    with jax.ensure_compile_time_eval():
        return _Physics(xml_file)


class AbstractMJXEnv(AbstractEnv):
    """A task: which model, how a reset is drawn, and what is made of the physics."""

    version: int = 5
    """4 or 5: Gymnasium's; the table in `tasks.py` says what differs."""
    name: str = eqx.field(init=False)
    obs_shape: tuple[int, ...] = eqx.field(init=False)
    action_dim: int = eqx.field(init=False)
    max_steps: int = eqx.field(init=False)
    _physics: _Physics = eqx.field(init=False, static=True, repr=False)

    xml: ClassVar[str]
    """One of Gymnasium's files, or the absolute path of your own."""
    frame_skip: ClassVar[int]
    reset_noise: ClassVar[float]
    normal_velocities: ClassVar[bool] = False
    """Whether velocities are reset by normal noise instead of uniform."""
    versions: ClassVar[tuple[int, ...]] = (4, 5)
    forces: ClassVar[bool] = False
    """Whether the task reads contact forces on bodies (`cfrc_ext`), which cost a further pass."""
    time_limit: ClassVar[int] = 1000

    def __post_init__(self):
        if self.version not in self.versions:
            raise ValueError(
                f"{type(self).__name__} has no version {self.version}; choose one of {self.versions}."
            )
        self.name = f"mjx/{type(self).__name__}-v{self.version}"
        self._physics = _physics(self._xml(), jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        self.action_dim = self._physics.host.nu
        self.max_steps = self.time_limit
        self.obs_shape = jax.eval_shape(lambda: self.reset(key=jr.key(0)))[1].shape

    # --- What makes a task ---

    def _xml(self) -> str:
        return self.xml

    @abstractmethod
    def observe(self, data: mjx.Data) -> Float[Array, " obs"]:
        """The observation of a simulation."""

    def keep(self, data: mjx.Data) -> dict[str, Array]:
        """What the reward of the next step will read of this one."""
        return {}

    @abstractmethod
    def judge(
        self, before: MJXState, data: mjx.Data, control: Float[Array, " act"]
    ) -> tuple[Float[Array, ""], Bool[Array, ""]]:
        """Reward and termination of the step that led from `before` to `data`."""

    def draw(self, *, key: Key[Array, ""]) -> tuple[Float[Array, " nq"], Float[Array, " nv"]]:
        """Positions and velocities at the start of an episode."""
        qpos_key, qvel_key = jr.split(key)
        host, noise = self._physics.host, self.reset_noise
        qpos = host.qpos0 + jr.uniform(qpos_key, (host.nq,), minval=-noise, maxval=noise)
        if self.normal_velocities:
            return qpos, noise * jr.normal(qvel_key, (host.nv,))
        return qpos, jr.uniform(qvel_key, (host.nv,), minval=-noise, maxval=noise)

    # --- The environment ---

    @property
    def dt(self) -> float:
        """Seconds of simulated time per step."""
        return self.frame_skip * float(self._physics.host.opt.timestep)

    @property
    def model(self) -> mujoco.MjModel:
        """The model, for rendering and for `body`."""
        return self._physics.host

    def control(self, action: Float[Array, " act"]) -> Float[Array, " act"]:
        """An action in [-1, 1], which is where it is clipped to, in the units of the actuators."""
        low, high = self._physics.host.actuator_ctrlrange.T.astype(np.float32)
        return jnp.asarray((low + high) / 2 + (high - low) / 2 * jnp.clip(action, -1, 1), float)

    def reset(self, *, key: Key[Array, ""]) -> tuple[MJXState, Float[Array, " obs"]]:
        return self.reset_to(*self.draw(key=key))

    def reset_to(
        self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]
    ) -> tuple[MJXState, Float[Array, " obs"]]:
        """A first state with these positions and velocities, and its observation."""
        qpos, qvel = jnp.asarray(qpos, float), jnp.asarray(qvel, float)
        data = self._physics.data.replace(qpos=qpos, qvel=qvel)
        with _mjx():
            data = mjx.forward(self._physics.model, data)
            data = data.replace(qpos=qpos)  # not normalised, as Gymnasium leaves it
            return self._state(data, jnp.int32(0)), self.observe(data)

    def step(
        self, state: MJXState, action: Float[Array, " act"], *, key: Key[Array, ""]
    ) -> tuple[MJXState, TimeStep]:
        control, model = self.control(action), self._physics.model
        start = self._physics.data.replace(
            qpos=state.qpos, qvel=state.qvel, qacc_warmstart=state.warmstart, ctrl=control
        )

        def substep(_, data):
            # In float64 MJX turns some integers into int64 as it goes.
            return jax.tree.map(lambda new, old: new.astype(old.dtype), mjx.step(model, data), data)

        with _mjx():
            data = jax.lax.fori_loop(0, self.frame_skip, substep, start)
            if self.forces:
                data = mjx.rne_postconstraint(model, data)
            obs = self.observe(data)
            reward, terminated = self.judge(state, data, control)
        elapsed = state.elapsed + 1
        truncated = (elapsed >= self.max_steps) & ~terminated
        return self._state(data, elapsed), TimeStep(obs, reward, terminated, truncated)

    def _state(self, data: mjx.Data, elapsed: Int[Array, ""]) -> MJXState:
        return MJXState(data.qpos, data.qvel, data.qacc_warmstart, self.keep(data), elapsed)

    def body(self, data: mjx.Data, name: str) -> Float[Array, " 3"]:
        """The position of a body in the last forward pass."""
        return data.xpos[self.model.body(name).id]
