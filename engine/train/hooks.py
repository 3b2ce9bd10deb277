"""Hooks: parts of a run that the training loop calls at fixed points, on every rank and in one fixed order.

    start                  the run stands where it goes on
    generation             a run stage that replays the reservoir is about to be opened
    begin_run_stage        the data of a run stage is open
        before_forward     the inputs of a step are read; its passes have not begun
        before_update      gradients are reduced, weights are as they were; may refuse the update
        after_step         the step is counted; returns additions to its record
        take_record        a record is complete: a step's, or another hook's
        before_ratio_change
                           the ratio of replay is about to be raised
        roll_back          may take the run back to a checkpoint
        after_rollback     the run stands at an earlier step again
        between_steps      the step is recorded and, where that was due, saved
        ends_early         is asked whether the run stage ends at this step
    end_run_stage          the last step of a run stage is saved
    close                  the run ends, in an error, too

There are no priorities: the order is that of the list `Hooks` is given, and `close` goes through it backwards. What one
rank alone does (writing metrics) must not wait for the others; what is collective happens on all ranks, since all make
the same calls. A hook that has something to remember over a restart names a section of the checkpoint; sharded
tensors are moments of a parameter shard, not part of a section.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from engine.checkpoint.sections import Sections
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.data.replay.generation import Generation
from engine.heartbeat import Heartbeat
from engine.logs import logger
from engine.parallel.boundary import Tensors
from engine.parallel.groups import Groups
from engine.parallel.pipeline import Pipeline
from engine.parallel.sharding import ParameterSpec
from engine.train.feed import Feed
from engine.train.records import Record
from engine.train.requests import Requests
from engine.train.restore import RUN_SECTIONS
from engine.train.run_checkpoints import RunCheckpoints
from engine.train.state import TrainState
from engine.train.step_totals import Sums
from engine.train.summary import Spent

_log = logger(__name__)


class Run(Protocol):
    """The run as hooks see it: this rank's trainer."""

    config: RunConfig
    groups: Groups
    requests: Requests
    heart: Heartbeat
    sums: Sums
    spent: Spent
    checkpoints: RunCheckpoints

    @property
    def state(self) -> TrainState:
        """Counts of what is done, equal on every rank."""
        ...

    @property
    def run_stage(self) -> RunStage:
        """The run stage in which the run stands."""
        ...

    @property
    def feed(self) -> Feed:
        """Batches of that run stage."""
        ...

    @property
    def pipeline(self) -> Pipeline:
        """This rank's part of the model, for the rows of that run stage."""
        ...

    @property
    def is_main_rank(self) -> bool:
        """True on global rank 0."""
        ...

    @property
    def ends_run_stage(self) -> bool:
        """True where no step of the run stage is left."""
        ...

    def write(self, record: Record) -> None:
        """Hand a record to all hooks."""
        ...

    def save(self, wait: bool) -> None:
        """Begin a checkpoint; with `wait`, end it, too. Collective over the world."""
        ...

    def save_in_memory(self) -> None:
        """Begin a checkpoint in the nodes' memory, except while another one is under way. Collective over the world."""
        ...

    def raise_replay(self, ratio: float) -> None:
        """Replay at least this share of the samples from the next step on, to the end of the run stage. Collective over
        the world."""
        ...

    def go_back(self, first: int) -> None:
        """Load the newest whole checkpoint on the disk, and leave out the samples from position `first` to the last one
        drawn. Counts the rollback. Reading ahead has ended then: `feed.start` begins it again. Collective over the
        world."""
        ...


GradientShard = tuple[ParameterSpec, int, torch.Tensor]
"""(parameter, first element, gradient): a flat range of this rank's tensor-parallel part of a parameter's gradient,
over the whole global batch and before clipping. A view: read it, or change it in place."""


@dataclass(frozen=True)
class Update:
    """A step whose gradients are known and whose weights are not updated; equal on every rank but for `gradients`."""

    step: int
    """Number of the step, from 0, over the whole run."""
    position: int
    """Position of the step's first sample in the stream of the run stage."""
    loss: float
    gradient_norm: float
    """L2 norm of the whole model's gradient before clipping."""
    learning_rate: float
    gradients: Callable[[], Iterator[GradientShard]]
    """Function that yields this rank's part of the gradient; under ZeRO-0 every data rank has the same."""


class Hook:
    """Base of all hooks: does nothing at any point."""

    section: ClassVar[str | None] = None
    """Name of what the hook keeps in checkpoints. None means that it keeps nothing."""

    def start(self, run: Run) -> bool:
        """Begin; return True if a stop was requested on any rank meanwhile."""
        return False

    def generation(self, run: Run) -> Generation | None:
        """Return the earlier data that the run stage in which the run stands is to replay, before its data is opened;
        None where the hook keeps none. Raises `CheckpointError` where it cannot be read."""
        return None

    def begin_run_stage(self, run: Run) -> None:
        """Take note of a run stage that was opened: at its beginning (`run.state.stage_step` is 0), and by each start
        that goes on inside of it."""

    def end_run_stage(self, run: Run) -> None:
        """Take note of a run stage whose last step is done and evaluated, and whose last save has begun."""

    def before_forward(self, run: Run, inputs: list[Tensors], weights_L: torch.Tensor) -> None:
        """Take the inputs of a step's micro-batches, which its passes are about to begin with, and the weights that
        its losses are divided by (fp64)."""

    def before_update(self, run: Run, update: Update) -> bool:
        """Return True if the weights may be updated, on all ranks alike."""
        return True

    def after_step(self, run: Run) -> Record:
        """Return additions to the record of the step that was just counted."""
        return {}

    def take_record(self, record: Record) -> None:
        """Take a complete record."""

    def roll_back(self, run: Run) -> bool:
        """Take the run back to a checkpoint if the steps so far demand it; return True if that was done."""
        return False

    def after_rollback(self, run: Run) -> None:
        """Take note of a state, sections included, that was loaded from an earlier checkpoint."""

    def before_ratio_change(self, run: Run) -> None:
        """Read what is still needed of earlier samples: the ratio of replay changes from the next step on, and then the
        stream no longer knows which sources they came from."""

    def between_steps(self, run: Run) -> bool:
        """Do what belongs between two steps; return True if a stop was requested on any rank meanwhile."""
        return False

    def ends_early(self) -> bool:
        """Return True where the run stage is to end at the step where it stands, on all ranks alike."""
        return False

    def state(self) -> dict[str, Any]:
        """Return the section of a checkpoint, as JSON, equal on every rank."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a section as `state` returned it; not called where the run begins."""

    def close(self) -> None:
        """End; safe after an error, and to call twice."""


class Hooks:
    """The hooks of a run in their order. Each method calls all of them."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = tuple(hooks)
        self._kept = Sections()
        for hook in hooks:
            if hook.section is not None:
                # A checkpoint from before a hook existed, or was switched on, can still be loaded.
                self._kept.register(hook.section, hook, begins_anew=True)

    def start(self, run: Run) -> bool:
        """Start the hooks; return True if a stop was requested on any rank meanwhile: hooks after it do not start."""
        # `any` stops at the first True, as is meant: the answer is the same on every rank.
        return any(hook.start(run) for hook in self._hooks)

    def generation(self, run: Run) -> Generation | None:
        """Return the earlier data to replay of the first hook that keeps some. Raises `CheckpointError`."""
        return next((found for hook in self._hooks if (found := hook.generation(run)) is not None), None)

    def begin_run_stage(self, run: Run) -> None:
        for hook in self._hooks:
            hook.begin_run_stage(run)

    def end_run_stage(self, run: Run) -> None:
        for hook in self._hooks:
            hook.end_run_stage(run)

    def before_forward(self, run: Run, inputs: list[Tensors], weights_L: torch.Tensor) -> None:
        for hook in self._hooks:
            hook.before_forward(run, inputs, weights_L)

    def before_update(self, run: Run, update: Update) -> bool:
        """Return True if every hook accepts the update; each is asked, whatever those before it said."""
        # A list: `all` over a generator would stop at the first False, and each hook has to see every step.
        answers = [hook.before_update(run, update) for hook in self._hooks]
        return all(answers)

    def after_step(self, run: Run) -> Record:
        """Return the additions of all hooks to the record of a step."""
        added: Record = {}
        for hook in self._hooks:
            added |= hook.after_step(run)
        return added

    def take_record(self, record: Record) -> None:
        for hook in self._hooks:
            hook.take_record(record)

    def roll_back(self, run: Run) -> bool:
        """Return True if one of the hooks took the run back; those after it are not asked then."""
        return any(hook.roll_back(run) for hook in self._hooks)

    def after_rollback(self, run: Run) -> None:
        for hook in self._hooks:
            hook.after_rollback(run)

    def before_ratio_change(self, run: Run) -> None:
        for hook in self._hooks:
            hook.before_ratio_change(run)

    def between_steps(self, run: Run) -> bool:
        """Return True if a stop was requested on any rank meanwhile; hooks after it are left out then."""
        return any(hook.between_steps(run) for hook in self._hooks)

    def ends_early(self) -> bool:
        """Return True where a hook ends the run stage at the step where it stands."""
        return any(hook.ends_early() for hook in self._hooks)

    def sections(self) -> dict[str, Any]:
        """Return what hooks keep in a checkpoint, by name."""
        return self._kept.state()

    def restore(self, sections: Mapping[str, Any]) -> None:
        """Hand every hook its section; tell which ones the checkpoint lacks, and which ones no hook keeps."""
        of_hooks = {name: state for name, state in sections.items() if name not in RUN_SECTIONS}
        self._kept.restore(of_hooks, "the checkpoint", _log.info)

    def close(self) -> None:
        # Backwards, so that the recorder, which is first, closes after the hooks that write to it.
        for hook in reversed(self._hooks):
            hook.close()
