"""Files of D4RL, Minari and OGBench: what is written is read back (T20), and bad ones are refused by name."""

import io
import json
import os
import pickle
import zipfile

import h5py
import numpy as np
import pytest

from eqgen.data import d4rl, formats, minari, ogbench
from eqgen.data.episodes import DataError, transitions
from eqgen.data.reference import D4RL, Scale


N, OBS, ACT = 12, 3, 2


def flat(n=N, seed=0):
    """The arrays of a file of D4RL's, with an end in row 4 and a time limit in row 9."""
    rng = np.random.default_rng(seed)
    arrays = {
        "observations": rng.normal(size=(n, OBS)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, ACT)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.zeros(n, bool),
    }
    arrays["terminals"][4] = arrays["timeouts"][9] = True
    return arrays


def write_hdf5(path, arrays, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value, **(options if np.ndim(value) else {}))
    return path


def write_minari(folder, episodes, **about):
    """`episodes`: dicts of observations (or a dict of them), actions, rewards, terminations, truncations."""
    steps = sum(len(e["rewards"]) for e in episodes)
    metadata = {
        "data_format": "hdf5",
        "total_episodes": len(episodes),
        "total_steps": steps,
        "dataset_id": "x/y-v0",
    }
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "metadata.json").write_text(json.dumps(metadata | about))
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for number, episode in enumerate(episodes):
            group = file.create_group(f"episode_{number}")
            for key, value in episode.items():
                nested = value if isinstance(value, dict) else {"": value}
                for inner, array in nested.items():
                    group.create_dataset(f"{key}/{inner}".rstrip("/"), data=array)
    return folder


def minari_episode(steps, seed=0, terminated=True):
    rng = np.random.default_rng(seed)
    last = np.arange(steps) == steps - 1
    return {
        "observations": rng.normal(size=(steps + 1, OBS)),
        "actions": rng.uniform(-1, 1, (steps, ACT)).astype(np.float32),
        "rewards": rng.normal(size=steps),
        "terminations": last & terminated,
        "truncations": last & (not terminated),
    }


def ogbench_arrays(lengths=(4, 3), seed=0):
    """States per episode, the last of each marked as terminal."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    last = np.zeros(n, np.float32)
    last[np.cumsum(lengths) - 1] = 1
    return {
        "observations": rng.normal(size=(n, OBS)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, ACT)).astype(np.float32),
        "terminals": last,
        "qpos": rng.normal(size=(n, 2)).astype(np.float32),
    }


def write_npz(path, arrays):
    np.savez_compressed(path, **arrays)
    return path


# --- D4RL ---


@pytest.mark.parametrize("packing", [{}, {"compression": "gzip", "chunks": True}])
def test_flat_files_are_read_as_they_are(tmp_path, packing):
    arrays = flat()
    arrays["rewards"] = arrays["rewards"][:, None]  # some files have a column
    arrays["terminals"] = arrays["terminals"].astype(np.float32)
    episodes = d4rl.load(write_hdf5(tmp_path / "hopper_medium-v2.hdf5", arrays, **packing))
    np.testing.assert_array_equal(episodes.observations, arrays["observations"])
    np.testing.assert_array_equal(episodes.rewards, arrays["rewards"][:, 0])
    assert episodes.starts.tolist() == episodes.streams.tolist() == [0, 5, 10, 12]
    assert np.flatnonzero(episodes.terminated).tolist() == [4] and np.flatnonzero(
        episodes.truncated
    ).tolist() == [9]
    np.testing.assert_allclose(episodes.returns()[0], arrays["rewards"][:5].sum(dtype=float))
    assert episodes.name == "hopper-medium-v2" and episodes.scale is D4RL["hopper-medium-v2"]


def test_missing_timeouts_come_from_the_step_limit(tmp_path):
    arrays = flat()
    del arrays["timeouts"]
    path = write_hdf5(tmp_path / "some.hdf5", arrays)
    assert d4rl.load(path, step_limit=3).starts.tolist() == [0, 3, 5, 8, 11, 12]
    arrays = {key: np.repeat(value, 100, axis=0) for key, value in arrays.items()}
    arrays["terminals"][:] = False
    kitchen = d4rl.load(write_hdf5(tmp_path / "kitchen-mixed-v0.hdf5", arrays))
    assert set(kitchen.lengths.tolist()) == {280, 1200 % 280}


def test_missing_timeouts_come_from_next_observations_first(tmp_path):
    arrays = flat()
    del arrays["timeouts"]
    arrays["next_observations"] = np.concatenate([arrays["observations"][1:], np.ones((1, OBS), np.float32)])
    arrays["next_observations"][[4, 7]] += 1
    episodes = d4rl.load(write_hdf5(tmp_path / "some.hdf5", arrays))
    assert episodes.starts.tolist() == [0, 5, 8, 12]
    np.testing.assert_array_equal(episodes.final_observations, arrays["next_observations"][[4, 7, 11]])
    taken = transitions(episodes).take(np.arange(N))
    np.testing.assert_array_equal(taken.next_obs, arrays["next_observations"])


def test_maze2d_is_one_stream_whose_terminals_are_changes_of_target(tmp_path):
    arrays = flat()
    del arrays["timeouts"]
    episodes = d4rl.load(write_hdf5(tmp_path / "maze2d-umaze-sparse-v1.hdf5", arrays))
    assert episodes.name == "maze2d-umaze-v1" and episodes.scale.high == 161.86
    assert episodes.streams.tolist() == [0, N] and episodes.starts.tolist() == [0, 5, N]
    assert not episodes.terminated.any() and episodes.truncated[4]


def test_antmaze_streams_go_on_after_success(tmp_path):
    name = "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5"
    episodes = d4rl.load(write_hdf5(tmp_path / name, flat()))
    assert episodes.name == "antmaze-medium-play-v2"
    assert episodes.streams.tolist() == [0, 10, 12] and episodes.starts.tolist() == [0, 5, 10, 12]


@pytest.mark.parametrize("final", [False, True])
def test_own_files_come_back_bit_for_bit(tmp_path, final):
    arrays = flat()
    if final:
        arrays["next_observations"] = np.concatenate(
            [arrays["observations"][1:], np.ones((1, OBS), np.float32)]
        )
    first = d4rl.load(write_hdf5(tmp_path / "a.hdf5", arrays))
    scale = Scale("eqgen/set", 1.0, 2.0, "eqgen", "a test")
    first = d4rl.from_flat(
        first.observations,
        first.actions,
        first.rewards,
        first.terminated,
        first.truncated,
        final_observations=first.final_observations,
        name="eqgen/set",
        scale=scale,
    )
    d4rl.save(tmp_path / "own.hdf5", first, settings={"seed": 3}, infos={"goal": arrays["actions"]})
    for memory_map in (False, True):
        second = d4rl.load(tmp_path / "own.hdf5", memory_map=memory_map)
        assert isinstance(second.observations, np.memmap) == memory_map
        assert second.name == "eqgen/set" and second.scale == scale
        for field in ("observations", "actions", "rewards", "terminated", "truncated", "starts", "streams"):
            np.testing.assert_array_equal(getattr(second, field), getattr(first, field))
        assert (second.final_observations is None) == (not final)
    own = d4rl.provenance_of(tmp_path / "own.hdf5")
    assert own["settings"] == {"seed": 3} and own["provenance"]["eqgen"]


def test_packed_files_are_not_memory_mapped(tmp_path):
    path = write_hdf5(tmp_path / "hopper-medium-v2.hdf5", flat(), compression="gzip")
    with pytest.raises(DataError, match="packed or in pieces and cannot be memory-mapped"):
        d4rl.load(path, memory_map=True)


# --- Minari ---


def test_minari_episodes_keep_their_last_observation(tmp_path):
    made = [
        minari_episode(n, seed=n, terminated=n != 4) for n in range(1, 13)
    ]  # more than ten: numeric order
    episodes = minari.load(write_minari(tmp_path / "y-v0", made, ref_min_score=1, ref_max_score=3.0))
    assert episodes.lengths.tolist() == list(range(1, 13)) and episodes.name == "x/y-v0"
    assert episodes.scale.score(2) == 50
    taken = transitions(episodes).take(np.arange(len(episodes)))
    for field, key in (("obs", slice(0, -1)), ("next_obs", slice(1, None))):
        expected = np.concatenate([e["observations"][key] for e in made])
        np.testing.assert_allclose(getattr(taken, field), expected, rtol=1e-6)
    assert (~taken.terminated).sum() - (len(episodes) - 12) == 1 and taken.truncated.sum() == 1


def test_minari_dictionaries_are_laid_side_by_side(tmp_path):
    episode = minari_episode(4)
    states = episode["observations"]
    nested = {"desired_goal": states[:, :2] + 9, "observation": states, "achieved_goal": states[:, :2]}
    path = write_minari(tmp_path / "z", [episode | {"observations": nested}])
    np.testing.assert_allclose(
        minari.load(path).observations, np.concatenate([states[:-1, :2], states[:-1]], axis=1), rtol=1e-6
    )
    chosen = minari.load(path, keys=["observation", "desired_goal"])
    np.testing.assert_allclose(chosen.observations[:, OBS:], states[:-1, :2] + 9, rtol=1e-6)


def test_minari_arrow_is_read_where_pyarrow_is(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    made = [minari_episode(n, seed=n) for n in (3, 5)]
    hdf5 = minari.load(write_minari(tmp_path / "h", made))
    folder = tmp_path / "a" / "data"
    for number, episode in enumerate(made):
        (folder / str(number)).mkdir(parents=True)
        vectors = {
            "observations": episode["observations"],
            "actions": np.pad(episode["actions"], ((0, 1), (0, 0))),
        }
        columns = {
            key: pyarrow.FixedSizeListArray.from_arrays(value.reshape(-1), value.shape[1])
            for key, value in vectors.items()
        }
        columns |= {key: np.pad(episode[key], (0, 1)) for key in ("rewards", "terminations", "truncations")}
        table = pyarrow.table(columns)
        with pyarrow.OSFile(str(folder / str(number) / "part-0.arrow"), "wb") as sink:
            with pyarrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    about = {"data_format": "arrow", "total_episodes": 2, "total_steps": 8, "dataset_id": "x/y-v0"}
    (folder / "metadata.json").write_text(json.dumps(about))
    arrow = minari.load(tmp_path / "a")
    for field in (
        "observations",
        "actions",
        "rewards",
        "terminated",
        "truncated",
        "streams",
        "final_observations",
    ):
        np.testing.assert_allclose(getattr(arrow, field), getattr(hdf5, field), rtol=1e-6)


def test_minari_arrow_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path = write_minari(tmp_path / "a", [minari_episode(3)], data_format="arrow")
    with pytest.raises(DataError, match="pip install 'pyarrow>=15'"):
        minari.load(path)


# --- OGBench ---


def test_ogbench_last_states_are_no_steps(tmp_path):
    arrays = ogbench_arrays((4, 3))
    episodes = ogbench.load(write_npz(tmp_path / "pointmaze-medium-navigate-v0.npz", arrays))
    kept = [0, 1, 2, 4, 5]
    np.testing.assert_array_equal(episodes.observations, arrays["observations"][kept])
    np.testing.assert_array_equal(episodes.actions, arrays["actions"][kept])
    assert episodes.streams.tolist() == [0, 3, 5] and np.flatnonzero(episodes.truncated).tolist() == [2, 4]
    np.testing.assert_array_equal(episodes.final_observations, arrays["observations"][[3, 6]])
    assert episodes.rewards is None
    with pytest.raises(DataError, match="has no rewards"):
        transitions(episodes).take(np.arange(5))


def test_ogbench_rewards_are_those_of_a_goal(tmp_path):
    arrays = ogbench_arrays((4, 3))
    arrays["qpos"][[1, 6]] = [2.0, 3.0]
    path = write_npz(tmp_path / "a.npz", arrays)
    episodes = ogbench.load(path, goal=(2.0, 3.5), tolerance=0.5)
    assert episodes.rewards.tolist() == [-1, 0, -1, -1, -1]
    assert np.flatnonzero(episodes.terminated).tolist() == [1]
    with pytest.raises(ValueError, match="belong together"):
        ogbench.load(path, goal=(2.0, 3.5))


# --- Files from strangers ---


class Payload:
    """What a pickle of it does when it is loaded: makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def changed(**changes):
    """A file of D4RL's with some arrays replaced (None: left out)."""

    def make(folder):
        arrays = flat() | {
            key: change(flat()[key]) if callable(change) else change for key, change in changes.items()
        }
        return write_hdf5(
            folder / "hopper-medium-v2.hdf5", {k: v for k, v in arrays.items() if v is not None}
        )

    return make


def hdf5_with(edit):
    def make(folder):
        path = write_hdf5(folder / "hopper-medium-v2.hdf5", flat())
        with h5py.File(path, "a") as file:
            edit(file, folder)
        return path

    return make


def raw(name, content):
    def make(folder):
        (folder / name).write_bytes(content(folder) if callable(content) else content)
        return folder / name

    return make


def put(array, row, value):
    array[row] = value
    return array


def cut(folder):
    path = write_hdf5(folder / "whole.hdf5", flat(5000))
    return path.read_bytes()[:-20_000]


def external_link(file, folder):
    write_hdf5(folder / "secret.hdf5", flat())
    del file["observations"]
    file["observations"] = h5py.ExternalLink(str(folder / "secret.hdf5"), "observations")


def external_storage(file, folder):
    (folder / "secret.bin").write_bytes(b"x" * N * OBS * 4)
    del file["observations"]
    file.create_dataset(
        "observations", (N, OBS), "f4", external=[(str(folder / "secret.bin"), 0, N * OBS * 4)]
    )


def virtual(file, folder):
    write_hdf5(folder / "secret.hdf5", flat())
    layout = h5py.VirtualLayout((N, OBS), "f4")
    layout[:] = h5py.VirtualSource(folder / "secret.hdf5", "observations", (N, OBS))
    del file["observations"]
    file.create_virtual_dataset("observations", layout)


def huge(file, folder):
    del file["observations"]
    file.create_dataset("observations", (2**40, OBS), "f4", chunks=(1024, OBS))


def endless(file, folder):
    own_attribute()(file, folder)
    file.create_group("infos")["infos"] = file["/"]


def own_attribute(**changes):
    def edit(file, folder):
        whole = {"format": 1, "name": "eqgen/x", "resets": "ends", "sha256": "0"}
        whole |= {"settings": {}, "provenance": {}} | changes
        file.attrs["eqgen"] = json.dumps(whole)

    return edit


def npz(**changes):
    def make(folder):
        arrays = ogbench_arrays() | {
            k: c(ogbench_arrays()[k]) if callable(c) else c for k, c in changes.items()
        }
        return write_npz(folder / "a.npz", {k: v for k, v in arrays.items() if v is not None})

    return make


def pickled_npz(folder):
    arrays = ogbench_arrays() | {"actions": np.array([Payload(folder / "executed")], object)}
    return write_npz(folder / "a.npz", arrays)


def npz_with_a_header_of_code(folder):
    path = write_npz(folder / "whole.npz", ogbench_arrays())
    header = f"__import__('os').mkdir({str(folder / 'executed')!r})".encode().ljust(117) + b"\n"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(folder / "a.npz", "w") as file:
        for name in whole.namelist():
            content = whole.read(name)
            if name == "observations.npy":
                content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content[128:]
            file.writestr(name, content)
    return folder / "a.npz"


def minari_with(edit=None, episode=None, **about):
    def make(folder):
        episodes = [minari_episode(3), minari_episode(4) | (episode or {})]
        path = write_minari(folder / "y-v0", episodes, **about)
        if edit:
            edit(path / "data")
        return path

    return make


def drop_episode(folder):
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        del file["episode_1"]


def single_array(folder):
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


pickled = lambda folder: pickle.dumps(Payload(folder / "executed"))
MALFORMED = {
    # HDF5 as such
    "missing": (lambda folder: folder / "none.hdf5", "No such file"),
    "empty": (raw("a.hdf5", b""), "no HDF5 file"),
    "text": (raw("a.hdf5", b"<html>404 Not Found</html>"), "no HDF5 file"),
    "pickle named hdf5": (raw("a.hdf5", pickled), "no HDF5 file"),
    "cut off": (raw("hopper-medium-v2.hdf5", cut), "is damaged"),
    "link to another file": (hdf5_with(external_link), "observations is a link to elsewhere"),
    "storage in another file": (hdf5_with(external_storage), "observations lies in other files"),
    "virtual dataset": (hdf5_with(virtual), "observations lies in other files"),
    "more than it holds": (hdf5_with(huge), "observations claims 13194139533312 bytes and holds 0"),
    # D4RL's layout
    "no observations": (changed(observations=None), "there is no observations. It has: actions, rewards"),
    "no actions": (changed(actions=None), "there is no actions"),
    "no terminals": (changed(terminals=None), "there is no terminals"),
    "fewer actions": (changed(actions=lambda x: x[:-1]), "actions has 11 rows and observations has 12"),
    "fewer terminals": (changed(terminals=lambda x: x[:-2]), r"terminals has shape \(10,\)"),
    "fewer timeouts": (changed(timeouts=lambda x: x[:-2]), r"timeouts has shape \(10,\)"),
    "no rows": (changed(**{key: lambda x: x[:0] for key in flat()}), "observations has no rows"),
    "one number": (changed(observations=np.float32(1)), r"observations holds float32 of shape \(\)"),
    "numbers for rows": (changed(observations=np.zeros(N)), r"observations has shape \(12,\)"),
    "images": (changed(observations=np.zeros((N, 2, 2))), r"observations has shape \(12, 2, 2\)"),
    "two rewards": (changed(rewards=np.zeros((N, 2))), r"rewards has shape \(12, 2\)"),
    "NaN": (changed(observations=lambda x: put(x, 7, np.nan)), r"observations is \[nan nan nan\] in row 7"),
    "infinite action": (changed(actions=lambda x: put(x, 3, np.inf)), r"actions is \[inf inf\] in row 3"),
    "too large for float32": (
        changed(rewards=lambda x: put(x.astype(float), 2, 1e300)),
        "rewards is inf in row 2",
    ),
    "strings": (changed(actions=np.array([b"a"] * N)), "actions holds .*, not rows of numbers"),
    "half a flag": (changed(terminals=lambda x: put(x.astype(float), 5, 0.5)), "terminals is 0.5 in row 5"),
    "next of another shape": (changed(next_observations=np.zeros((N, 2))), "next_observations has shape"),
    "a group": (
        hdf5_with(lambda f, _: (f.pop("actions"), f.create_group("actions"))),
        "actions is no array but a group",
    ),
    "streams out of order": (
        changed(**{"metadata/stream_starts": np.array([0, 9, 3])}),
        "stream_starts do not ascend",
    ),
    # eqgen's own attribute
    "attribute not JSON": (
        hdf5_with(lambda f, _: f.attrs.update(eqgen="{")),
        "the attribute eqgen is not JSON",
    ),
    "attribute of the future": (hdf5_with(own_attribute(format=2)), "not of format 1"),
    "attribute of another kind": (hdf5_with(own_attribute(resets="daily")), "has no valid resets"),
    "attribute without provenance": (
        hdf5_with(own_attribute(settings=[], provenance=None)),
        "has no valid settings, provenance",
    ),
    "scale upside down": (
        hdf5_with(own_attribute(scale={"name": "x", "low": 2, "high": 1, "origin": "eqgen", "source": ""})),
        "the scale in the attribute eqgen cannot be used",
    ),
    "altered after it was made": (hdf5_with(own_attribute()), "the checksum differs"),
    "groups without end": (hdf5_with(endless), "nested too deeply, or contains itself"),
    # OGBench
    "npz that is text": (raw("a.npz", b"not a zip"), "Python objects are never loaded|is no npz"),
    "npz that is a pickle": (raw("a.npz", pickled), "Python objects are never loaded"),
    "npz with a pickle": (pickled_npz, "Python objects are never loaded"),
    "npz with code in a header": (npz_with_a_header_of_code, "cannot be read"),
    "npz cut off": (raw("a.npz", lambda f: npz()(f).read_bytes()[:300]), "cannot be read"),
    "npy named npz": (raw("a.npz", single_array), "one array and no npz"),
    "npz without terminals": (npz(terminals=None), "there is no terminals. It has: observations"),
    "npz cut in rows": (npz(terminals=lambda x: put(x, -1, 0)), "last row is not the last state"),
    "npz of unequal rows": (npz(actions=lambda x: x[:-1]), r"actions has shape \(6, 2\) for 7 observations"),
    "npz with an episode of one state": (npz(terminals=lambda x: put(x, 0, 1)), "an episode has one state"),
    "npz with NaN": (npz(observations=lambda x: put(x, 0, np.nan)), "observations is .*nan.* in row 0"),
    # Minari
    "no metadata": (minari_with(lambda d: (d / "metadata.json").unlink()), "folder of a Minari dataset"),
    "metadata not JSON": (minari_with(lambda d: (d / "metadata.json").write_text("{'a'")), "is not JSON"),
    "metadata a pickle": (
        minari_with(lambda d: (d / "metadata.json").write_bytes(pickled(d.parent.parent))),
        "is not JSON",
    ),
    "metadata a list": (
        minari_with(lambda d: (d / "metadata.json").write_text("[]")),
        "holds no object but list",
    ),
    "unknown format": (minari_with(data_format="zarr"), "data_format is 'zarr'"),
    "steps in words": (minari_with(total_steps="many"), "total_steps is 'many'"),
    "more steps than there are": (
        minari_with(total_steps=10**15),
        "have 7 steps and metadata.json says 10{15}",
    ),
    "episode missing": (minari_with(drop_episode), "has 1 episodes and metadata.json says 2"),
    "last observation missing": (
        minari_with(episode={"observations": np.zeros((4, OBS))}),
        "episode 1 has 4 observations and 4 rewards",
    ),
    "ends and goes on": (
        minari_with(episode={"terminations": np.array([0, 1, 0, 0], bool)}),
        "episode 1 ends at step 1 and goes on",
    ),
    "other width": (
        minari_with(episode={"observations": np.zeros((5, 2))}),
        "episode 1 has observations of shape",
    ),
    "dictionary of strangers": (
        minari_with(episode={"observations": {"image": np.zeros((5, 2))}}),
        "dictionary of image",
    ),
    # Neither
    "unknown suffix": (raw("a.pkl", pickled), "neither .hdf5"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_by_name(case, tmp_path, monkeypatch):
    make, message = MALFORMED[case]
    path = make(tmp_path)

    def unpickle(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, unpickle)
    with pytest.raises(DataError, match=message) as info:
        formats.summary(path)
    assert str(tmp_path) in str(info.value) and "\n" not in str(info.value)
    assert not (tmp_path / "executed").exists()


def test_a_payload_would_have_been_seen(tmp_path):
    pickle.loads(pickled(tmp_path))
    assert (tmp_path / "executed").exists()


def test_missing_timeouts_without_a_limit_are_refused(tmp_path):
    path = write_hdf5(tmp_path / "unknown.hdf5", {k: v for k, v in flat().items() if k != "timeouts"})
    with pytest.raises(DataError, match=r"there are no timeouts.*load\(path, step_limit=1000\)"):
        d4rl.load(path)


def test_summary_tells_what_a_file_holds(tmp_path):
    arrays = flat()
    about = formats.summary(write_hdf5(tmp_path / "hopper-medium-v2.hdf5", arrays))
    assert (
        about["episodes"] == "3, of 2 to 5 steps, mean 4.0" and about["ends"] == "1 terminated, 1 truncated"
    )
    assert about["rewards"].startswith(f"sum {arrays['rewards'].sum(dtype=float):.6g}")
    assert "D4RL" in about["score"] and about["observations"].startswith("3: [")
    assert formats.load(write_npz(tmp_path / "a.npz", ogbench_arrays()))[0] == "OGBench npz"
    assert formats.load(write_minari(tmp_path / "m", [minari_episode(3)]))[0] == "Minari"
    with pytest.raises(DataError, match="two levels up"):
        formats.load(tmp_path / "m" / "data" / "main_data.hdf5")
