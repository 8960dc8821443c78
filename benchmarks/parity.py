"""How well the MJX tasks agree with Gymnasium's: step by step, and in the returns of one policy.

    python benchmarks/parity.py                      all tasks, about 40 minutes on one core, mostly compilation
    python benchmarks/parity.py HalfCheetah-v5       one or several
    python benchmarks/parity.py --steps Pusher-v5    trajectories only (Pusher's returns took over ten minutes)
    python benchmarks/parity.py --table              the table from the result file

Trajectories, in float64: from the state of a reset, 100 uniform random actions in both engines, for three resets.
`steps_within` is the number of steps until observations or rewards first differ by more than 1e-6 (beyond, the task
is chaotic: differences of the last digit grow by a factor per contact), and `required` what it must at least be.
Terminations are compared over these steps. Episodes go on after a termination, so that fallen robots count too.

Distribution, in float32 (version 5 only): returns of 64 episodes in each engine, actions tanh(W obs) with one fixed
random W; `ks_p` is the p-value of the two-sample Kolmogorov-Smirnov test.
"""

import argparse
import json

import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import mujoco
import numpy as np
from scipy.stats import ks_2samp

from eqgen.envs.host import HostEnv
from eqgen.envs.mjx.tasks import TASKS, make_mjx
from eqgen.evaluation import rollout_returns
from eqgen.provenance import provenance
from measure import RESULTS, write


STEPS, RESETS, TOLERANCE, EPISODES = 100, 3, 1e-6, 64
REQUIRED = {"HalfCheetah": 20, "Hopper": 20, "Walker2d": 20, "Ant": 20, "Pusher": 20, "Humanoid": 4}
"""Steps within the tolerance where it is not all of them: where there are contacts. Humanoid is solved by another
method than Gymnasium's; where both use Newton's, 20 steps are required of it, too."""
NEWTON = ", Newton in both"
NAMES = [f"{name}-v{version}" for name, task in TASKS.items() for version in task.versions]


def required(row: str) -> int:
    """The steps within the tolerance that are asked of a row of the table."""
    return 20 if row.endswith(NEWTON) else REQUIRED.get(row.partition("-")[0], STEPS)


def trajectories(name: str, steps: int = STEPS, *, same_solver: bool = False) -> dict:
    """Both engines side by side. `same_solver` gives Gymnasium's simulation MJX's solver."""
    jax.clear_caches()  # what was traced in float32 would be found again, and not fit
    with jax.enable_x64(True):
        env, host = make_mjx(name), gymnasium.make(name, disable_env_checker=True).unwrapped
        if same_solver:
            host.model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
        reset = jax.jit(env.reset_to)
        step = jax.jit(lambda state, action: env.step(state, action, key=jr.key(0)))
        low, high = host.action_space.low, host.action_space.high
        errors, reward_errors, agreed, contacts = np.zeros((RESETS, steps + 1)), [], [], []
        for seed in range(RESETS):
            host_obs, _ = host.reset(seed=seed)
            state, obs = reset(host.data.qpos, host.data.qvel)
            errors[seed, 0] = np.abs(obs - host_obs).max()
            rewards, ends = np.zeros(steps), np.zeros(steps, bool)
            for t, action in enumerate(np.random.default_rng(seed).uniform(-1, 1, (steps, env.action_dim))):
                state, timestep = step(state, action)
                scaled = (low + high) / 2 + (high - low) / 2 * action
                host_obs, reward, terminated, _, _ = host.step(scaled)
                errors[seed, t + 1] = np.abs(timestep.obs - host_obs).max()
                rewards[t], ends[t] = abs(timestep.reward - reward), timestep.terminated == terminated
                contacts.append(host.data.ncon)
            reward_errors.append(rewards)
            agreed.append(ends)
        host.close()
    error, reward_error = errors.max(0), np.max(reward_errors, axis=0)
    beyond = np.flatnonzero(np.maximum(error[1:], reward_error) > TOLERANCE)
    within = int(beyond[0]) if beyond.size else steps
    marks = [t for t in (0, 1, 10, 20, 50, 100) if t <= steps]
    return {
        "obs_error": {t: float(f"{error[t]:.1e}") for t in marks},
        "reward_error": {t: float(f"{reward_error[:t].max():.1e}") for t in marks[1:]},
        "steps_within": within,
        "terminations_equal": bool(np.all(np.array(agreed)[:, :within])),
        "most_contacts": int(max(contacts)),
    }


def distribution(name: str, episodes: int = EPISODES) -> dict:
    """Returns and lengths of one policy's episodes in both engines."""
    env, host = make_mjx(name), HostEnv(name)
    weights = jnp.asarray(
        np.random.default_rng(0).normal(size=(env.action_dim, *env.obs_shape)) / 4, jnp.float32
    )
    policy = lambda obs, key: jnp.tanh(weights @ obs)
    found, row = {}, {"episodes": episodes}
    for engine, one in (("mjx", env), ("gymnasium", host)):
        returns, lengths = (
            np.asarray(x, float) for x in rollout_returns(policy, one, episodes, key=jr.key(1))
        )
        found[engine] = returns
        row[engine] = {
            "mean": round(returns.mean(), 3),
            "standard_error": round(returns.std(ddof=1) / episodes**0.5, 3),
            "length": round(lengths.mean(), 1),
        }
    return row | {"ks_p": float(f"{ks_2samp(found['mjx'], found['gymnasium']).pvalue:.2g}")}


def table(rows: dict) -> str:
    """The result file as a table in Markdown."""
    lines = [
        "| task | obs. after 1, 10, 50, 100 | reward | within 1e-6 | ends equal | return: MJX, Gymnasium | KS p |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        errors = ", ".join(f"{row['obs_error'][t]:.0e}" for t in ("1", "10", "50", "100"))
        law = row.get("distribution")
        returns = " | "
        if law:
            pair = [f"{law[e]['mean']:.1f} ± {law[e]['standard_error']:.1f}" for e in ("mjx", "gymnasium")]
            returns = f"{', '.join(pair)} | {law['ks_p']:.2g}"
        steps = f"{row['steps_within']} of {STEPS} steps"
        ends = "yes" if row["terminations_equal"] else "no"
        lines.append(
            f"| {name} | {errors} | {row['reward_error']['100']:.0e} | {steps} | {ends} | {returns} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--steps", action="store_true", help="trajectories only, no returns")
    parser.add_argument("--table", action="store_true", help="print the table and measure nothing")
    args = parser.parse_args()
    if unknown := set(args.tasks) - set(NAMES):
        parser.error(f"There is no task {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}.")
    file = RESULTS / "parity.json"
    content = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    if args.table:
        print(table(content["rows"]))
        return
    for name in args.tasks or NAMES:
        row = trajectories(name)
        content["rows"][name] = row
        if name == "Humanoid-v5":
            content["rows"][name + NEWTON] = trajectories(name, same_solver=True)
        if name.endswith("v5") and not args.steps:
            row["distribution"] = distribution(name)
        print(name, json.dumps(row), flush=True)
        write("parity", {"provenance": provenance()} | {"rows": json.loads(json.dumps(content["rows"]))})


if __name__ == "__main__":
    main()
