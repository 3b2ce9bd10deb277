"""The sections of what is saved: when, where, and what stays."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from engine.config.schema.section import Kind, Section


class MemoryConfig(Section):
    """Checkpoints in the memory of the nodes between those on the disk: a node holds its own ranks' files and those of
    the node before it, so that a run outlives any one node without going back to the disk."""

    kind: ClassVar[Kind] = "execution"

    every_steps: PositiveInt
    """One after every so many steps, except where one goes to the disk or the one before is still under way."""
    folder: Path = Field(default=Path("/dev/shm"), validate_default=False)  # in JSON only text is a path
    """Where a node's memory is a folder. Each file is there four times at the most: of two steps, on two nodes."""


class CheckpointConfig(Section):
    kind: ClassVar[Kind] = "execution"

    every_steps: PositiveInt | None = None
    """Save after every so many steps; None means at the end only."""
    asynchronous: bool = True
    """Write beside the training: the step that saves copies to host memory, and the commit follows some steps later.
    One save at a time; the end of a run waits. It takes host memory for one copy of what a rank stores either way."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What a save that failed does (no space, no permission): end the run, or be told of on every rank while the run
    goes on to the next one. A run that ends without its last checkpoint has failed either way."""
    keep_last: PositiveInt = 2
    """The newest so many stay. What no `keep_` key keeps is removed, but never the newest verified one."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that are multiples of this stay for ever."""
    keep_best: NonNegativeInt = 0
    """So many with the least `best_metric` stay."""
    best_metric: Literal["validation_loss", "loss"] = "validation_loss"
    """By what `keep_best` judges: the held-out or the training loss of the saved step."""
    memory: MemoryConfig | None = None
    """More of them, in the nodes' memory; a restart of the same job goes on from there. None: on the disk alone."""
