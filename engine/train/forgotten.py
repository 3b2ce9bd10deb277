"""Forgotten documents as a run sees them: the checkpoints that were trained on them, and what its loader makes of them.

Reads manifests, document offsets, and the shards that hold the documents; changes nothing. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from engine.checkpoint import manifest_json
from engine.checkpoint.folder import CHECKPOINTS, committed
from engine.config import save
from engine.config.load import load_run
from engine.config.rules.tables import REPLAY
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.data.forgetting import Scan, scan, trained_on
from engine.data.objectives.sampling import Sampler, make_sampler
from engine.data.order.sample_order import START, SampleId
from engine.data.replay.view import ReplayDataset
from engine.data.shards.cache import ShardCache
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.tombstones import NO_TOMBSTONES, Tombstones, read_tombstones
from engine.data.stage import open_parts, open_reservoir, open_validation, run_stage_seed, stage_stream
from engine.data.stream import Stream
from engine.errors import CheckpointError, ConfigError, DataError
from engine.train.saved_reservoir import frozen_generation, kept_generation, open_stage, pinned_files


@dataclass(frozen=True)
class Held:
    """A checkpoint, and the documents that it was trained on."""

    name: str
    documents: Tombstones
    unknown: str = ""
    """Reason why it cannot be told of some of its run stages; empty where it can."""


class RunOfDocuments:
    """A run folder, for questions about documents."""

    def __init__(self, folder: Path) -> None:
        """Read its configuration. Raises `ConfigError` where it is no run folder."""
        if not (folder / save.FILE).is_file():
            raise ConfigError(
                f"--run {folder} is no run folder: it holds no {save.FILE}",
                "the folder of a run that was started once",
                "check the path, or leave --run out for data in a folder that can be written to",
            )
        self.folder = folder
        self.config: RunConfig = load_run(folder / save.FILE)
        self._stream = cache(self._open_stream)

    def held(self, documents: Tombstones) -> Iterator[Held]:
        """Yield the checkpoints of the run, newest first, each with those of the documents that it was trained on."""
        for path in committed(self.folder / CHECKPOINTS):
            try:
                sections = manifest_json.read(path).state.sections
                number, loader = int(sections["progress"]["run_stage"]), sections["loader"]
                addresses = tuple(SampleId(*map(int, address)) for address in loader["addresses"])
            except CheckpointError as error:
                yield Held(path.name, NO_TOMBSTONES, f"damaged: {error.wrong}")
                continue
            except (KeyError, TypeError, ValueError) as error:
                yield Held(path.name, NO_TOMBSTONES, f"it says nothing of its data ({error!r})")
                continue
            found, reasons = NO_TOMBSTONES, []
            for stage in range(min(number + 1, len(self.config.stages))):
                try:
                    stream = self._stream(stage)
                    here = addresses if stage == number else self._end(stage, stream)
                    found = found | _passed(stream, here, documents)
                except DataError as error:
                    reasons.append(f"stage {self.config.stages[stage].name}: {error.wrong}")
            yield Held(path.name, found, "; ".join(reasons))

    def scan(self, added: Tombstones) -> Iterator[tuple[str, Scan | DataError]]:
        """Yield a name of each data set of each run stage that holds forgotten documents, and its scan, or why there is
        none. `added` are taken as forgotten besides those that are."""
        tombstones = added | read_tombstones(self.folder)
        for stage in self.config.stages:
            try:
                parts = open_parts(stage, None, self.config.model.vocab_size, tombstones)
                sets = [(part.name or "data", part.dataset) for part in parts]
                held_out = open_validation(stage, None, self.config.model.vocab_size, tombstones) or []
                sets += [(f"validation {name}".rstrip(), dataset) for name, dataset in held_out]
            except DataError as error:
                yield f"stage {stage.name}", error
                continue
            for name, dataset in sets:
                if len(dataset.tombstones):
                    cached = stage.data.cache
                    store = None if cached is None else ShardCache(cached.folder, cached.bytes)
                    other = TokenDataset(dataset.location, None, store, tombstones, another_token(dataset))
                    yield f"stage {stage.name}, {name}", scan(dataset, other, _samplers(stage, dataset, other))
        yield from self._scan_reservoir(tombstones)

    def _scan_reservoir(self, tombstones: Tombstones) -> Iterator[tuple[str, Scan | DataError]]:
        """Yield the scans of what run stages replay of the run's reservoir, and of what it holds now."""
        config = self.config
        try:
            views = [
                (f"stage {stage.name}, {REPLAY}", stage, frozen_generation(config, number))
                for number, stage in enumerate(config.stages)
                if stage.replays_reservoir
            ]
            if (kept := kept_generation(config)) is not None:
                # its rows are dropped when the run starts again; until then the place of each is empty, too
                views.append((f"the reservoir of {kept[0]}", config.stages[-1], kept[1]))
        except CheckpointError as error:
            yield "the reservoir", DataError(error.wrong, error.allowed, error.remedy)
            return
        for name, stage, generation in views:
            if generation is None or not generation.num_rows:
                continue
            try:
                view = open_reservoir(config.stages, generation, [], None, config.model.vocab_size, tombstones)
            except DataError as error:
                yield name, error
                continue
            if len(view.tombstones):
                other = view.with_fill(another_token(view))
                yield name, scan(view, other, _samplers(stage, view, other))

    def pinned(self, documents: Tombstones) -> Iterator[tuple[str, Tombstones]]:
        """Yield the files of pinned rows that the run's checkpoints name, each with those of the documents that it
        holds. The next run stage's end writes files without them. Raises `CheckpointError` where one is damaged."""
        for name, rows in pinned_files(self.config):
            found = {
                content_hash: np.intersect1d(numbers, documents.of(content_hash))
                for content_hash, numbers in rows.documents.items()
            }
            yield name, Tombstones({key: mine.tolist() for key, mine in found.items() if mine.size})

    def _open_stream(self, number: int) -> Stream:
        stage = self.config.stages[number]
        parts = open_stage(self.config, number)
        return stage_stream(stage, parts, run_stage_seed(self.config.seed, number))

    def _end(self, number: int, stream: Stream) -> tuple[SampleId, ...]:
        """Return the addresses at which a completed run stage has ended."""
        stage = self.config.stages[number]
        counts = stream.mix(stage.batches.samples(stage.num_steps))
        ends = zip(stream.order.sources, counts, strict=True)
        return tuple(source.order.after(START, count) for source, count in ends)


def _samplers(stage: RunStage, *sets: TokenDataset) -> tuple[Sampler, Sampler]:
    """Return the samplers of a run stage's rows over two data sets, with any seed: it does not move texts in rows."""
    how = (stage.sequence_length, 0, stage.data.attention, stage.data.packing, stage.objective)
    one, other = (make_sampler(dataset, *how) for dataset in sets)
    return one, other


def another_token(dataset: TokenDataset) -> int:
    """Return a token that is not the end of the text: an ordinary one, where the tokenizer's are known."""
    index = dataset.index
    if index.vocabulary is not None and index.vocabulary.ordinary_ids.size:
        return int(index.vocabulary.ordinary_ids[0])
    return 1 if index.eos_id == 0 else 0


def _passed(stream: Stream, addresses: tuple[SampleId, ...], documents: Tombstones) -> Tombstones:
    """Return those of the documents of which a sample came before the addresses."""
    found: dict[str, list[int]] = {}
    for source, address in zip(stream.order.sources, addresses, strict=True):
        if isinstance(source.dataset, ReplayDataset):
            continue  # what is in the reservoir was trained on in an earlier run stage, and is found there
        for number, entry in enumerate(source.dataset.index.shards):
            mine = documents.of(entry.content_hash)
            if mine.size:
                found.setdefault(entry.content_hash, []).extend(
                    mine[trained_on(source, address, number, mine)].tolist()
                )
    return Tombstones(found)
