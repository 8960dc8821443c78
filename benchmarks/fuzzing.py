"""Files that no reader expects, and what eqgen's readers make of them; `faults.py` runs this at length.

For each reader of `READERS` there is a good file, a way to read it as a user would, and a way to break it: bits
flipped, pieces cut out, repeated, put in from elsewhere, other types and shapes, keys missing or too many, numbers
that are not finite, sizes that are lies, names that lead out of an archive, pickles that would make a folder,
checksums that were made to match.

Reading must end in one of two ways: it is *accepted*, and what was read is of the right kind, or *refused* by one
of eqgen's own errors (or the system's, of a file that cannot be opened), which names the file. All else is a
defect: another exception, an error that does not say which file, a process that dies or does not answer, a gigabyte
of memory more, a file that had something run. So files are read in a process of their own, one after another:

    python benchmarks/fuzzing.py READER FIRST COUNT FOLDER

breaks and reads the files of these numbers and prints a line of JSON for each. File number n is always the same.
"""

import copy
import gc
import hashlib
import io
import json
import os
import pickle
import queue
import random
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60
"""After which a reader counts as hung; what takes longest is a second on a free machine."""
MEGABYTES = 1000
"""More than this at once, beyond what the process needed for the good file, counts as a memory bomb."""


class Reader(NamedTuple):
    """How a kind of file is made, broken and read; all take a folder of their own."""

    make: Callable[[Path], None]
    spoil: Callable[[Path, random.Random], str]
    """Changes what `make` made and says in a word how."""
    read: Callable[[Path], Callable[[], Any] | None]
    """Reads and checks; what it returns is called next, for errors about what a good file asks for, which need not
    name the file."""


# --- Ways to break bytes, JSON, arrays ---


class Canary:
    """What a pickle of it does when it is loaded: makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("canary",)


CANARY = pickle.dumps(Canary(), protocol=2)
FOREIGN = [b"", b"\x00", b"<html>404</html>", b"{}", b"[]", b"null", b"\n", CANARY, b"PK\x05\x06" + bytes(18)]
FOREIGN += [
    b"\x89HDF\r\n\x1a\n" + bytes(64),
    b"\x93NUMPY\x01\x00v\x00",
    b"ARROW1\x00\x00",
    b"\x1f\x8b\x08" + bytes(20),
]
LENGTHS = [
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x00" * 8,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    struct.pack("<q", 2**40),
]


def spoilt_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Something else, and in a word what was done."""
    data, size = bytearray(data), max(1, len(data))
    a, b = sorted((rng.randrange(size), rng.randrange(size)))
    b = min(b, a + rng.choice([1, 4, 64, 4096]))
    kind = rng.choice(
        ["cut", "flip", "flip", "flip", "noise", "drop", "repeat", "zero", "splice", "length", "foreign"]
    )
    match kind:
        case "cut":
            del data[a:]
        case "flip":
            for _ in range(rng.choice([1, 1, 2, 8])):
                data[rng.randrange(size) % len(data)] ^= 1 << rng.randrange(8)
        case "noise":
            data[a:b] = rng.randbytes(b - a)
        case "drop":
            del data[a:b]
        case "repeat":
            data[b:b] = data[a:b] * rng.choice([1, 2, 50])
        case "zero":
            data[a:b] = bytes(b - a)
        case "splice":
            data[a:b] = rng.choice(FOREIGN) or rng.randbytes(32)
        case "length":
            length = rng.choice(LENGTHS)
            data[a : a + len(length)] = length
        case "foreign":
            data = rng.choice(FOREIGN)
    return bytes(data), kind


ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**400,
    0.5,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
]
ODD += [
    "",
    "a",
    "../../etc/passwd",
    "/dev/zero",
    "\x00",
    "\ud800",
    "é" * 1000,
    "$\\frac$",
    "1",
    [],
    [[]],
    {},
    [0] * 50,
]
ODD += [{"class": "os.system", "fields": {"command": "mkdir canary"}}, {"class": "eqgen.algorithms.sac.SAC"}]
ODD += [{"class": "eqgen.algorithms.sac.SAC", "fields": {"hidden": "x"}}, {"a": {"a": {"a": 1}}}]
DEEP = "too deep"


def spoilt_json(value: Any, rng: random.Random) -> tuple[str, str]:
    """The text of a JSON value in which something is other than it was, and in a word what was done."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 3])):
        places = list(_places(value))
        holder, key = rng.choice(places) if places else (None, None)
        kind = rng.choice(["replace", "replace", "replace", "delete", "rename", "add", "move", "deep"])
        if holder is None:
            value, kind = rng.choice(ODD), "replace"
        elif kind == "replace":
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif kind == "delete":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[rng.choice(["x", "class", "", key + "_", key.upper()])] = holder.pop(key)
        elif kind == "add":
            extra = copy.deepcopy(rng.choice(ODD))
            holder.update({"x": extra}) if isinstance(holder, dict) else holder.append(extra)
        elif kind == "move":
            other, there = rng.choice(places)
            if there in (other if isinstance(other, dict) else range(len(other))):
                holder[key] = copy.deepcopy(other[there])
        else:
            holder[key] = DEEP
    depth = rng.choice([60, 200, 5_000, 200_000])
    return json.dumps(value).replace(f'"{DEEP}"', "[" * depth + "]" * depth), f"json {kind}"


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in list(items):
        yield value, key
        yield from _places(inside)


def odd_array(like: np.ndarray, rng: random.Random) -> np.ndarray:
    """An array of another type, shape or content."""
    seed = np.random.default_rng(rng.randrange(2**32))
    changes = [
        lambda x: x.astype(rng.choice(["f8", "f2", "i8", "u1", "?", "c8", ">f4", "S3"])),
        lambda x: x[: rng.randrange(len(x) + 1)],
        lambda x: np.concatenate([x, x[:1]]),
        lambda x: x.reshape(-1),
        lambda x: x[..., None],
        lambda x: x[:, :0] if x.ndim > 1 else x[:0],
        lambda x: x.reshape(-1)[:1].reshape(()),
        lambda x: np.where(seed.random(x.shape) < 0.1, rng.choice([np.nan, np.inf, -1, 2, 1e300]), x),
        lambda x: np.zeros((len(x), 2), [("a", "f4"), ("b", "i4")]),
        lambda x: np.zeros(x.shape, "datetime64[s]"),
        lambda x: np.zeros((3,) * 8, x.dtype),
        lambda x: seed.permutation(x),
        lambda x: np.zeros_like(x),
        lambda x: np.ones_like(x),
    ]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rng.choice(changes)(like)


def lying_npy(array: np.ndarray, rng: random.Random) -> bytes:
    """An array's file whose header says something else than what follows, or a pickle."""
    descr = rng.choice(
        ["'<f4'", "'|O'", "'<f8'", "[('a', '<f4')]", "__import__('os').mkdir('canary')", "'|V2'", "'<U9'"]
    )
    shapes = [
        "(2199023255552,)",
        "(268435456, 8)",
        "(-1,)",
        "(0,)",
        "(1e3,)",
        "()",
        f"({len(array)}, 10**9)",
        "(9,) * 9",
    ]
    order = rng.choice(["False", "True", "2"])
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {rng.choice([*shapes, str(array.shape)])}, }}"
    text = text.ljust(rng.choice([117, 181])).encode() + b"\n"
    body = rng.choice([array.tobytes(), CANARY, b""])
    return (
        b"\x93NUMPY" + bytes([rng.choice([1, 1, 1, 2, 3, 9]), 0]) + struct.pack("<H", len(text)) + text + body
    )


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def spoil_member(path: Path, rng: random.Random, change: Callable[[str, bytes], tuple[bytes, str]]) -> str:
    """Writes a zip anew in which one member, whose checksum is right, is another, or in which there are others."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    chosen = rng.choice(list(members))
    members[chosen], kind = change(chosen, members[chosen])
    extra = rng.choice([None, None, "missing", "../canary", "/canary", "twice", "bomb"])
    if extra == "missing":
        del members[chosen]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in members.items():
            new.writestr(name, content)
        if extra in ("../canary", "/canary"):
            new.writestr(extra, b"out of the archive")
        if extra == "twice":
            new.writestr(chosen, rng.randbytes(40))
        if extra == "bomb":
            with new.open(chosen, "w", force_zip64=True) as member:
                for _ in range(5):
                    member.write(bytes(2**24))
    return f"{kind}, {extra}" if extra else kind


# --- The readers ---


def _checkpoint_tree():
    import jax.numpy as jnp

    arrays = {"w": jnp.arange(15.0).reshape(5, 3), "b": jnp.ones(3, jnp.bfloat16), "n": jnp.int32(7)}
    return arrays | {"h": np.array([2**64 - 1, 3], np.uint64), "p": (3, 0.5, True)}


def _make_checkpoint(folder):
    from eqgen import checkpoint

    checkpoint.save(folder / "step_0000000010.eqx", _checkpoint_tree(), {"env_step": 10, "wall_time": 0.5})


def _spoil_checkpoint(folder, rng):
    path = folder / "step_0000000010.eqx"
    data = path.read_bytes()
    if rng.random() < 0.4:
        data, kind = spoilt_bytes(data, rng)
        path.write_bytes(data)
        return kind
    first, payload = data.split(b"\n", 1)
    header = json.loads(first)
    kind = rng.choice(["header", "content", "payload", "lie", "version"])
    if kind == "version":
        header["version"] = rng.choice([0, 2, -1, "1", None, 1.0, 10**400, [1]])
    if kind == "payload":
        payload, _ = spoilt_bytes(payload, rng)
    if kind == "lie":
        at = payload.index(b"\x93NUMPY", rng.randrange(len(payload) // 2))
        payload = (
            payload[:at]
            + lying_npy(np.ones((5, 3), np.float32), rng)
            + payload[at + rng.choice([128, 188]) :]
        )
    if kind == "content":
        text, _ = spoilt_json(header["content"], rng)
        try:
            header["content"] = json.loads(text)
        except (RecursionError, ValueError):
            kind = "header"
    if rng.random() < 0.9:
        header["payload_bytes"] = len(payload)
        canonical = json.dumps(header["content"], sort_keys=True).encode()
        header["sha256"] = hashlib.sha256(canonical + payload).hexdigest()
    text = spoilt_json(header, rng)[0] if kind == "header" else json.dumps(header)
    path.write_bytes(text.encode("utf-8", "surrogatepass") + b"\n" + payload)
    return f"checksum made to match, {kind}"


def _read_checkpoint(folder):
    import jax

    from eqgen import checkpoint

    path, like = folder / "step_0000000010.eqx", _checkpoint_tree()
    metadata = checkpoint.read_metadata(path)
    tree, again = checkpoint.load(path, like)
    assert metadata == again or metadata != metadata
    kinds = lambda tree: [
        (type(x), getattr(x, "shape", ()), getattr(x, "dtype", "")) for x in jax.tree.leaves(tree)
    ]
    assert kinds(tree) == kinds(like), "leaves of other kinds"


def _make_run(folder):
    from eqgen.algorithms.sac import SAC
    from eqgen.experiments import Experiment
    from eqgen.runs import Run
    from eqgen.training import OnlineSettings

    settings = OnlineSettings(total_steps=60, warmup_steps=20, batch_size=8, log_every=10, eval_every=30)
    with Run.create(folder / "run", Experiment(SAC.tiny(), "probe/both", settings, (3, 4)).to_json()) as run:
        for step in (0, 10, 20, 30):
            values = {
                "env_step": step,
                "updates": max(0, step - 20),
                "critic/loss": 0.5,
                "wall_time": step / 7,
            }
            values |= {"eval/return": -1.5 * step} if step % 30 == 0 else {}
            run.log([{"seed": seed} | values for seed in (3, 4)])


def _spoil_file(name, *, lines=False):
    """Breaks a file of a folder as bytes or as JSON."""

    def spoil(folder, rng):
        path = folder / name
        data = path.read_bytes()
        if rng.random() < 0.3:
            data, kind = spoilt_bytes(data, rng)
        elif lines:
            rows = data.decode().splitlines()
            i = rng.randrange(len(rows))
            rows[i], kind = spoilt_json(json.loads(rows[i]), rng)
            data = ("\n".join(rows) + "\n").encode("utf-8", "surrogatepass")
        else:
            text, kind = spoilt_json(json.loads(data), rng)
            data = text.encode("utf-8", "surrogatepass")
        path.write_bytes(data)
        return kind

    return spoil


def _read_settings(folder):
    from eqgen import planning, reporting
    from eqgen.experiments import Experiment
    from eqgen.runs import Run, RunError

    run = Run.open(folder / "run")
    try:
        reporting.status(reporting._opened(run.path))
    except RunError as error:
        assert str(run.path) in str(error)
    kind = planning.PlanningExperiment if planning.is_planning(run.path) else Experiment
    experiment = kind.from_json(run.settings)
    assert kind.from_json(json.loads(json.dumps(experiment.to_json()))) == experiment, (
        "read again, it is another"
    )
    return experiment.make_env if kind is Experiment else None


def _read_log(folder):
    from eqgen import reporting
    from eqgen.experiments import first_loss
    from eqgen.runs import Run

    run = Run.open(folder / "run")
    assert all(isinstance(record, dict) for record in run.metrics())
    first_loss(run)
    reporting.status(reporting._opened(run.path))
    steps, values = run.curve("eval/return")
    assert np.isfinite(values).all() and values.shape[1:] == steps.shape
    with Run.open(run.path, write=True) as writing:
        writing.rewind(20)
        writing.log([{"seed": 3, "env_step": 30}])
    assert Run.open(run.path).metrics()[-1] == {"seed": 3, "env_step": 30}


def _read_sessions(folder):
    from eqgen import reporting, studies
    from eqgen.runs import Run

    run = Run.open(folder / "run")
    assert isinstance(reporting._provenance(run), str)
    with Run.open(run.path, write=True):  # a damaged file is set aside
        assert run.sessions()
    studies.result(run)


def _spoil_folder_of_run(folder, rng):
    """Any file of a run, or several; a report reads them all."""
    kinds = []
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(["settings.json", "metrics.jsonl", "provenance.json"])
        spoil = _spoil_file(f"run/{name}", lines=name == "metrics.jsonl")
        try:
            kinds.append(spoil(folder, rng))
        except (ValueError, IndexError, RecursionError):  # it was broken beyond that before
            kinds.append("twice")
    return " and ".join(kinds)


def _read_report(folder):
    from eqgen import reporting

    page = reporting.write_report([folder], folder / "report.html").read_text()
    assert "<script" not in page


def _make_rows(folder):
    (folder / "rows").mkdir()
    for file in sorted(
        (ROOT / "benchmarks" / "results" / "pendulum" / "rows").glob("s*_gymnax-Pendulum-v1.json")
    )[:2]:
        shutil.copy(file, folder / "rows")


def _spoil_row(folder, rng):
    return _spoil_file(sorted(folder.glob("rows/*.json"))[0])(folder, rng)


def _read_rows(folder):
    from eqgen import comparison, studies

    rows = comparison.read_rows(folder)
    for path in rows:
        steps, values = studies.read_curve(path)
        assert np.isfinite(values).all() and values.shape[1:] == steps.shape
    table = comparison.markdown(list(rows.values()), comparison.summarise(list(rows.values())))
    assert table.startswith("# Suite")


SWEEP = """
preset = "smoke"
algorithms = ["sac"]
envs = ["probe/both"]
seeds = [0, 1]
seeds_together = true
[settings]
total_steps = 60
warmup_steps = 20
batch_size = 8
log_every = 10
[agent]
hidden = [8, 8]
[grid]
"agent.discount" = [0.9, 0.99]
"settings.num_envs" = [1, 2]
[resources]
cpus = 1
"""
ODD_TOML = [
    "0",
    "-1",
    "nan",
    "inf",
    "2.5",
    '"a"',
    '""',
    "[]",
    "[1]",
    '["a"]',
    "{}",
    "true",
    "1979-05-27",
    "07:32:00",
]
ODD_TOML += [
    "99999999999999999999",
    '"\\u0000"',
    '"../x"',
    "[[[[1]]]]",
    "{a = {b = 1}}",
    '["sac:x", "ppo"]',
    "[0.1, 3]",
]
ODD_TOML += [
    "[" * 3000 + "]" * 3000,
    '["mujoco/x", "toy/ring"]',
    "0xffffffff",
    "9007199254740993",
    "[4294967296]",
]
ODD_TOML += ["9" * 400, str(list(range(2000))), '["paper"]', '"paper"']


def _make_sweep(folder):
    (folder / "sweep.toml").write_text(SWEEP)


def _spoil_sweep(folder, rng):
    path = folder / "sweep.toml"
    if rng.random() < 0.2:
        data, kind = spoilt_bytes(path.read_bytes(), rng)
        path.write_bytes(data)
        return kind
    lines = path.read_text().strip().split("\n")
    for _ in range(rng.choice([1, 1, 2])):
        i = rng.randrange(len(lines))
        key = lines[i].partition(" = ")[0]
        kind = rng.choice(["value", "value", "value", "delete", "repeat", "key", "table"])
        match kind:
            case "value":
                lines[i] = f"{key} = {rng.choice(ODD_TOML)}"
            case "delete":
                lines[i] = ""
            case "repeat":
                lines.insert(rng.randrange(len(lines)), lines[i])
            case "key":
                names = [
                    "x",
                    "agent.hidden",
                    '"agent.tau"',
                    '"settings.x"',
                    '"agent.activation"',
                    "resources.gpus",
                    '""',
                ]
                lines[i] = f"{rng.choice(names)} = {rng.choice(ODD_TOML)}"
            case "table":
                lines.insert(
                    i,
                    rng.choice(["[x]", "[agent]", "[[grid]]", "[agent.hidden]", "[settings.a.b]", "[" * 99]),
                )
    path.write_text("\n".join(lines))
    return f"toml {kind}"


def _read_sweep(folder):
    from eqgen.sweeps import Sweep

    return Sweep.read(folder / "sweep.toml").runs


def _flat(n=40):
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(n, 3)),
        "actions": rng.uniform(-1, 1, (n, 2)),
        "rewards": rng.normal(size=n),
    }
    arrays = {key: value.astype(np.float32) for key, value in arrays.items()}
    terminals, timeouts = np.zeros(n, bool), np.zeros(n, bool)
    terminals[4] = timeouts[9] = timeouts[n // 2] = True
    following = np.concatenate([arrays["observations"][1:], np.ones((1, 3), np.float32)])
    return arrays | {"terminals": terminals, "timeouts": timeouts, "next_observations": following}


def _make_d4rl(folder):
    import h5py

    from eqgen.data import d4rl

    with h5py.File(folder / "hopper-medium-v2.hdf5", "w") as file:
        for key, value in _flat().items():
            file.create_dataset(key, data=value, compression="gzip")
    d4rl.save(folder / "own.hdf5", d4rl.load(folder / "hopper-medium-v2.hdf5"), settings={"seed": 3})


def _spoil_hdf5(path, rng):
    """As bytes, or by HDF5's own means."""

    if rng.random() < 0.5:
        data, kind = spoilt_bytes(path.read_bytes(), rng)
        path.write_bytes(data)
        return kind
    kind = "nothing"
    try:
        kind = _edit_hdf5(path, rng)
    except (OSError, TypeError, ValueError):  # what HDF5 or h5py do not write
        path.write_bytes(path.read_bytes()[:-8])
    return f"hdf5 {kind}"


def _edit_hdf5(path, rng):
    import h5py

    with h5py.File(path, "a") as file:
        keys = []
        file.visititems(lambda name, item: keys.append(name) if isinstance(item, h5py.Dataset) else None)
        key = rng.choice(keys)
        like, kinds = (
            file[key][()],
            ["array", "array", "array", "delete", "link", "huge", "text", "loop", "chunk", "add"],
        )
        kind = rng.choice([*kinds, *(["attribute"] * 4 if "eqgen" in file.attrs else ["attribute"])])
        if kind not in ("add", "attribute", "loop"):
            del file[key]
        match kind:
            case "array":
                array = odd_array(like, rng)
                array = array.astype("i8") if array.dtype.kind == "M" else array
                file.create_dataset(key, data=array)
            case "link":
                targets = [
                    h5py.SoftLink("/nowhere"),
                    h5py.SoftLink(f"/{key}"),
                    h5py.ExternalLink("/etc/passwd", "/x"),
                ]
                file[key] = rng.choice(targets)
            case "huge":
                shape = rng.choice([(2**40, 3), (2**31, 3), (2**28,), (2**20, 2**20)])
                file.create_dataset(
                    key, shape, rng.choice(["f4", "?", "f8"]), chunks=(1024,) + (1,) * (len(shape) - 1)
                )
            case "chunk":
                chunks = (2**26, *like.shape[1:])
                file.create_dataset(
                    key, like.shape, like.dtype, maxshape=(None, *like.shape[1:]), chunks=chunks
                )
            case "text":
                file[key] = rng.choice([["a", "b"], "text", np.void(CANARY), h5py.Empty("f4")])
            case "loop":
                file[rng.choice(["metadata/loop", "infos/loop", "episode_1/observations/loop"])] = file["/"]
            case "add":
                names = [
                    "metadata/stream_starts",
                    "infos/x",
                    "episode_0",
                    "extra",
                    "episode_999999999",
                    "episode_7",
                ]
                if (name := rng.choice(names)) not in file:
                    file[name] = odd_array(np.array([0, 4, 9]), rng)
            case "attribute":
                text, _ = spoilt_json(json.loads(file.attrs.get("eqgen", '{"format": 1}')), rng)
                try:
                    file.attrs["eqgen"] = rng.choice([text[:60_000], np.arange(3), CANARY, h5py.Empty("f4")])
                except (OSError, ValueError, TypeError, UnicodeError):
                    file.attrs["eqgen"] = "{"
    return kind


def check_episodes(episodes):
    """What every loader promises."""
    for array in (episodes.observations, episodes.actions, episodes.rewards, episodes.final_observations):
        assert array is None or (array.dtype == np.float32 and np.isfinite(array).all()), (
            "numbers that are none"
        )
    n = len(episodes)
    assert len(episodes.actions) == len(episodes.terminated) == len(episodes.truncated) == n > 0
    assert episodes.starts[0] == episodes.streams[0] == 0 and episodes.starts[-1] == episodes.streams[-1] == n
    assert (np.diff(episodes.starts) > 0).all() and (np.diff(episodes.streams) > 0).all()
    assert set(episodes.streams) <= set(episodes.starts), "a stream begins within an episode"


def _read_hdf5(name):
    def read(folder):
        from eqgen.data import d4rl, formats

        check_episodes(formats.load(folder / name)[1])
        formats.summary(folder / name)
        if name == "own.hdf5":
            check_episodes(d4rl.load(folder / name, memory_map=True))

    return read


def _episodes():
    rng = np.random.default_rng(1)
    for steps in (5, 1, 9):
        last = np.arange(steps) == steps - 1
        yield {
            "observations": rng.normal(size=(steps + 1, 3)),
            "actions": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
            "rewards": rng.normal(size=steps),
            "terminations": last,
            "truncations": ~last & False,
        }


def _make_minari(folder, form):
    about = {"data_format": form, "total_episodes": 3, "total_steps": 15, "dataset_id": "x/y-v0"}
    about |= {"ref_min_score": 1.0, "ref_max_score": 2}
    (folder / "set" / "data").mkdir(parents=True)
    (folder / "set" / "data" / "metadata.json").write_text(json.dumps(about))
    if form == "hdf5":
        import h5py

        with h5py.File(folder / "set" / "data" / "main_data.hdf5", "w") as file:
            for number, episode in enumerate(_episodes()):
                for key, value in episode.items():
                    file[f"episode_{number}/{key}"] = value
        return
    for number, episode in enumerate(_episodes()):
        episode = {
            key: value if key == "observations" else np.concatenate([value, value[-1:]])
            for key, value in episode.items()
        }
        (folder / "set" / "data" / str(number)).mkdir()
        _write_arrow(folder / "set" / "data" / str(number) / "part-0.arrow", episode)


def _write_arrow(path, columns, compression=None):
    import pyarrow

    def column(value):
        if isinstance(value, np.ndarray) and value.ndim > 1:
            width = int(np.prod(value.shape[1:]))
            return pyarrow.FixedSizeListArray.from_arrays(value.reshape(-1), width)
        return pyarrow.array(value)

    table = pyarrow.table({key: column(value) for key, value in columns.items()})
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with (
        pyarrow.OSFile(str(path), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema, options=options) as writer,
    ):
        writer.write_table(table)


def _spoil_minari(folder, rng):
    data = folder / "set" / "data"
    if rng.random() < 0.25:
        return _spoil_file("metadata.json")(data, rng)
    if (data / "main_data.hdf5").exists():
        return _spoil_hdf5(data / "main_data.hdf5", rng)
    path = rng.choice(sorted(data.glob("*/*.arrow")))
    if rng.random() < 0.5:
        content, kind = spoilt_bytes(path.read_bytes(), rng)
        path.write_bytes(content)
        return kind
    import pyarrow

    episode = next(iter(_episodes()))
    episode = {
        key: value if key == "observations" else np.concatenate([value, value[-1:]])
        for key, value in episode.items()
    }
    key = rng.choice(list(episode))
    n = len(episode["observations"])
    odd = [
        lambda: odd_array(episode[key], rng),
        lambda: odd_array(episode[key], rng),
        lambda: [[1.0] * rng.randrange(4) for _ in range(n)],
        lambda: [None] * n,
        lambda: ["a"] * n,
        lambda: [{"a": 1.0, "b": [1.0]}] * n,
        lambda: [{"observation": 1.0, "achieved_goal": float("nan")}] * n,
        lambda: pyarrow.array(["x"] * n).dictionary_encode(),
        lambda: pyarrow.array([CANARY] * n),
        lambda: pyarrow.nulls(n),
        lambda: pyarrow.array([[]] * n, pyarrow.list_(pyarrow.float32(), 0)),
    ]
    try:
        changed = episode | {key: rng.choice(odd)()}
        if rng.random() < 0.1:
            del changed[key]
        _write_arrow(path, changed, rng.choice([None, None, "lz4", "zstd"]))
    except (pyarrow.ArrowException, ValueError, TypeError, ZeroDivisionError):  # Arrow has no such table
        path.write_bytes(path.read_bytes()[:-1])
    return "arrow column"


def _read_minari(folder):
    from eqgen.data import formats

    check_episodes(formats.load(folder / "set")[1])
    formats.summary(folder / "set")


def _make_ogbench(folder):
    arrays = _flat(20)
    last = np.zeros(20, np.float32)
    last[[6, 19]] = 1
    np.savez_compressed(
        folder / "maze.npz",
        observations=arrays["observations"],
        actions=arrays["actions"],
        terminals=last,
        qpos=arrays["actions"],
    )


def _spoil_ogbench(folder, rng):
    path = folder / "maze.npz"
    if rng.random() < 0.3:
        data, kind = spoilt_bytes(path.read_bytes(), rng)
        path.write_bytes(data)
        return kind

    def change(name, content):
        array = np.load(io.BytesIO(content))
        kind = rng.choice(["array", "array", "bytes", "lie", "pickle"])
        if kind == "array":
            return npy(odd_array(array, rng)), "npz array"
        if kind == "bytes":
            return spoilt_bytes(content, rng)[0], "npz bytes"
        if kind == "lie":
            return lying_npy(array, rng), "npz lie"
        buffer = io.BytesIO()
        np.save(buffer, np.array([Canary()] * len(array)), allow_pickle=True)
        return buffer.getvalue(), "npz pickle"

    return spoil_member(path, rng, change)


def _read_ogbench(folder):
    from eqgen.data import formats, ogbench

    check_episodes(ogbench.load(folder / "maze.npz", goal=(0.0, 0.0), tolerance=0.5))
    formats.summary(folder / "maze.npz")


def _make_policy(folder):
    from eqgen import experiments
    from eqgen.algorithms.sac import SAC
    from eqgen.deployment import export_policy
    from eqgen.training import OnlineSettings

    settings = OnlineSettings(total_steps=40, warmup_steps=20, batch_size=8, log_every=20, eval_every=0)
    run = experiments.train(SAC.tiny(), "probe/both", settings, seeds=(0,), out=folder / "run", verbose=False)
    export_policy(run.path, folder / "policy.zip", platforms=["cpu"])
    shutil.rmtree(folder / "run")


def _spoil_policy(folder, rng):
    path = folder / "policy.zip"
    if rng.random() < 0.3:
        data, kind = spoilt_bytes(path.read_bytes(), rng)
        path.write_bytes(data)
        return kind
    matching = rng.random() < 0.6

    def change(name, content):
        if name == "policy.json":
            text, kind = spoilt_json(json.loads(content), rng)
            return text.encode("utf-8", "surrogatepass"), kind
        return spoilt_bytes(content, rng)

    kind = spoil_member(path, rng, change)
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
        if not matching or "policy.json" not in names or names.count("policy.bin") != 1 or "bomb" in kind:
            return f"member {kind}"
        members = {name: file.read(name) for name in names}
    try:
        about = json.loads(members["policy.json"])
        about["sha256"] = hashlib.sha256(members["policy.bin"]).hexdigest()
    except (ValueError, TypeError, RecursionError):
        return f"member {kind}"
    members["policy.json"] = json.dumps(about).encode("utf-8", "surrogatepass")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in members.items():
            new.writestr(name, content)
    return f"checksum made to match, member {kind}"


def _read_policy(folder):
    from eqgen.deployment import load_policy

    act, about = load_policy(folder / "policy.zip")
    assert callable(act) and about["observation"]["shape"] == [1]


def _make_cifar(folder):
    rng = np.random.default_rng(2)
    for number in range(1, 6):
        images, labels = rng.integers(0, 256, (2, 3072), np.uint8), rng.integers(0, 10, 2).tolist()
        (folder / "python").mkdir(exist_ok=True)
        content = {"data": images, "labels": labels, "batch_label": f"training batch {number} of 5"}
        (folder / "python" / f"data_batch_{number}").write_bytes(pickle.dumps(content, protocol=2))
        (folder / "binary").mkdir(exist_ok=True)
        rows = np.concatenate([np.array(labels, np.uint8)[:, None], images], axis=1)
        (folder / "binary" / f"data_batch_{number}.bin").write_bytes(rows.tobytes())
    for kind in ("python", "binary"):
        with tarfile.open(folder / f"{kind}.tar.gz", "w:gz") as tar:
            for file in sorted((folder / kind).iterdir()):
                tar.add(file, f"cifar-10-batches-{kind[:2]}/{file.name}")


def _spoil_cifar(folder, rng):
    kind = rng.choice(["python", "binary"])
    (folder / "chosen").write_text(kind)
    if rng.random() < 0.4:  # one of the files
        path = rng.choice(sorted((folder / kind).iterdir()))
        data, how = spoilt_bytes(path.read_bytes(), rng)
        if kind == "python" and rng.random() < 0.4:
            data, how = (
                rng.choice([CANARY, data[:40] + CANARY[2:], b"\x80\x02" + CANARY[2:-1] + data[2:]]),
                "pickle",
            )
        path.write_bytes(data)
        (folder / "chosen").write_text(str(path.parent.name))
        return how
    archive = folder / f"{kind}.tar.gz"
    (folder / "chosen").write_text(archive.name)
    if rng.random() < 0.5:
        data, how = spoilt_bytes(archive.read_bytes(), rng)
        archive.write_bytes(data)
        return how
    with tarfile.open(archive, rng.choice(["w:gz", "w", "w:xz"])) as tar:
        for file in sorted((folder / kind).iterdir()):
            info = tar.gettarinfo(file, f"cifar/{file.name}")
            content = file.read_bytes()
            match rng.choice(["good"] * 6 + ["name", "link", "size", "bytes", "bomb"]):
                case "name":
                    info.name = rng.choice(
                        [f"../{file.name}", f"/{file.name}", f"a/../../{file.name}", "\x00", "x" * 300]
                    )
                case "link":
                    info.type, info.linkname, info.size = (
                        rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]),
                        "/etc/passwd",
                        0,
                    )
                case "size":
                    tar.addfile(info, io.BytesIO(content))
                    info = tarfile.TarInfo(f"cifar/{rng.choice([file.name, 'x'])}")
                    info.size = rng.choice([2**40, 2**30, 5])
                    tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
                    continue
                case "bytes":
                    content = spoilt_bytes(content, rng)[0]
                    info.size = len(content)
                case "bomb":
                    info = tarfile.TarInfo("zeros")
                    info.size = 2**26
                    tar.addfile(info, _Zeros())
                    continue
            tar.addfile(info, io.BytesIO(content))
    return "archive"


class _Zeros:
    def read(self, size):
        return bytes(size)


def _read_cifar(folder):
    from eqgen.data import images

    data = images.cifar10(folder / (folder / "chosen").read_text())
    assert data.values.shape[1:] == (3, 32, 32) and int(data.labels.max()) <= 9


def _make_pictures(folder):
    from PIL import Image

    rng = np.random.default_rng(3)
    for suffix in ("png", "jpg", "bmp", "gif", "ppm", "tif", "webp"):
        (folder / suffix).mkdir()
        for number in range(2):
            picture = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8))
            picture.save(folder / suffix / f"{number}.{suffix}")


def _spoil_picture(folder, rng):
    suffix = rng.choice(["png", "jpg", "bmp", "gif", "ppm", "tif", "webp"])
    (folder / "chosen").write_text(suffix)
    path = folder / suffix / f"1.{suffix}"
    data, kind = spoilt_bytes(path.read_bytes(), rng)
    path.write_bytes(data)
    return f"{suffix} {kind}"


def _read_pictures(folder):
    from eqgen.data import images

    data = images.folder(folder / (folder / "chosen").read_text(), size=8)
    assert data.values.shape == (2, 3, 8, 8)


READERS = {
    "checkpoints": Reader(_make_checkpoint, _spoil_checkpoint, _read_checkpoint),
    "settings of runs": Reader(_make_run, _spoil_file("run/settings.json"), _read_settings),
    "logs of runs": Reader(_make_run, _spoil_file("run/metrics.jsonl", lines=True), _read_log),
    "provenance of runs": Reader(_make_run, _spoil_file("run/provenance.json"), _read_sessions),
    "reports about runs": Reader(_make_run, _spoil_folder_of_run, _read_report),
    "rows of benchmarks": Reader(_make_rows, _spoil_row, _read_rows),
    "sweeps": Reader(_make_sweep, _spoil_sweep, _read_sweep),
    "D4RL, of others": Reader(
        _make_d4rl,
        lambda f, r: _spoil_hdf5(f / "hopper-medium-v2.hdf5", r),
        _read_hdf5("hopper-medium-v2.hdf5"),
    ),
    "D4RL, our own": Reader(_make_d4rl, lambda f, r: _spoil_hdf5(f / "own.hdf5", r), _read_hdf5("own.hdf5")),
    "Minari, HDF5": Reader(lambda f: _make_minari(f, "hdf5"), _spoil_minari, _read_minari),
    "Minari, Arrow": Reader(lambda f: _make_minari(f, "arrow"), _spoil_minari, _read_minari),
    "OGBench": Reader(_make_ogbench, _spoil_ogbench, _read_ogbench),
    "policies": Reader(_make_policy, _spoil_policy, _read_policy),
    "CIFAR-10": Reader(_make_cifar, _spoil_cifar, _read_cifar),
    "pictures": Reader(_make_pictures, _spoil_picture, _read_pictures),
}


# --- In a process of its own ---


def expected_errors() -> tuple[type[Exception], ...]:
    """Those that the command line shows as one line."""
    from eqgen.checkpoint import CheckpointError
    from eqgen.data.episodes import DataError
    from eqgen.hyperparameters import HyperparametersError
    from eqgen.runs import RunError
    from eqgen.sessions import ExperimentError

    return CheckpointError, DataError, ExperimentError, HyperparametersError, RunError


def outcome(reader: Reader, folder: Path) -> tuple[str, str]:
    """ "accepted", "refused" or "defect", and the error."""
    try:
        then = reader.read(folder)
    except expected_errors() as error:
        names = {str(folder), *(path.name for path in folder.rglob("*"))}
        named = any(name in str(error) for name in names)
        return ("refused" if named else "defect"), f"{type(error).__name__}: {error}"
    except OSError as error:
        return ("refused" if error.filename else "defect"), f"{type(error).__name__}: {error}"
    except Exception as error:
        return "defect", _traced(error)
    try:
        if then is not None:
            then()
    except expected_errors() as error:
        return "refused", f"{type(error).__name__}: {error}"
    except Exception as error:
        return "defect", _traced(error)
    return "accepted", ""


def _traced(error):
    import traceback

    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "eqgen" in f.filename or "fuzzing" in f.filename
    ]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-4:]))
    return f"{type(error).__name__}: {str(error)[:300]} at {where}"


def read_all(name: str, first: int, count: int, root: Path) -> None:
    """Breaks and reads files number `first` .. `first + count - 1`, and prints what became of each."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    reader, good, work = READERS[name], root / "good", root / "work"
    if not good.exists():
        good.mkdir(parents=True)
        reader.make(good)
    os.chdir(root)  # where a canary would sing
    started = []
    watched = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.mkdir")

    def watch(event, arguments):
        ours = event == "os.mkdir" and str(arguments[0]).startswith(str(root))
        ours |= event == "subprocess.Popen" and arguments[0] == sys.executable  # looks at HDF5
        if event in watched and reading and not ours:
            started.append(event)

    reading = False
    warnings.simplefilter("ignore")
    shutil.copytree(good, work, dirs_exist_ok=True)
    (work / "chosen").write_text("png" if name == "pictures" else "python")
    assert outcome(reader, work) == ("accepted", ""), f"the good file of {name}: {outcome(reader, work)}"
    from eqgen import runs

    made = runs.provenance()
    runs.provenance = lambda: made  # it asks git, which is no file's doing
    sys.addaudithook(watch)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, first + count):
        shutil.rmtree(work)
        shutil.copytree(good, work)
        kind = reader.spoil(work, random.Random(f"{name} {number}"))
        started.clear()
        base = max(base, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        reading = True
        result, error = outcome(reader, work)
        reading = False
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if started or (root / "canary").exists():
            result, error = "defect", f"ran something: {started or 'the canary'}"
        if peak - base > 1000 * MEGABYTES:
            result, error = "defect", f"took {(peak - base) // 1000} MB more"
        line = {"number": number, "kind": kind, "result": result, "error": error[:500]}
        print(json.dumps(line), flush=True)
        if number % 100 == 0:
            gc.collect()


# --- From outside ---


def fuzz(name: str, count: int, root: Path, first: int = 0) -> dict[str, Any]:
    """Has `count` files of one kind broken and read.

    **Returns:** how many were accepted and refused, by which errors, and all defects.
    """
    folder = root / hashlib.sha256(name.encode()).hexdigest()[:8]
    found, errors, ways, defects, number = Counter(), Counter(), Counter(), [], first
    while number < first + count:
        command = [sys.executable, __file__, name, str(number), str(first + count - number), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(
            target=lambda p=process, q=lines: [*map(q.put, p.stdout), q.put(None)], daemon=True
        ).start()
        noise: list[str] = []
        drain = threading.Thread(target=lambda p=process, n=noise: n.extend(p.stderr), daemon=True)
        drain.start()
        begun = False
        while number < first + count:
            try:
                # The first line waits for imports, compilation and the good file.
                text = lines.get(timeout=SECONDS if begun else 10 * SECONDS)
            except queue.Empty:
                process.kill()
                text = None
                noise.append(f"no answer in {SECONDS} s")
            if text is None:
                process.wait()
                drain.join(5)
                if not begun:
                    raise RuntimeError(f"{name} did not begin: {''.join(noise)[-2000:]}")
                defects.append(
                    {
                        "number": number,
                        "result": f"died ({process.returncode})",
                        "error": "".join(noise)[-500:],
                    }
                )
                number += 1
                break
            begun = True
            line = json.loads(text)
            found[line["result"]] += 1
            ways[line["kind"].split(",")[0]] += 1
            if line["result"] == "defect":
                defects.append(line)
            if line["error"]:
                errors[line["error"].split(":")[0]] += 1
            number = line["number"] + 1
        process.wait()
    return {
        "files": count,
        "accepted": found["accepted"],
        "refused": found["refused"],
        "errors": dict(errors.most_common()),
        "ways": len(ways),
        "defects": defects,
    }


if __name__ == "__main__":
    read_all(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]).resolve())
