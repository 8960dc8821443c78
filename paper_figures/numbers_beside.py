"""Numbers to put beside the papers', computed from the result files: `rows.toml` names them for `reproduce.py`.

Each function takes the folder `paper_figures` and returns a few words, or "" where the results are not there.
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from eqgen.studies import read_curve


TASKS = {"pendulum": "Pendulum", "halfcheetah": "HalfCheetah", "hopper": "Hopper", "walker2d": "Walker2d"}


@cache
def load(path: Path) -> Any:
    """A result file, or None if it is not there."""
    return json.loads(path.read_text()) if path.exists() else None


def returns(results: Path, agents: dict[str, str]) -> str:
    """Last returns, mean over seeds, of each agent on each task that it was run on."""
    parts = []
    for task, title in TASKS.items():
        files = {label: results / f"{task}-cpu_{agent}.json" for label, agent in agents.items()}
        values = {label: read_curve(path)[1][:, -1].mean() for label, path in files.items() if path.exists()}
        if values:
            parts.append(f"{title}: " + ", ".join(f"{label} {value:.0f}" for label, value in values.items()))
    return "; ".join(parts)


def som_returns(here: Path) -> str:
    agents = {"SOM safe": "som-safe", "SOM paper": "som-paper", "SAC": "sac"}
    return returns(here / "som" / "results", agents)


def nclql_returns(here: Path) -> str:
    agents = {"reference": "nclql-reference", "Boltzmann": "nclql-boltzmann", "LQL": "lql"}
    return returns(here / "nclql" / "results", agents)


def agents(here: Path) -> dict[str, Any]:
    found = load(here.parent / "benchmarks" / "results" / "agents.json")
    return found["agents"] if found else {}


def milliseconds_per_action(here: Path) -> str:
    found = agents(here)
    if not {f"{name}, paper" for name in ("SOM", "QSM", "DACER", "DIPO")} <= found.keys():
        return ""
    best = lambda name: found[name]["act 1"]["best_wall_ms"]
    shown = ["SOM", "QSM", "DACER", "DIPO"] + ["SOM, one candidate"] * ("SOM, one candidate, paper" in found)
    ours = ", ".join(f"{name} {best(f'{name}, paper'):.2g}" for name in shown)
    ratios = ", ".join(f"{best(f'{name}, paper') / best('SOM, paper'):.1f}" for name in shown[1:4])
    return f"{ours} ms; QSM, DACER, DIPO over SOM {ratios} (paper: 2.8, 3.2, 7.2)"


def nclql_efficiency(here: Path) -> str:
    found, others = agents(here), ("SAC", "SOM", "QSM", "DACER", "DIPO", "SDAC", "DPMD")
    if not {f"{name}, paper" for name in ("NC-LQL", *others)} <= found.keys():
        return ""
    ours = found["NC-LQL, paper"]
    ratio = lambda of: ", ".join(f"{name} {of(found[f'{name}, paper']) / of(ours):.2f}" for name in others)
    parameters = ratio(lambda row: row["parameters"])
    return f"NC-LQL = 1: parameters {parameters}; an update {ratio(lambda row: row['update']['cpu_ms'])}"


def som_bandit(here: Path) -> str:
    parts = []
    for name in ("safe", "paper"):
        if content := load(here / "som" / "results" / f"bandit_{name}.json"):
            got = content["one_step"]
            shares = ", ".join(f"{share:.2f}" for share in got["fractions"])
            parts.append(f"{name}: shares {shares}, within 3 s {got['within_3_std']:.2f}")
    return "; ".join(parts)


def imperfect_critics(here: Path) -> str:
    content = load(here / "som" / "results" / "estimator_critics.json")
    if not content:
        return ""
    rows = content["critics"]
    cosine = lambda row, form: np.median(row["cosine"][form])
    return "median cosine with the exact score, smoothed / local gradient: " + ", ".join(
        f"{name} {cosine(row, 'truncated'):.2f} / {cosine(row, 'local'):.2f}" for name, row in rows.items()
    )


def nclql_bandit(here: Path) -> str:
    content = load(here / "nclql" / "results" / "bandit_four.json")
    if not content:
        return ""
    shown = {"reference": "reference", "boltzmann": "Boltzmann", "boltzmann-long": "Boltzmann, 500 steps"}
    row = lambda name: content["samplers"][name]
    parts = [
        f"{label}: entropy ratio {row(key)['entropy']:.2f}, TV {row(key)['tv']:.2f}"
        for key, label in shown.items()
    ]
    return "; ".join(parts) + f" (exact draws: TV {row('reference')['tv_exact']:.2f})"


def pg_success(here: Path) -> str:
    shown = {
        "pg-corrected prior": "PG corrected",
        "pg prior": "PG",
        "planner mcss:50": "MCSS(50)",
        "planner zero": "z = 0",
        "planner unconditional": "N(0, I)",
    }

    def reached(content: dict[str, Any], name: str) -> str:
        row = content["rows"].get(f"{name} {content['study']['replan_every']}")
        if row is None:
            return "-"
        return f"{np.mean([step is not None for each in row['seeds'] for step in each['steps_to_goal']]):.2f}"

    mazes = []
    for layout in ("umaze", "medium", "large"):
        paths = sorted((here / "prior_guidance" / "results").glob(f"{layout}-cpu_seed?.json"))
        parts = [
            f"{label} {' / '.join(reached(load(path), name) for path in paths)}"
            for name, label in shown.items()
        ]
        mazes += [f"{layout}, success by seed: {', '.join(parts)}"] if paths else []
    return "; ".join(mazes)


def pg_speed(here: Path) -> str:
    content = load(here.parent / "benchmarks" / "results" / "planning.json")
    if not content:
        return ""
    ms = lambda name: content["rows"][f"cpu: {name}"]["1"]["best_wall_ms"]
    names = ("pg prior", "meanflow-pg prior", "planner mcss:50")
    return ", ".join(f"{name} {ms(name):.2g} ms" for name in names) + (
        f"; MCSS(50) over PG {ms('planner mcss:50') / ms('pg prior'):.0f}"
    )


def variance_ratio(here: Path) -> str:
    content = load(here / "adaptive_timesteps" / "results" / "variance.json")
    if not content:
        return ""
    ratios = {}
    for betas, row in content["schedules"].items():
        mean = np.mean(row["after"]["10000"]["variance"], axis=0)
        ratios[betas] = mean.max() / mean.min()
    return "largest over smallest: " + ", ".join(f"{betas} {ratio:.0f}" for betas, ratio in ratios.items())


def interdependence(here: Path) -> str:
    content = load(here / "adaptive_timesteps" / "results" / "interdependence.json")
    if not content:
        return ""
    change = np.mean(content["change"], axis=0)
    own = np.diag(change).mean()
    others = change[~np.eye(len(change), dtype=bool)].mean()
    return f"change of the loss, mean: trained tenth {own:+.3f}, others {others:+.3f}"


def speedups(here: Path, samplers: tuple[str, ...], studies: tuple[str, ...]) -> str:
    """Times fewer updates than uniform's to uniform's last bound, mean over seeds."""
    sys.path.append(str(here / "adaptive_timesteps"))
    import curves

    parts = []
    for study in studies:
        runs = {name: curves.read(study, name) for name in ("uniform", *samplers)}
        if all(run is not None for run in runs.values()):
            each = (f"{name} {curves.speedups(runs[name], runs['uniform']).mean():.2f}" for name in samplers)
            parts.append(f"{study}: {', '.join(each)}")
    return f"times fewer updates than uniform: {'; '.join(parts)}" if parts else ""


def adaptive_speedup(here: Path) -> str:
    studies = tuple(
        f"{data}-{betas}" for data in ("digits", "patches") for betas in ("linear", "cosine", "quad")
    )
    return speedups(here, ("adaptive",), studies)


def variance_speedup(here: Path) -> str:
    return speedups(here, ("variance", "adaptive"), ("digits-linear", "digits-cosine", "digits-quad"))
