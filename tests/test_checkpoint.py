"""Checkpoints: what is written comes back to the last bit, what is broken is told apart."""

import errno
import json
import resource

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen import checkpoint
from eqgen.checkpoint import CheckpointError, DamagedCheckpointError
from helpers import assert_trees_close


def make_tree(offset=0):
    """Every kind of leaf that a state may have."""
    return {
        "network": eqx.nn.MLP(2, 2, 4, 1, key=jr.key(offset)),
        "bool": jnp.array([True, False]) ^ bool(offset),
        "half": jnp.arange(3, dtype=jnp.bfloat16) + offset,
        "empty": jnp.zeros((0, 3)),
        "step": jnp.int32(7 + offset),
        "host": {
            "words": np.array([2**64 - 1 - offset, 3], np.uint64),
            "position": np.full((2, 3), 0.1 + offset),
        },
        "scalar": np.float64(0.5 + offset),
        "python": (3 + offset, 2.5 + offset, bool(offset), 1j + offset),
        "name": "not written",
        "none": None,
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "step_0000000001.eqx"
    checkpoint.save(path, make_tree(), {"env_step": 1, "note": "ä", "x": [0.1, None]})
    return path


def test_round_trip_is_exact(path):
    tree, metadata = checkpoint.load(path, make_tree(1))
    assert_trees_close(tree, make_tree(), rtol=0, atol=0)
    assert jax.tree.map(type, tree) == jax.tree.map(type, make_tree())
    assert metadata == checkpoint.read_metadata(path) == {"env_step": 1, "note": "ä", "x": [0.1, None]}


def test_shapes_are_enough_to_read(path):
    like = eqx.filter_eval_shape(lambda: make_tree()["network"])
    checkpoint.save(path, make_tree()["network"], {})
    network, _ = checkpoint.load(path, like)
    assert_trees_close(network, make_tree()["network"], rtol=0, atol=0)


def test_same_tree_gives_the_same_bytes(path, tmp_path):
    again = tmp_path / "again.eqx"
    checkpoint.save(again, *checkpoint.load(path, make_tree(1)))
    assert again.read_bytes() == path.read_bytes()


def test_first_line_is_json_and_tells_the_shapes(path):
    header = json.loads(path.read_bytes().split(b"\n")[0])
    leaves = {path: (shape, dtype) for path, shape, dtype in header["content"]["leaves"]}
    assert leaves["['host']['words']"] == ([2], "uint64")
    assert leaves["['network'].layers[0].weight"] == ([4, 2], "float32")
    assert not any("name" in path for path in leaves)


def test_every_altered_byte_is_noticed(path):
    """One bit in any of a hundred places: never a wrong tree, always the right error."""
    good = path.read_bytes()
    for position in np.linspace(0, len(good) - 1, 100).astype(int):
        bad = bytearray(good)
        bad[position] ^= 1
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            checkpoint.load(path, make_tree())
    path.write_bytes(good)
    checkpoint.load(path, make_tree())


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_truncated_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedCheckpointError, match="truncated|first line is broken"):
        checkpoint.load(path, make_tree())


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04\x95", b"{}\n", b"[1]\n", b'{"format": "other", "version": 1}\n']
)
def test_foreign_file(path, content):
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="not a checkpoint"):
        checkpoint.read_metadata(path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="No such file") as info:
        checkpoint.load(tmp_path / "none.eqx", 0)
    assert not isinstance(info.value, DamagedCheckpointError)


def test_newer_format(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 0)
    with pytest.raises(CheckpointError, match="format 1.*newer eqgen") as info:
        checkpoint.load(path, make_tree())
    assert not isinstance(info.value, DamagedCheckpointError)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t | {"step": jnp.zeros((2,), jnp.int32)},
            r"\['step'\] should be int32\(2,\) and is int32\(\)",
        ),
        (lambda t: t | {"step": jnp.float32(0)}, r"\['step'\] should be float32\(\) and is int32\(\)"),
        (
            lambda t: t | {"python": (3.0, 2.5, False, 1j)},
            r"\['python'\]\[0\] should be float\(\) and is int\(\)",
        ),
        (lambda t: t | {"a": jnp.zeros(())}, r"where \['a'\] is expected it holds \['bool'\]"),
        (lambda t: t | {"zzz": jnp.zeros(())}, r"leaves expected"),
    ],
)
def test_wrong_leaves_are_named(path, change, message):
    with pytest.raises(CheckpointError, match=message) as info:
        checkpoint.load(path, change(make_tree()))
    assert not isinstance(info.value, DamagedCheckpointError)


@pytest.mark.parametrize(
    "leaf, message",
    [(jr.key(0), r"\['x'\] is a typed PRNG key"), (np.array([{}]), r"\['x'\] is an array of Python objects")],
)
def test_leaves_without_portable_form_are_refused(path, leaf, message):
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(path, {"x": leaf}, {})
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path, {"x": leaf})
    assert path.read_bytes() == before


def test_full_disk_keeps_the_previous_file(path, monkeypatch):
    before = path.read_bytes()
    write = checkpoint._HashedWriter.write

    def full(self, data):
        if self.size + len(data) > 500:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(checkpoint._HashedWriter, "write", full)
    with pytest.raises(CheckpointError, match="No space left on device.*untouched"):
        checkpoint.save(path, make_tree(1), {})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_file_size_limit_keeps_the_previous_file(path):
    """The operating system itself refuses to write on."""
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="Could not write"):
            checkpoint.save(path, jnp.zeros(10**6), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_interrupted_save_leaves_nothing_behind(path, monkeypatch):
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(eqx, "tree_serialise_leaves", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, make_tree(), {})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
