"""Summary of a run, printed at its end: losses, speed, time by phase, and the paths of its files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from engine.checkpoint.folder import CHECKPOINTS, committed
from engine.config.schema.run import RunConfig
from engine.errors import EXIT_DONE
from engine.logs import duration
from engine.train.metrics import METRICS
from engine.train.plot import PLOT, best, read_curves
from engine.train.state import TrainState


class Spent:
    """Seconds of one start of a run by phase, and the tokens that it trained on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = {}
        self.data_seconds = 0.0
        """Seconds of the steps that were spent waiting for data."""
        self.tokens = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block to a phase."""
        begin = self._clock()
        try:
            yield
        finally:
            self.add(name, self._clock() - begin)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def step(self, seconds: float, data_seconds: float, tokens: int) -> None:
        """Count one step."""
        self.add("steps", seconds)
        self.data_seconds += data_seconds
        self.tokens += tokens


def process_seconds() -> float:
    """Seconds since this process began, imports included."""
    # Two clocks, of the process table and of the system: after a correction the difference may be negative.
    return max(time.time() - psutil.Process().create_time(), 0.0)


def summary(config: RunConfig, state: TrainState, spent: Spent, total_seconds: float, code: int) -> str:
    """Return the summary of a run that ends with `code`, as lines of text; `total_seconds` are those of this start."""
    num_steps = config.num_steps
    done = "done" if state.step >= num_steps else "ended early: evaluations no longer improved"
    how = done if code == EXIT_DONE else "saved; start it again to go on"
    rows = {
        "trained": f"{state.step:,} of {num_steps:,} steps, {state.tokens:,} tokens ({how})",
        "training loss": f"{state.loss:.4f}" if state.loss is not None else "",
        "validation loss": _validation(config.folder),
        "throughput": _throughput(spent, total_seconds),
        "time": _time(spent, total_seconds),
        **_newest(config.folder),
        "records": _records(config),
    }
    width = max(map(len, rows)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in rows.items() if text]
    return "\n".join([f"run {config.name} in {config.folder}", *lines])


def _validation(folder: Path) -> str:
    try:
        with (folder / METRICS).open("rb") as lines:
            validation = read_curves(lines)[1]
    except OSError:
        return ""
    smallest = best(validation)
    if smallest is None:
        return ""
    return f"best {smallest[1]:.4f} at step {smallest[0]:,}, last {validation[-1][1]:.4f} at step {validation[-1][0]:,}"


def _throughput(spent: Spent, total_seconds: float) -> str:
    within = spent.seconds.get("steps", 0.0)
    if not spent.tokens or not within:
        return ""
    return f"{spent.tokens / within:,.0f} tokens/s in steps, {spent.tokens / total_seconds:,.0f} over all of this start"


def _time(spent: Spent, total_seconds: float) -> str:
    shown = spent.seconds | {"other": total_seconds - sum(spent.seconds.values())}
    phases = [f"{name} {duration(seconds)}" for name, seconds in shown.items() if seconds >= 0.5]
    wait = f" (of the steps {duration(spent.data_seconds)} for data)" if spent.data_seconds >= 0.5 else ""
    return f"{duration(total_seconds)}: {', '.join(phases)}{wait}"


def _newest(folder: Path) -> dict[str, str]:
    found = committed(folder / CHECKPOINTS)
    if not found:
        return {}
    return {"checkpoint": str(found[0]), "to convert": f"palimpsest convert {folder} --output FOLDER"}


def _records(config: RunConfig) -> str:
    logging = config.logging
    names = [METRICS, *([PLOT] if logging.plot else []), *(["tensorboard/"] if logging.tensorboard else [])]
    names += ["wandb/"] if logging.wandb != "off" else []
    return f"{', '.join(names)} in {config.folder}"
