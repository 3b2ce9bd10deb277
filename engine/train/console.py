"""Progress on standard output: a line for each record, with every loss and the time left."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping

from engine.config.metrics import MEASURE
from engine.config.schema.run import RunConfig
from engine.logs import duration

STEPS_SMOOTHED = 50
"""Number of steps over which the speed of a step is smoothed, roughly."""
STEPS_BETWEEN = 1000
"""Number of steps over which the share of time between steps is smoothed: several evaluations and checkpoints."""


class Pace:
    """Seconds that a run still takes, all its run stages, evaluations and checkpoints included.

    What a token takes within steps is smoothed over a few steps. The time between steps (evaluations, checkpoints)
    comes in bursts, so its ratio to the time within steps is smoothed over many. The first step of a start, in which
    kernels are compiled, counts only as long as there is no other.
    """

    def __init__(self, config: RunConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens, self._num_steps, self._clock = config.tokens, config.num_steps, clock
        self._last: float | None = None
        self._steps = 0
        self._token_seconds = 0.0
        self._within = self._all = 0.0

    def count(self, step: int, step_seconds: float) -> None:
        """Note the end of a step; call once for each."""
        now = self._clock()
        per_token = step_seconds / max(self._tokens(step) - self._tokens(step - 1), 1)
        # Weights 1, 1, 1/2, 1/3, ...: the second step replaces the first (compilation), then the plain mean of all but
        # the first up to 50 steps, and an exponential mean from there on.
        weight = max(1 / STEPS_SMOOTHED, 1 / max(self._steps, 1))
        self._token_seconds += weight * (per_token - self._token_seconds)
        if self._last is not None:
            # Sums, not a mean of ratios: one long evaluation counts by its seconds.
            kept = 1 - 1 / STEPS_BETWEEN
            self._within = kept * self._within + step_seconds
            self._all = kept * self._all + max(now - self._last, step_seconds)
        self._last, self._steps = now, self._steps + 1

    def seconds_left(self, step: int) -> float:
        """Seconds until the last step is done, for a run that stands behind `step` steps."""
        tokens = self._tokens(self._num_steps) - self._tokens(step)
        return tokens * self._token_seconds * (self._all / self._within if self._within else 1.0)


class Terminal:
    """A sink of `engine.train.metrics` that prints one line per record on standard output."""

    def __init__(self, config: RunConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.every_steps, self.num_steps = config.logging.every_steps, config.num_steps
        self._pace = Pace(config, clock)

    def write(self, record: Mapping[str, float]) -> None:
        step = int(record["step"])
        # The kind of a record is told by its keys: the three kinds share none of these.
        at = f"step {step:>6}/{self.num_steps}  "
        if "validation_loss" in record:
            print(f"{at}validation {losses(record, 'validation_loss')}{_measures(record)}", flush=True)
        elif "rollback" in record:
            left_out = record["left_out_to"] - record["left_out_from"]
            print(f"{at}again: rollback {record['rollback']}, {left_out} samples left out", flush=True)
        elif "step_seconds" in record:
            self._pace.count(step, record["step_seconds"])
            if step % self.every_steps == 0 or step == self.num_steps or "skipped" in record:
                print(at + self._step(record, step), flush=True)

    def _step(self, record: Mapping[str, float], step: int) -> str:
        left = f"  {duration(self._pace.seconds_left(step))} left" if step < self.num_steps else ""
        return (
            f"{losses(record, 'loss')}  norm {record.get('gradient_norm', math.nan):.3f}  "
            f"{'skipped  ' if 'skipped' in record else ''}lr {record['learning_rate']:.2e}  "
            f"{record['tokens_per_second']:,.0f} tok/s{left}"
        )

    def close(self) -> None:
        pass


def _measures(record: Mapping[str, float]) -> str:
    """Return the measures of a validation record as text, but for those of single labels and data sets."""
    beside = ("validation_loss", "validation_seconds")
    names = [name for name in record if name.startswith(MEASURE) and name not in beside and "/" not in name]
    return "".join(f"  {name.removeprefix(MEASURE)} {record[name]:.4f}" for name in names)


def losses(record: Mapping[str, float], key: str) -> str:
    """Return the loss under `key` as text, and in brackets its parts.

    Parts are `NAME_key` of each objective, `key/NAME` of each source, and `NAME_key/SOURCE` of both.
    """
    parts = []
    for name, value in record.items():
        # For key "loss": "loss/code" -> (None, code), "mlm_loss" -> (mlm, None), "mlm_loss/code" -> (mlm, code).
        found = re.fullmatch(rf"(?:([^/]+)_)?{key}(?:/(.+))?", name)
        if found is None or name == key:
            continue
        objective, source = found.groups()
        if objective is None or not f"_{objective}".endswith("_validation"):  # a validation loss is no training loss
            parts.append(f"{' '.join(filter(None, (source, objective)))} {value:.4f}")
    return f"loss {record.get(key, math.nan):.4f}" + (f" ({', '.join(parts)})" if parts else "")
