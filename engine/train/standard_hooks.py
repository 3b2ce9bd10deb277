"""The hooks of every run, in their order, and the two small ones among them: metrics, and checkpoints in memory."""

from __future__ import annotations

from engine.config.rules.tables import REPLAY
from engine.config.schema.adapter import AdaLoRAConfig
from engine.config.schema.run import RunConfig
from engine.data.stream import Stream
from engine.errors import EnvironmentProblem
from engine.logs import phase
from engine.parallel.agreement import on_all
from engine.train.admission import Admission
from engine.train.best_link import BestCheckpoint
from engine.train.early_stopping import EarlyStopping
from engine.train.evaluation import Validation
from engine.train.hooks import Hook, Run
from engine.train.metrics import Metrics, open_metrics
from engine.train.node_speed import NodeSpeed
from engine.train.predictions import Measure
from engine.train.rank_allocation import RankAllocation
from engine.train.records import Record
from engine.train.regularization import Regularization
from engine.train.rollback import Stability


def standard_hooks(config: RunConfig, is_main_rank: bool, measure: Measure | None = None) -> list[Hook]:
    """Return the hooks of a run in the order in which they are called.

    Metrics come first: what other hooks record has to find the files open, and cut at the step where the run goes on.
    Validation comes last, before what its records decide: a checkpoint does not wait for it. `measure` measures the
    predictions of a run's task.
    """
    kept: list[Hook] = [Admission(config, config.reservoir)] if config.reservoir is not None else []
    kept += [MemoryCheckpoints(config), NodeSpeed(config.launch.probe_every_steps), Regularization()]
    if isinstance(config.model.adapter, AdaLoRAConfig):
        kept.append(RankAllocation(config.model.adapter))
    judges: list[Hook] = [BestCheckpoint(config, is_main_rank)] if config.checkpoint.keep_best else []
    judges += [EarlyStopping(config)] if config.evaluation.early_stopping is not None else []
    return [Recorder(), Stability(config.stability), *kept, Validation(measure), *judges]


class Recorder(Hook):
    """Hook that writes records to the sinks (`engine.train.metrics`), and adds the counts of the data to them."""

    def __init__(self) -> None:
        self._metrics = Metrics([])

    def start(self, run: Run) -> bool:
        """Open what the configuration asks for, on the main rank."""
        with phase("opening metrics and trackers"):
            self._metrics = on_all(lambda: self._open(run), run.groups.world, EnvironmentProblem)
        return False

    def after_step(self, run: Run) -> Record:
        """Return the samples and tokens of each source in this run stage, its replay, the shards that it does without,
        and the number of the run stage where there are several."""
        stream, length = run.feed.stream, run.run_stage.sequence_length
        added: Record = {f"{name}_samples": count for name, count in stream.drawn().items()}
        added |= {f"tokens/{name}": count * length for name, count in stream.trained().items()}
        if stream.shares.ratios is not None:
            added |= _replayed(stream, run.state.stage_step)
        if len(run.config.stages) > 1:
            added["run_stage"] = run.state.run_stage
        # Absent where nothing is lost: a column of zeros in every record would only be noise.
        return added | ({"lost_shards": len(stream.lost)} if stream.lost else {})

    def take_record(self, record: Record) -> None:
        self._metrics.write(record)

    def after_rollback(self, run: Run) -> None:
        """Open everything anew, so that the steps which will come again stand once."""
        self._metrics.close()
        self._metrics = on_all(lambda: self._open(run), run.groups.world, EnvironmentProblem)

    def close(self) -> None:
        self._metrics.close()
        self._metrics = Metrics([])

    @staticmethod
    def _open(run: Run) -> Metrics:
        if not run.is_main_rank:
            return Metrics([])
        return open_metrics(run.config, run.state.step, run.state.rollbacks)


def _replayed(stream: Stream, stage_step: int) -> Record:
    """Return the samples replayed since the run stage began, the ratio of its last step, and the epochs so far."""
    replayed = stream.trained()[REPLAY]
    return {
        "replay_samples": replayed,
        "replay_ratio": float(stream.shares.ratio(stage_step - 1)),
        "replay_epochs": replayed / stream.replay_rows,
    }


class MemoryCheckpoints(Hook):
    """Hook that begins a checkpoint in the nodes' memory after every `checkpoint.memory.every_steps` steps."""

    def __init__(self, config: RunConfig) -> None:
        memory = config.checkpoint.memory
        self._every_steps = memory.every_steps if memory is not None else None

    def between_steps(self, run: Run) -> bool:
        """Begin one where it is due, except after a step that the disk has."""
        step = run.state.step
        if self._every_steps is not None and step % self._every_steps == 0 and run.checkpoints.begun_step != step:
            run.save_in_memory()
        return False
