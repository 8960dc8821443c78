"""Clips: what is drawn is what happened, files are whole and of the stated size, failures name the remedy."""

import functools
import sys

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from PIL import Image

from eqgen import rendering
from eqgen.envs.catalog import make
from eqgen.envs.host import HostVectorEnv
from eqgen.envs.maze import Maze2D
from eqgen.envs.probes import PROBES
from eqgen.envs.toys import TOYS
from eqgen.rendering import render_policy


def still(obs, key):
    return jnp.zeros(1)


def clip_of(path):
    """The frames of a GIF as arrays, and the milliseconds each is shown."""
    with Image.open(path) as image:
        frames = []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
        return frames, image.info["duration"]


def test_a_gif_shows_one_frame_per_step_above_its_caption(tmp_path, getkey):
    path = tmp_path / "new" / "clip.gif"
    returns = render_policy(still, PROBES["delayed"](), path=path, key=getkey(), num_episodes=3, size=64)
    assert returns == [1.0, 1.0, 1.0]
    frames, duration = clip_of(path)
    assert len(frames) == 6 and duration == 50
    assert frames[0].shape == (64 + 10, 64, 3)
    assert [file.name for file in path.parent.iterdir()] == ["clip.gif"]


def test_a_clip_ends_with_its_last_frame(tmp_path, getkey):
    env = PROBES["truncation"]()  # five steps of reward 1
    returns = render_policy(still, env, path=tmp_path / "clip.gif", key=getkey(), max_frames=3, size=64)
    assert returns == [3.0]
    assert len(clip_of(tmp_path / "clip.gif")[0]) == 3


@pytest.mark.parametrize("angle", [0.0, np.pi / 2, np.pi, -np.pi / 2, 0.7])
@pytest.mark.parametrize("torque", [0.0, 1.0, -0.5])
def test_the_pendulum_stands_where_it_is(angle, torque):
    """Angle 0 is upright and angles grow counter-clockwise, as in Gymnasium; so does the torque's arrow."""
    size, obs = 100, np.array([[np.cos(angle), np.sin(angle), 0.0]])
    pixels = np.asarray(
        rendering._drawn(size, rendering._draw_pendulum, obs, np.array([[torque]]), 0)
    ).astype(int)
    tip = round(size * (0.5 - 0.38 * np.cos(angle))), round(size * (0.5 - 0.38 * np.sin(angle)))
    # Shrinking mixes a little of what lies around.
    np.testing.assert_allclose(pixels[min(tip[0], size - 1), min(tip[1], size - 1)], rendering._BLUE, atol=25)
    orange = np.abs(pixels - rendering._VERMILION).max(axis=-1) < 60
    assert orange.any() == (torque != 0)
    if torque == -0.5:  # 135 degrees clockwise from the top: to the right of the pivot
        assert np.nonzero(orange)[1].mean() > size / 2


def test_a_maze_reads_as_its_text_with_the_ball_where_it_is():
    env = Maze2D("######\n#OOOO#\n##G###\n######")
    size, obs = 120, np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.0], [1.0, 4.0, 0.0, 0.0]])
    pixels = np.asarray(
        rendering._drawn(size, functools.partial(rendering._draw_maze, env), obs, obs[:, :2], 1)
    ).astype(int)
    at = lambda x, y: pixels[
        round(20 + 20 * (x + 0.7)), round(20 * (y + 0.7))
    ]  # six columns of 20 pixels, centred
    like = lambda pixel, color: (
        np.abs(pixel - color).max() < 60
    )  # shrinking mixes a little of what lies around
    assert like(at(1, 3), rendering._VERMILION) and at(1, 2)[2] - at(1, 2)[0] > 60  # a thin blue line
    assert like(at(1, 4), rendering._PAPER)  # it gets there later
    assert like(at(2, 2), rendering._GREEN)
    for i, row in enumerate(env.layout):
        for j, cell in enumerate(row):
            assert like(at(i - 0.55, j - 0.55), rendering._GREY) == (cell == "#")


def test_a_clip_of_a_maze_shows_every_fourth_step_in_true_time(tmp_path, getkey):
    env = Maze2D("####\n#GO#\n####", max_steps=10)
    still = lambda obs, key: jnp.zeros(2)
    returns = render_policy(still, env, path=tmp_path / "clip.gif", key=getkey(), num_episodes=2, size=64)
    frames, duration = clip_of(tmp_path / "clip.gif")
    assert len(returns) == 2 and set(returns) <= {0.0, 10.0}
    assert len(frames) == 2 * 4 and duration == 40  # steps 1, 5, 9 and the last


def test_a_bandit_shows_its_density_and_the_actions(tmp_path, getkey):
    env = TOYS["mixture"]()
    near = lambda obs, key: env.mode_centres[0] + 0.03 * jr.normal(key, (2,))
    returns = render_policy(near, env, path=tmp_path / "clip.gif", key=getkey(), num_episodes=50, size=64)
    best = float(env.log_density(env.mode_centres[0]))
    assert len(returns) == 1 and best - 0.1 < returns[0] < best
    frames, _ = clip_of(tmp_path / "clip.gif")
    assert len(frames) == 3
    # (0.5, 0.5) lies in the upper right: there the actions, opposite a lighter mode, between them next to nothing.
    picture = frames[-1].astype(int)
    assert picture[16, 48, 0] > picture[16, 48, 2]
    assert picture[48, 16, 2] - picture[48, 16, 0] > 50
    assert picture[32, 32].min() > 235


@pytest.mark.filterwarnings("ignore:os.fork")
def test_an_mp4_has_the_size_and_the_frames(tmp_path, getkey):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="MP4 needs imageio-ffmpeg")
    path = tmp_path / "clip.mp4"
    render_policy(still, PROBES["delayed"](), path=path, key=getkey(), num_episodes=5, size=64)
    reader = ffmpeg.read_frames(str(path))
    assert next(reader)["size"] == (64, 74)
    assert len(list(reader)) == 10


@pytest.mark.parametrize(
    "name, every, fps",
    [
        ("mujoco/Hopper-v5", 5, 25),
        ("mujoco/HalfCheetah-v5", 1, 20),
        pytest.param("mjx/InvertedPendulum-v5", 1, 25, marks=pytest.mark.slow),
    ],
)
def test_mujoco_is_drawn_off_screen_at_true_speed(name, every, fps, tmp_path, getkey):
    env = make(name)
    policy = lambda obs, key: jr.uniform(key, (env.action_dim,), minval=-1.0, maxval=1.0)
    path = tmp_path / "clip.gif"
    try:
        render_policy(policy, env, path=path, key=getkey(), max_frames=2, size=64)
    except RuntimeError as error:
        assert "libegl1" in str(error)
        pytest.skip(f"no off-screen rendering here: {error}")
    frames, duration = clip_of(path)
    assert len(frames) == 2 and duration == 1000 / fps
    if name.startswith("mujoco/"):
        assert env.steps_per_second == every * fps
    else:
        assert env.dt * every * fps == pytest.approx(1)
    assert frames[0][:64].std() > 10 and (frames[0][:64] != frames[1][:64]).any()


def test_failures_name_the_remedy_and_leave_no_file(tmp_path, getkey, monkeypatch):
    probe, options = PROBES["delayed"](), {"key": getkey(), "size": 64}
    with pytest.raises(ValueError, match=r"clip.avi: .*\.gif or \.mp4"):
        render_policy(still, probe, path=tmp_path / "clip.avi", **options)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match="pip install imageio-ffmpeg"):
        render_policy(still, probe, path=tmp_path / "clip.mp4", **options)

    def no_graphics(self):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(HostVectorEnv, "render", no_graphics)
    with pytest.raises(RuntimeError, match=r"eglQueryString.*apt-get install libegl1"):
        render_policy(
            lambda obs, key: jnp.zeros(3), make("mujoco/Hopper-v5"), path=tmp_path / "a.gif", **options
        )
    assert not list(tmp_path.iterdir())
