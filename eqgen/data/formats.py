"""Any dataset by its path: which format it is in, and a summary of what it holds."""

from pathlib import Path
from typing import Any

import numpy as np

from eqgen.data import d4rl, hdf5, minari, ogbench
from eqgen.data.episodes import DataError, Episodes


def load(path: str | Path) -> tuple[str, Episodes]:
    """**Returns:** the name of the format and the episodes, with each loader's defaults.

    **Raises:** `DataError` when no format is recognised or the loader finds fault.
    """
    path = Path(path)
    if path.is_dir():
        return "Minari", minari.load(path)
    if path.suffix == ".npz":
        return "OGBench npz", ogbench.load(path)
    if path.suffix in (".hdf5", ".h5"):
        with hdf5.opened(path) as file:
            if "episode_0" in file:
                raise DataError("it belongs to a Minari dataset. Give the folder of that, two levels up.")
        return "D4RL HDF5", d4rl.load(path)
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    raise DataError(f"{path} is neither .hdf5 (D4RL), .npz (OGBench) nor the folder of a Minari dataset.")


def summary(path: str | Path) -> dict[str, Any]:
    """What a set holds, in words and numbers, by what they are of.

    **Raises:** `DataError` when it cannot be loaded, or differs from what eqgen once wrote.
    """
    form, episodes = load(path)
    lengths = episodes.lengths
    span = f"of {lengths.min()} to {lengths.max()} steps, mean {lengths.mean():.1f}"
    about = {
        "name": episodes.name,
        "format": form,
        "steps": len(episodes),
        "episodes": f"{episodes.num_episodes}, {span}",
        "streams": len(episodes.streams) - 1,
        "ends": f"{int(episodes.terminated.sum())} terminated, {int(episodes.truncated.sum())} truncated",
        "observations": _ranges(np.asarray(episodes.observations)),
        "actions": _ranges(np.asarray(episodes.actions)),
    }
    if episodes.rewards is not None:
        returns = episodes.returns()
        about["rewards"] = (
            f"sum {episodes.rewards.sum(dtype=np.float64):.6g}, from {episodes.rewards.min():.6g} to "
            f"{episodes.rewards.max():.6g}; returns {returns.min():.6g} to {returns.max():.6g}, "
            f"mean {returns.mean():.6g}"
        )
    if scale := episodes.scale:
        about["score"] = f"0 at {scale.low:.6g}, 100 at {scale.high:.6g} ({scale.origin}: {scale.source})"
    if form == "D4RL HDF5" and (own := d4rl.provenance_of(path)):
        about["made with"] = ", ".join(f"{key} {value}" for key, value in own["settings"].items())
        made = own["provenance"]
        about["made by"] = ", ".join(str(made.get(key)) for key in ("started", "eqgen", "commit", "cpu"))
        about["checksum"] = f"{own['sha256'][:16]}, verified"
    return about


def _ranges(array: np.ndarray) -> str:
    low, high = array.min(axis=0), array.max(axis=0)
    shown = [f"[{a:.4g}, {b:.4g}]" for a, b in zip(low[:8], high[:8])]
    constant = int((low == high).sum())
    rest = f" and {len(low) - 8} more" if len(low) > 8 else ""
    return f"{len(low)}: {' '.join(shown)}{rest}" + (f"; {constant} constant" if constant else "")
