"""A trained policy as one file that runs without eqgen.

    eqgen export runs/pendulum --out policy.zip

The file is a zip of two: `policy.bin`, the compiled policy's StableHLO as `jax.export` serialises it, weights
included, and `policy.json`, which says what goes in, what comes out, where it is from, and the SHA-256 of the
other. Nothing of it is Python, and reading it runs no code. To act, JAX, flatbuffers and the standard library
are enough:

    import json, zipfile
    import jax, numpy as np

    with zipfile.ZipFile("policy.zip") as file:
        about = json.loads(file.read("policy.json"))
        act = jax.jit(jax.export.deserialize(bytearray(file.read("policy.bin"))).call)
    action = act(np.zeros(about["observation"]["shape"], np.float32), np.uint32(0))

The second argument is the seed of the policy's own noise: another for every action, or always the same one for a
policy that is a function of the observation. JAX promises to read such a file for six months after it was written,
older readers of newer files included for three weeks (`jax.export`, compatibility guarantees).
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import export

from eqgen.experiments import seed_index, trained_policies
from eqgen.files import parse_json, replacing
from eqgen.provenance import provenance
from eqgen.runs import Run
from eqgen.sessions import ExperimentError


FORMAT = 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
LARGEST = 2**31
"""Bytes of a file that is read; StableHLO cannot be larger anyway."""
LARGEST_ABOUT = 2**24
"""Bytes of `policy.json`."""


def export_policy(
    run: str | Path,
    out: str | Path,
    *,
    trained_seed: int | None = None,
    batch: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda"),
) -> Path:
    """Writes the policy that a run has learned as it is judged, `act(..., explore=False)` of its newest checkpoint.

    **Arguments:**

    - `trained_seed`: whose; the first of the run if None.
    - `batch`: how many observations at once, each with noise of its own; None for one without a batch axis.
    - `platforms`: where it is to run, of `PLATFORMS`.

    **Raises:** `ExperimentError` for a seed or a platform that there is not.
    """
    if unknown := set(platforms) - set(PLATFORMS):
        raise ExperimentError(
            f"There is no platform {', '.join(sorted(unknown))}; choose of {', '.join(PLATFORMS)}."
        )
    if batch is not None and batch < 1:
        raise ExperimentError(f"batch is {batch}; it must be at least 1.")
    experiment, env, policies, step = trained_policies(run)
    index = seed_index(run, experiment.seeds, trained_seed)
    policy = policies[index]

    def act(obs, noise_seed):
        key = jr.key(noise_seed)
        if batch is None:
            return policy(obs, key)
        return jax.vmap(policy)(obs, jr.split(key, batch))

    leading = () if batch is None else (batch,)
    obs = jax.ShapeDtypeStruct((*leading, *env.obs_shape), jnp.float32)
    exported = export.export(jax.jit(act), platforms=list(platforms))(
        obs, jax.ShapeDtypeStruct((), jnp.uint32)
    )
    content = bytes(exported.serialize())
    about = {
        "format": FORMAT,
        "sha256": hashlib.sha256(content).hexdigest(),
        "algorithm": type(experiment.agent).__name__,
        "environment": experiment.env,
        "policy": experiment.agent.evaluation_policy,
        "observation": {"shape": list(obs.shape), "dtype": "float32"},
        "seed": {"shape": [], "dtype": "uint32"},
        "action": {"shape": [*leading, env.action_dim], "dtype": "float32", "range": [-1.0, 1.0]},
        "platforms": list(platforms),
        "trained": {"seed": experiment.seeds[index], "env_step": step, "settings": Run.open(run).settings},
        "provenance": provenance(),
    }
    with replacing(Path(out)) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("policy.json", json.dumps(about, indent=1))
            file.writestr("policy.bin", content)
    return Path(out)


def load_policy(path: str | Path) -> tuple[eqx.Partial, dict[str, Any]]:
    """What `export_policy` wrote: the compiled `(obs, seed) -> action`, and what `policy.json` says of it.

    **Raises:** `ExperimentError` when the file is no such file, is damaged, or is not for this machine's platform.
    """
    try:
        with zipfile.ZipFile(path) as file:
            members = {info.filename: info for info in file.infolist()}
            if missing := {"policy.json", "policy.bin"} - members.keys():
                raise ExperimentError(
                    f"{path} holds no {', '.join(sorted(missing))}: it is no exported policy."
                )
            for name, most in (("policy.json", LARGEST_ABOUT), ("policy.bin", LARGEST)):
                size, packed = members[name].file_size, members[name].compress_size
                if size > min(most, 2**26 + 100 * packed):
                    raise ExperimentError(f"{path}: {name} would unpack from {packed} to {size} bytes.")
            about = parse_json(file.read("policy.json"))
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise ExperimentError(f"{path} has another format than {FORMAT}, which this version reads.")
            content = file.read("policy.bin")
        if about.get("sha256") != hashlib.sha256(content).hexdigest():
            raise ExperimentError(f"{path} is damaged: the checksum of policy.bin differs. Export it again.")
        exported = export.deserialize(bytearray(content))
        shapes = [list(aval.shape) for aval in (exported.in_avals[0], exported.out_avals[0])]
        if shapes != [about[name]["shape"] for name in ("observation", "action")]:
            raise ExperimentError(f"{path} is damaged: policy.json tells other shapes than {shapes}.")
        platforms = list(exported.platforms)
    except ExperimentError:
        raise
    except Exception as error:  # whatever a damaged zip, JSON or flatbuffer makes of it
        if isinstance(error, OSError) and error.filename:
            raise
        raise ExperimentError(f"{path} is damaged, or is no exported policy: {error}") from error
    if (here := export.default_export_platform()) not in platforms:
        raise ExperimentError(f"{path} runs on {', '.join(platforms)}; this is {here}. Export it again.")
    return eqx.Partial(_call, jax.jit(exported.call)), about


def _call(call, obs, seed=0):
    return call(jnp.asarray(obs, jnp.float32), np.uint32(seed))
