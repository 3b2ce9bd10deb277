"""The sections of what is saved: when, where, and what stays."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from engine.config.schema.section import KeyKind, Section


class MemoryConfig(Section):
    """Checkpoints in the memory of the nodes between those on the disk: a node holds its own ranks' files and those of
    the node before it, so that a run outlives any one node without going back to the disk."""

    kind: ClassVar[KeyKind] = "execution"

    every_steps: PositiveInt
    """Number of steps from one checkpoint in memory to the next, except where one goes to the disk or the one before is
    still under way."""
    folder: Path = Field(default=Path("/dev/shm"), validate_default=False)  # in JSON only text is a path
    """Folder in a node's memory. Each file is there at most four times: of two steps, on two nodes."""


class CheckpointConfig(Section):
    """Checkpoints on the disk, and between them in the nodes' memory."""

    kind: ClassVar[KeyKind] = "execution"

    every_steps: PositiveInt | None = None
    """Number of steps from one checkpoint to the next; there is one at the end, too. None means at the end only."""
    every_minutes: PositiveFloat | None = None
    """Minutes from one checkpoint to the next, by the main rank's clock; any checkpoint restarts the clock. Beside
    `every_steps`, which it leaves as it is. None means by steps alone."""
    asynchronous: bool = True
    """Saving beside the training: the step that saves copies to host memory, and the commit follows some steps later.
    One save at a time; the end of a run waits. Either way it takes host memory for one copy of what a rank stores."""
    on_failure: Literal["stop", "continue"] = "stop"
    """Reaction to a save that failed (no space, no permission): end the run, or report it on every rank and go on to
    the next one. A run that ends without its last checkpoint has failed either way."""
    keep_last: PositiveInt = 2
    """Number of the newest checkpoints that stay. A checkpoint that no `keep_` key keeps is removed, but never the
    newest verified one, nor the last one of a run stage."""
    keep_every: PositiveInt | None = None
    """Number of steps whose multiples' checkpoints stay for ever. None means none of them."""
    keep_best: NonNegativeInt = 0
    """Number of checkpoints with the best `best_metric` that stay."""
    best_metric: str = "validation_loss"
    """Name of the metric, as in `metrics.jsonl`, that `keep_best` compares: `validation_loss`, `loss` (of training), or
    of a task also `validation_accuracy` and its other measures. Of losses and errors the least is the best, of other
    measures the largest; of equal ones the earliest."""
    memory: MemoryConfig | None = None
    """Further checkpoints, in the nodes' memory; a restart of the same job goes on from there. None means on the disk
    alone."""
