"""Train state of a run: the half of its state that is not tensors, as plain numbers.

Everything random is a pure function of (seed, position), so a restart needs the numbers below and the loader's few
integers, and no generator's state.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.config.schema.stage import RunStage


@dataclass
class TrainState:
    """Counts of a run; equal on every rank."""

    step: int = 0
    """Steps done, over all run stages."""
    run_stage: int = 0
    """Number of the run stage in which the run stands. Once its steps are done, the next step is the first one of the
    next run stage, if there is one."""
    stage_step: int = 0
    """Steps done of that run stage."""
    updates: int = 0
    """Weight updates done since the moments began at zero, as Adam's bias correction counts them: less than `step`
    where steps were skipped or a run stage has reset the optimizer."""
    updates_before: list[int] = field(default_factory=list)
    """Number of those updates that came before each run stage so far: moments of a parameter that is trained since a
    later run stage have seen the others only."""
    samples: int = 0
    """Samples trained on; those that a rollback left out stand in the loader's state."""
    tokens: int = 0
    """Tokens trained on, padding included."""
    loss: float | None = None
    """Training loss of the last step that had a finite one, so that a restart can show where it goes on."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint after spikes of the loss."""
    raised_ratios: list[tuple[int, int, float]] = field(default_factory=list)
    """(number of a run stage, its step, ratio) of replay that an alarm has raised: from that step on the ratio is this
    one at least."""
    left_out_later: list[tuple[int, int, int]] = field(default_factory=list)
    """(number of a run stage, first, end) of samples that a run stage has to leave out which has not begun yet, since a
    rollback took the run back to the one before it."""

    def count_step(self, run_stage: RunStage, row_length: int, updated: bool, loss: float) -> int:
        """Count a step of the run stage with rows of so many tokens, and return its tokens. `updated` is False where no
        weight was changed."""
        samples = run_stage.batches.size(self.stage_step)
        tokens = samples * row_length
        self.step += 1
        self.stage_step += 1
        self.updates += updated
        self.samples += samples
        self.tokens += tokens
        # The state goes into JSON, which has no NaN.
        if math.isfinite(loss):
            self.loss = loss
        return tokens

    def section(self) -> dict[str, Any]:
        """Return the state as a checkpoint stores it."""
        return asdict(self)

    @classmethod
    def from_section(cls, section: dict[str, Any]) -> TrainState:
        """Return the state of a checkpoint's section."""
        # JSON has no tuples: they come back as lists.
        later = [(number, first, end) for number, first, end in section["left_out_later"]]
        # absent in checkpoints from before an alarm could raise the ratio
        raised = [(number, step, ratio) for number, step, ratio in section.get("raised_ratios", ())]
        return cls(**{**section, "left_out_later": later, "raised_ratios": raised})

    def raised_in(self, number: int) -> list[tuple[int, float]]:
        """Return (step, ratio) of the raised ratios of run stage `number`."""
        return [(step, ratio) for found, step, ratio in self.raised_ratios if found == number]
