"""One session of a run: drives a training generator, and logs, saves and reports between its steps.

However a session stops, the run can go on. At the first interrupt the chunk under way is finished and saved; a
number that is not finite leaves the last good checkpoint in place.
"""

import math
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from eqgen.envs.base import EnvironmentFailedError
from eqgen.loops import NonFiniteError
from eqgen.runs import Run, TensorBoard


class ExperimentError(Exception):
    """Something that was asked for cannot be done; the message says what and why in a line."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and did, after saving; `signal` is what asked."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


@runtime_checkable
class Progress(Protocol):
    """What a training generator yields."""

    @property
    def step(self) -> int:
        """Environment steps or updates: the run's clock."""
        ...

    @property
    def records(self) -> list[dict[str, Any]]:
        """One flat dict for each seed."""
        ...

    @property
    def state(self) -> PyTree: ...


def drive(
    run: Run,
    steps: Generator[Progress, None, None],
    *,
    total: int,
    checkpoint_every: int,
    metadata: dict[str, Any],
    parameters: Callable[[PyTree], PyTree],
    summary: Callable[[Sequence[dict[str, Any]]], tuple[dict[str, str], str | None]],
    tensorboard: bool,
    verbose: bool,
) -> None:
    """The loop around a training generator: log, save, report, until the end or an interrupt.

    **Arguments:**

    - `total`: the step at which training ends.
    - `checkpoint_every`: steps; 0 saves at the end only.
    - `metadata`: of the checkpoint from which this session goes on, empty at the beginning.
    - `parameters`: the part of a state that must be finite to be saved; arrays with a leading axis of seeds.
    - `summary`: of some records, what stands beside the progress bar, and a line to print, if any.
    - `verbose`: a progress bar on a terminal, and these lines.

    **Raises:** `ExperimentError` when a number is no longer finite or an environment failed; `Interrupted` after an
    interrupt.
    """
    first, saved = metadata.get(run.clock, 0), metadata.get(run.clock)
    with ExitStack() as stack:
        sinks: list[Run | TensorBoard] = [run]
        if tensorboard:
            board = TensorBoard(run.path, -1 if saved is None else saved, run.clock)
            sinks.append(stack.enter_context(closing(board)))
        hidden = None if verbose else True  # None: hidden unless on a terminal
        bar = stack.enter_context(tqdm(total=total, initial=first, unit="step", disable=hidden))
        stop = stack.enter_context(StopOnSignal())
        stack.enter_context(closing(steps))
        try:
            for progress in steps:
                step, records = progress.step, progress.records
                for record in records:
                    record["wall_time"] += metadata.get("wall_time", 0.0)
                when = f"{'environment step' if run.clock == 'env_step' else run.clock} {step}"
                _check_finite(when, records, parameters(progress.state))
                for sink in sinks:
                    sink.log(records)
                beside, line = summary(records)
                bar.update(step - bar.n)
                if beside:
                    bar.set_postfix(beside)
                if verbose and line:
                    bar.write(f"step {step:>8}  {records[0]['wall_time']:7.1f} s  {line}")
                    sys.stdout.flush()
                due = step > 0 and checkpoint_every and step % checkpoint_every == 0
                if due or step == total or stop.signal:
                    run.save_checkpoint(progress.state, step, wall_time=records[0]["wall_time"])
                    saved = step
                if stop.signal and step < total:
                    raise Interrupted(f"Saved step {step}. Go on with: eqgen resume {run.path}", stop.signal)
        except (NonFiniteError, EnvironmentFailedError) as error:
            kept = (
                "No checkpoint had been saved" if saved is None else f"The checkpoint of step {saved} is kept"
            )
            message = f"{error} Training has stopped. {kept} in {run.path}."
            if isinstance(error, EnvironmentFailedError):
                message += f" When it is mended, go on with: eqgen resume {run.path}"
            raise ExperimentError(message) from error


class StopOnSignal:
    """While entered, the first Ctrl-C or SIGTERM only sets `signal`; the second interrupts at once."""

    def __init__(self):
        self.signal = None
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        message = "Stopping when this chunk is done and saved. Again: stop at once."
        print(f"\n{message}", file=sys.stderr, flush=True)


def name_seeds(seeds: Sequence[int]) -> str:
    """ "seed 3", "seeds 0, 7", "seeds 0 to 4"."""
    consecutive = len(seeds) > 2 and tuple(seeds) == tuple(range(seeds[0], seeds[0] + len(seeds)))
    listed = f"{seeds[0]} to {seeds[-1]}" if consecutive else ", ".join(map(str, seeds))
    return f"seed{'s' if len(seeds) > 1 else ''} {listed}"


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds.

    **Raises:** `ExperimentError` when there are none, two are equal, or one is negative or of more than 31 bits.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**31:
        raise ExperimentError(
            f"seeds are {list(seeds)}; one or more different ones are needed, none negative and all below 2**31."
        )
    return tuple(seeds)


def _check_finite(when, records, parameters):
    """What generators do not check themselves: evaluation results, and the parameters about to be saved."""
    for record in records:
        for name, value in record.items():
            if not all(math.isfinite(x) for x in np.ravel(value) if isinstance(x, float)):
                raise NonFiniteError(f"The metric {name} of seed {record['seed']} is {value} at {when}.")
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(parameters, eqx.is_inexact_array))
    finite = _finite_by_seed([leaf for _, leaf in leaves])
    for (path, _), good in zip(leaves, np.asarray(finite)):
        if not good.all():
            seed = records[int(np.argmin(good))]["seed"]
            name = jax.tree_util.keystr(path)
            raise NonFiniteError(f"The array {name} of seed {seed} has NaN or infinite entries at {when}.")


@jax.jit
def _finite_by_seed(leaves):
    return jnp.stack([jnp.all(jnp.isfinite(leaf.reshape(len(leaf), -1)), axis=1) for leaf in leaves])
