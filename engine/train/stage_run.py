"""A run stage while it is trained: its data sets, stream and feed, opened at its beginning and closed at its end.

The model is built once for all run stages. The data of those to come is opened when the run starts, so that a problem
with it is reported then and not weeks later; the data of completed run stages may be gone. What a run stage
replays from the run's reservoir is known when it begins, and is opened then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from engine.config.schema.run import RunConfig
from engine.data.replay.generation import Generation
from engine.data.shards.tombstones import Tombstones, read_tombstones
from engine.data.source import WeightedDataset
from engine.data.stage import open_parts, open_validation, run_stage_seed, stage_stream, with_reservoir
from engine.data.stage_validation import OtherValidation, open_others
from engine.data.tokenizer.folder import tokenizer_hash
from engine.data.validation import ValidationSet
from engine.errors import CheckpointError, DataError
from engine.parallel.agreement import on_all
from engine.parallel.groups import Groups
from engine.parallel.meeting import agree_over
from engine.parallel.stage import PipelineStageSpec
from engine.train.build import during
from engine.train.facts import facts_of_data
from engine.train.feed import Feed


class Datasets(NamedTuple):
    """Opened data of a run stage, checked against the run's tokenizer."""

    training: list[WeightedDataset]
    validation: list[ValidationSet] | None
    others: OtherValidation
    """Validation sets of the other run stages."""


class RunData:
    """The data of a run's stages, opened when it is needed. Methods are collective over the world."""

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        self._config, self._groups = config, groups
        self._opened: dict[int, Datasets] = {}

    def open(self, numbers: Sequence[int]) -> None:
        """Open the data of run stages, and end where it does not serve them or is not the same on all ranks.

        Raises:
            DataError: missing, damaged, written with another tokenizer, or too short, on every rank.
            Disagreement: ranks have different data.
        """
        world = self._groups.world
        opened = on_all(lambda: {number: self._open(number) for number in numbers}, world, DataError)
        # Apart from `opened`: fingerprints are compared only once every rank has its data.
        facts = on_all(lambda: self._facts(opened), world, DataError)
        agree_over(world, facts)
        self._opened |= opened

    def take(self, number: int, generation: Callable[[], Generation | None]) -> Datasets:
        """Return the data of a run stage, which nobody takes a second time. `generation` is called where the run stage
        replays the run's reservoir.

        Raises:
            CheckpointError: the reservoir cannot be read.
            DataError: as `open`; or the reservoir is empty, or too many of its rows are lost.
            Disagreement: ranks have different data.
        """
        if number not in self._opened:
            self.open([number])
        # popped: the data of completed run stages is not held open to the end of the run
        datasets = self._opened.pop(number)
        if not self._config.stages[number].replays_reservoir:
            return datasets
        world = self._groups.world
        frozen = on_all(generation, world, CheckpointError)
        datasets = on_all(lambda: self._with_reservoir(number, datasets, frozen), world, DataError)
        agree_over(world, facts_of_data(datasets.training[-1:], None))
        return datasets

    def _with_reservoir(self, number: int, datasets: Datasets, generation: Generation | None) -> Datasets:
        training = with_reservoir(self._config.stages, number, datasets.training, generation, *self._checked())
        return datasets._replace(training=training)

    def _checked(self) -> tuple[str, int, Tombstones]:
        """Return what data sets are compared with, and the documents that they go without."""
        config = self._config
        # those of the data folders are read while these are opened; a run learns of later ones at its next start
        return tokenizer_hash(config.tokenizer), config.model.vocab_size, read_tombstones(config.folder)

    def _open(self, number: int) -> Datasets:
        config, run_stage, checked = self._config, self._config.stages[number], self._checked()
        own = open_validation(run_stage, *checked)
        others = open_others(config.stages, number, own, *checked)
        found = Datasets(open_parts(run_stage, *checked), own, others)
        # long enough, and not empty; with the run's reservoir `StageRun` says so
        if not run_stage.replays_reservoir:
            stage_stream(run_stage, found.training, run_stage_seed(config.seed, number))
        return found

    def _facts(self, opened: dict[int, Datasets]) -> dict[str, object]:
        facts: dict[str, object] = {"tokenizer": tokenizer_hash(self._config.tokenizer)}
        for number, datasets in opened.items():
            where = f"run stage {self._config.stages[number].name}: " if len(self._config.stages) > 1 else ""
            validation = [*(datasets.validation or []), *(named for sets in datasets.others for named in sets)]
            facts |= {where + name: fact for name, fact in facts_of_data(datasets.training, validation).items()}
        return facts


class StageRun:
    """One run stage of a run. Close it to end the thread that reads its data."""

    def __init__(
        self,
        number: int,
        config: RunConfig,
        datasets: Datasets,
        groups: Groups,
        device: torch.device,
        spec: PipelineStageSpec,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.number, self.run_stage = number, config.stages[number]
        self.spec = during(spec, config, self.run_stage)
        training, validation, others = datasets
        self.feed = Feed(training, validation, config, number, groups, device, self.spec, stop_requested, others)
        self._beginning = self.feed.stream.state()

    def rewind(self) -> None:
        """Put the stream at its beginning; call while nothing is read."""
        self.feed.restore(self._beginning, raised=[])

    def close(self) -> None:
        """End the reading thread; safe to call twice."""
        self.feed.close()
