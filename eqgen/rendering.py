"""Pictures of what a policy does, as GIF or MP4.

`render_policy` runs a policy and draws each step: MuJoCo tasks, on the host or on MJX, by MuJoCo's renderer,
off-screen; the pendulum, mazes and the toy bandits by hand; other environments as traces of observations and
actions. GIFs need nothing more, MP4 needs imageio-ffmpeg (in the extra `notebooks`), which brings its own encoder.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key
from PIL import Image, ImageDraw, ImageFont

from eqgen.envs.base import AbstractEnv
from eqgen.envs.maze import CORNER, GOAL_RADIUS, RADIUS, TIME_STEP, Maze2D
from eqgen.envs.toys import MixtureBandit
from eqgen.files import replacing


Policy = Callable[[Array, Key[Array, ""]], Array]
"""`(obs, key) -> action` for one observation, the action in [-1, 1]^d; traceable by JAX."""

_COLORS = (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233)
_BLUE, _VERMILION, _GREEN = _COLORS[:3]
_INK, _GREY, _FAINT, _PAPER = (40,) * 3, (130,) * 3, (222,) * 3, (255,) * 3
_OVERSAMPLING = 3  # drawn larger and scaled down, which smooths the edges


def render_policy(
    policy: Policy,
    env: Any,
    *,
    path: str | Path,
    key: Key[Array, ""],
    num_episodes: int | None = None,
    max_frames: int = 300,
    size: int = 320,
) -> list[float]:
    """Runs `policy` in `env` and writes a clip of it.

    **Arguments:**

    - `policy`: `(obs, key) -> action`; if a PyTree (such as `eqx.Partial`), new weights do not compile anew.
    - `env`: an `AbstractEnv` or a `HostEnv`.
    - `path`: where to; `.gif` or `.mp4`. Written under a temporary name and renamed.
    - `num_episodes`: 1 if None; of a bandit, whose episodes are single actions, 600.
    - `max_frames`: the clip ends there, even within an episode. It shows simulated time at its true speed, in
        about 25 frames per second.
    - `size`: of the picture above the caption, in pixels; even.

    **Returns:** the return of each episode as far as it is shown; of a bandit, the mean reward.

    **Raises:** `ValueError` for another suffix; `ImportError` when MP4 cannot be encoded; `RuntimeError` when
    MuJoCo cannot draw on this machine. Both name the remedy.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path.name}: a clip is written as {' or '.join(_WRITERS)}, not {path.suffix!r}.")
    if isinstance(env, MixtureBandit):
        shots, fps = _bandit_shots(policy, env, num_episodes or 600, key, size), 10.0
    elif env.name.startswith("mjx/"):
        every = max(1, round(1 / (25 * env.dt)))
        shots, fps = _mjx_shots(policy, env, num_episodes or 1, key, size, every), 1 / (env.dt * every)
    elif isinstance(env, AbstractEnv):
        every = 4 if isinstance(env, Maze2D) else 1
        shots = _jax_shots(policy, env, num_episodes or 1, key, size, every)
        fps = 1 / (TIME_STEP * every) if isinstance(env, Maze2D) else 20.0
    else:
        every = max(1, round(env.steps_per_second / 25))
        shots = _host_shots(policy, env, num_episodes or 1, key, size, every)
        fps = env.steps_per_second / every
    frames, returns = [], {}
    with closing(shots):
        for shot in islice(shots, max_frames):
            frames.append(_captioned(shot.picture, env.name, shot.caption))
            returns[shot.episode] = shot.total
    with replacing(path) as temporary:
        _WRITERS[path.suffix](temporary, frames, fps)
    return list(returns.values())


class _Shot(NamedTuple):
    picture: Image.Image
    caption: str
    episode: int
    total: float
    """The return so far."""


# --- Environments in JAX ---


@eqx.filter_jit
def _episode(policy, env, key):
    """One episode's states, observations, actions, rewards and whether it still ran, each (max_steps, ...)."""
    reset_key, run_key = jr.split(key)
    state, obs = env.reset(key=reset_key)

    def body(carry, key):
        state, obs, running = carry
        act_key, step_key = jr.split(key)
        action = policy(obs, act_key)
        next_state, timestep = env.step(state, action, key=step_key)
        carry = next_state, timestep.obs, running & ~timestep.done
        return carry, (state, obs, action, timestep.reward, running)

    start = (state, obs, jnp.array(True))
    return jax.lax.scan(body, start, jr.split(run_key, env.max_steps))[1]


def _jax_shots(policy, env, num_episodes, key, size, every):
    """Of each episode, every so many steps and the last."""
    if isinstance(env, Maze2D):
        draw = functools.partial(_draw_maze, env)
    else:
        draw = _draw_pendulum if env.name == "gymnax/Pendulum-v1" else _draw_traces
    for episode in range(num_episodes):
        _, *facts = _episode(policy, env, jr.fold_in(key, episode))
        obs, actions, rewards, running = map(np.asarray, facts)
        length = int(running.sum())
        for t, total in enumerate(rewards[:length].cumsum()):
            if t % every and t != length - 1:
                continue
            picture = _drawn(size, draw, obs[:length], actions[:length], t)
            yield _Shot(picture, f"step {t + 1}   return {total:.1f}", episode, float(total))


def _mjx_shots(policy, env, num_episodes, key, size, every):
    """The poses that MJX computed, drawn as Gymnasium draws its own: by the model's camera, or from the side."""
    _choose_egl()
    import mujoco
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    model, data = env.model, mujoco.MjData(env.model)
    mujoco.mj_forward(model, data)
    solid = model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE
    across = np.ptp(data.geom_xpos[solid], axis=0).max() + 2 * model.geom_rbound[solid].max()
    side = {
        "distance": 1.3 * across,
        "elevation": -15.0,
        "azimuth": 90.0,
        "lookat": data.geom_xpos[solid].mean(0),
    }
    model.vis.global_.offwidth = model.vis.global_.offheight = size
    renderer = MujocoRenderer(model, data, side, size, size)
    try:
        for episode in range(num_episodes):
            states, *_, rewards, running = _episode(policy, env, jr.fold_in(key, episode))
            length, poses = int(running.sum()), np.asarray(states.qpos)
            for t, total in enumerate(np.asarray(rewards)[:length].cumsum()):
                if t % every == 0 or t == length - 1:
                    data.qpos[:] = poses[t]
                    mujoco.mj_forward(model, data)
                    with _advice(env.name):
                        picture = Image.fromarray(cast(np.ndarray, renderer.render("rgb_array")))
                    yield _Shot(picture, f"step {t + 1}   return {total:.1f}", episode, float(total))
    finally:
        renderer.close()


def _draw_pendulum(canvas, obs, actions, t):
    """The rod, a mark where it is upright, and an arrow for the torque (at most three quarters of a turn)."""
    draw, size = ImageDraw.Draw(canvas), canvas.width
    at = lambda x, y: (size * (0.5 + 0.38 * x), size * (0.5 - 0.38 * y))
    disc = lambda x, y, radius: [x - radius, y - radius, x + radius, y + radius]
    pivot, width = at(0, 0), size // 28
    draw.ellipse(disc(*pivot, 0.38 * size), outline=_FAINT, width=size // 200)
    draw.line([at(0, 0.94), at(0, 1.06)], fill=_GREEN, width=size // 100)
    cosine, sine = obs[t][:2]
    draw.line([pivot, at(-sine, cosine)], fill=_BLUE, width=width)
    draw.ellipse(disc(*pivot, width / 2), fill=_BLUE)
    draw.ellipse(disc(*at(-sine, cosine), width * 1.3), fill=_BLUE)
    draw.ellipse(disc(*pivot, width / 5), fill=_PAPER)
    torque = float(np.clip(actions[t][0], -1, 1))
    if abs(torque) > 0.03:
        angles = -np.pi / 2 - 1.5 * np.pi * torque * np.linspace(0, 1, 60)  # the screen's run clockwise
        on_arc = lambda angle, r: (pivot[0] + r * np.cos(angle), pivot[1] + r * np.sin(angle))
        radius, ahead = 0.16 * size, angles[-1] - np.sign(torque) * 0.22
        draw.line([on_arc(angle, radius) for angle in angles], fill=_VERMILION, width=size // 70)
        head = on_arc(angles[-1], 0.8 * radius), on_arc(angles[-1], 1.2 * radius), on_arc(ahead, radius)
        draw.polygon(head, fill=_VERMILION)


def _draw_maze(env, canvas, obs, actions, t):
    """The walls, the goal within the circle where it is rewarded to be, the way so far and the ball."""
    draw, size = ImageDraw.Draw(canvas), canvas.width
    height, width = len(env.layout), len(env.layout[0])
    scale = size / max(height, width)
    margin = (size - scale * width) / 2, (size - scale * height) / 2
    at = lambda x, y: (margin[0] + scale * (y + CORNER), margin[1] + scale * (x + CORNER))
    disc = lambda centre, radius: [*(c - radius for c in centre), *(c + radius for c in centre)]
    draw.ellipse(disc(at(*env.goal), scale * GOAL_RADIUS), outline=_GREEN, width=size // 150)
    draw.ellipse(disc(at(*env.goal), scale * RADIUS), fill=_GREEN)
    for x, y in env.walls:
        draw.rectangle([*at(x - 0.5, y - 0.5), *at(x + 0.5, y + 0.5)], fill=_GREY)
    draw.line([at(x, y) for x, y, *_ in obs[: t + 1]], fill=_BLUE, width=size // 150, joint="curve")
    draw.ellipse(disc(at(*obs[t][:2]), scale * RADIUS), fill=_VERMILION)


def _draw_traces(canvas, obs, actions, t):
    """Observations (above, each scaled to its range in the episode) and actions (below) until now."""
    draw, size = ImageDraw.Draw(canvas), canvas.width
    margin, split = 0.05 * size, 0.62 * size
    flat = obs.reshape(len(obs), -1)
    low, high = flat.min(axis=0), flat.max(axis=0)
    panels = (
        ("observations", (flat - low) / np.maximum(high - low, 1e-6), margin * 2, split),
        ("actions", (np.clip(actions, -1, 1) + 1) / 2, split + margin * 2, size - margin),
    )
    x = np.linspace(margin, size - margin, max(len(obs), 2))
    for title, values, top, bottom in panels:
        draw.rectangle([margin, top, size - margin, bottom], outline=_FAINT, width=size // 200)
        draw.text((margin, top - margin * 0.9), title, fill=_INK, font=ImageFont.load_default(size // 26))
        draw.line([(x[t], top), (x[t], bottom)], fill=_FAINT, width=size // 200)
        for i, column in enumerate(values[: t + 1].T):
            y = bottom - (0.05 + 0.9 * column) * (bottom - top)
            draw.line(list(zip(x, y)), fill=_COLORS[i % len(_COLORS)], width=size // 150)


@eqx.filter_jit
def _bandit_facts(policy, env, keys):
    """One action per key, their rewards, and exp(Q*) on a grid of the box, its first row at the top."""
    actions = jax.vmap(lambda key: policy(jnp.zeros(env.obs_shape), key))(keys)
    actions = jnp.clip(actions, -1, 1)
    points = jnp.linspace(-1, 1, 201)
    grid = jnp.stack(jnp.meshgrid(points, -points), axis=-1)
    reward = jax.vmap(env.log_density)
    return actions, reward(actions), jnp.exp(jax.vmap(reward)(grid))


def _bandit_shots(policy, env, num_actions, key, size):
    """The optimal policy's density (on a square-root scale), and 20 more of the policy's actions in each shot."""
    facts = _bandit_facts(policy, env, jr.split(key, num_actions))
    actions, rewards, density = map(np.asarray, facts)
    shade = 0.75 * np.sqrt(density / density.max())[..., None]
    background = Image.fromarray(((1 - shade) * np.array(_PAPER) + shade * np.array(_BLUE)).astype(np.uint8))
    background = background.resize((size * _OVERSAMPLING,) * 2, Image.Resampling.BICUBIC)

    def draw(canvas, n):
        canvas.paste(background)
        pen, radius = ImageDraw.Draw(canvas), canvas.width / 160
        for x, y in (canvas.width - 1) * (1 + actions[:n] * [1, -1]) / 2:
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=_VERMILION)

    for n in range(20, num_actions + 20, 20):
        n = min(n, num_actions)
        mean = float(rewards[:n].mean())
        yield _Shot(_drawn(size, draw, n), f"{n} actions   mean reward {mean:.2f}", 0, mean)


# --- Environments on the host ---


def _host_shots(policy, env, num_episodes, key, size, every):
    _choose_egl()
    policy = eqx.filter_jit(policy)
    seed_key, act_key = jr.split(key)
    envs = env.make(1, int(jr.randint(seed_key, (), 0, 2**31 - 1)), render=True)
    try:
        obs = envs.reset()
        for episode in range(num_episodes):
            total, picture = 0.0, None
            for t in range(env.max_steps):
                if picture is None or t % every == 0:
                    picture = Image.fromarray(_rendered(envs)).resize((size, size), Image.Resampling.LANCZOS)
                action = policy(jnp.asarray(obs[0]), jr.fold_in(jr.fold_in(act_key, episode), t))
                obs, timestep = envs.step(np.asarray(action)[None])
                total += float(timestep.reward[0])
                done = timestep.terminated[0] or timestep.truncated[0]
                if t % every == 0 or done:
                    yield _Shot(picture, f"step {t + 1}   return {total:.1f}", episode, total)
                if done:
                    break
    finally:
        envs.close()


def _rendered(envs):
    """The only environment's picture."""
    with _advice(envs.gymnasium_id):
        return envs.render()[0]


def _choose_egl():
    """Without a display MuJoCo draws through EGL, which has to be said before it is imported."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")


@contextmanager
def _advice(name: str):
    """Whatever the graphics stack raises becomes advice."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"{name} cannot be drawn here ({type(error).__name__}: {error}). Without a display "
            "MuJoCo draws through EGL (MUJOCO_GL=egl), which is a system library: apt-get install libegl1 "
            "(Debian, Ubuntu) or dnf install mesa-libEGL (Fedora); with one, MUJOCO_GL=glfw. Gymnasium's other "
            'tasks may need: pip install "gymnasium[classic-control]".'
        ) from error


# --- Frames and files ---


def _drawn(size: int, paint: Callable[..., None], *args: Any) -> Image.Image:
    """What `paint(canvas, *args)` draws, scaled down to `size`."""
    side = size * _OVERSAMPLING
    canvas = Image.new("RGB", (side, side), _PAPER)
    paint(canvas, *args)
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def _captioned(picture: Image.Image, title: str, caption: str) -> Image.Image:
    """The picture above two lines of text."""
    line = picture.width // 32 * 2
    frame = Image.new("RGB", (picture.width, picture.height + 2 * line + line // 2), _PAPER)
    frame.paste(picture)
    draw, font = ImageDraw.Draw(frame), ImageFont.load_default(int(0.72 * line))
    for row, (text, color) in enumerate([(title, _GREY), (caption, _INK)]):
        draw.text((line // 2, picture.height + line * row + line // 4), text, fill=color, font=font)
    return frame


def _write_gif(path: Path, frames: list[Image.Image], fps: float) -> None:
    # One palette for all frames, or colours flicker; from first, middle and last, which show all there is.
    strip = Image.new("RGB", (frames[0].width * 3, frames[0].height))
    for i, frame in enumerate((frames[0], frames[len(frames) // 2], frames[-1])):
        strip.paste(frame, (i * frame.width, 0))
    palette = strip.quantize(128)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def _write_mp4(path: Path, frames: list[Image.Image], fps: float) -> None:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError("MP4 needs an encoder: pip install imageio-ffmpeg. GIF needs nothing.") from error
    writer = imageio_ffmpeg.write_frames(str(path), frames[0].size, fps=fps, macro_block_size=2)  # pyright: ignore[reportArgumentType]  # a fraction does
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"os\.fork")  # harmless: the child becomes ffmpeg at once
        writer.send(None)
        for frame in frames:
            writer.send(np.asarray(frame))
        writer.close()


_WRITERS = {".gif": _write_gif, ".mp4": _write_mp4}
