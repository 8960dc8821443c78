"""What the figures read out of the result files: curves, steps to a target, and their bootstrap intervals."""

import json
from pathlib import Path
from typing import Any

import numpy as np


HERE = Path(__file__).parent
RESULTS = HERE / "results"
LABELS = {
    "uniform": "uniform",
    "p2": "P2",
    "min-snr": "Min-SNR",
    "log-normal": "log-normal (EDM)",
    "logit-normal": "logit-normal",
    "speed": "SpeeD",
    "beta": "static Beta",
    "second-moment": "second moment (iDDPM)",
    "variance": "by gradient variance",
    "adaptive": "adaptive (robust)",
    "adaptive-uncapped": "adaptive, $c_t$ not capped",
    "adaptive-min-snr": "adaptive + Min-SNR",
    "adaptive-paper": "adaptive (paper)",
    "adaptive-released": "adaptive (paper, fresh noise)",
}


def read(study: str, sampler: str, results: Path = RESULTS) -> dict[str, Any] | None:
    """A result file with its curves as arrays [records, seeds], or None if it is not there."""
    path = results / f"{study}_{sampler}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return content | {name: np.array(content[name]) for name in ("steps", "bound", "bound_but_last", "law")}


def steps_to(steps: np.ndarray, bound: np.ndarray, target: float) -> float:
    """The step at which a falling curve first meets the target, interpolated; infinite if it never does."""
    below = np.flatnonzero(bound <= target)
    if not below.size:
        return np.inf
    last = below[0]
    if last == 0:
        return float(steps[0])
    fraction = (bound[last - 1] - target) / (bound[last - 1] - bound[last])
    return float(steps[last - 1] + fraction * (steps[last] - steps[last - 1]))


def speedups(
    run: dict[str, Any], uniform: dict[str, Any], metric: str = "bound", *, per_pass: bool = False
) -> np.ndarray:
    """By seed, how many times fewer updates than uniform's it takes to uniform's last value; 0 if it is not met.

    `per_pass` counts forward passes instead, those of the looks included.
    """
    pairs = zip(run[metric].T, uniform[metric].T, strict=True)
    taken = np.array([steps_to(run["steps"], curve, base[-1]) for curve, base in pairs])
    cost = (1 + run["relative_cost"]) if per_pass else 1.0
    return uniform["steps"][-1] / (taken * cost)


def interval(values: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """The mean over seeds and a 95 % bootstrap interval of it."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(axis=1)
    return float(values.mean()), *(float(x) for x in np.percentile(means, [2.5, 97.5]))
