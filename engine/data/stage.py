"""The data of a run stage, opened as its configuration says: data sets, their shares, and the stream over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from engine.config.rules.data import whole_parts
from engine.config.rules.tables import REPLAY, replay_ratios, whole_row
from engine.config.schema.data import DataConfig
from engine.config.schema.stage import RunStage
from engine.data.replay.generation import MOST_STALE, Generation
from engine.data.replay.view import ReplayDataset
from engine.data.shards.cache import ShardCache
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.folders import data_sets, domains
from engine.data.shards.remote import RemoteFolder, is_remote
from engine.data.shards.tombstones import NO_TOMBSTONES, Tombstones
from engine.data.shares import ShareTable
from engine.data.source import WeightedDataset
from engine.data.stream import Stream
from engine.data.validation import ValidationSet
from engine.errors import DataError
from engine.logs import logger

_log = logger(__name__)
PURPOSE_RUN_STAGE = int.from_bytes(b"run stage")
MANY_EPOCHS, MOST_EPOCHS = 4, 40
"""Epochs over replayed data beyond which a run stage warns, and is refused: up to 4 repeated data is worth nearly as
much as new, at 40 nothing more is learned (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models")."""


def run_stage_seed(seed: int, number: int) -> int:
    """Return the seed of the order, the masks and the dropout of run stage `number` (from 0) of a run.

    The first one has the run's own. The later ones have their own, so that a run stage over data which an earlier one
    has seen does not begin with the same samples.
    """
    if number == 0:
        return seed
    words = np.random.SeedSequence((seed, PURPOSE_RUN_STAGE, number)).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])


def open_parts(
    run_stage: RunStage, tokenizer_hash: str | None, vocab_size: int, tombstones: Tombstones = NO_TOMBSTONES
) -> list[WeightedDataset]:
    """Open the training data of a run stage, with weights; what it replays from a folder is the last.

    `tombstones` are those of the run folder. The run's reservoir is added by `with_reservoir`, once it is known.

    Raises:
        DataError: missing, damaged, written with another tokenizer, or of more tokens than `vocab_size`.
    """
    data, replay = run_stage.data, run_stage.replay
    checked = (tokenizer_hash, vocab_size, tombstones)
    keys = [f"data.sources.{number}.path" for number in range(len(data.sources))] or ["data.train"]
    sets = [_open(run_stage, *named, *checked) for named in zip(keys, data.training_locations, strict=True)]
    replayed: list[WeightedDataset] = []
    if replay is not None and replay.source is not None:
        opened = _open(run_stage, "replay.source", replay.source, *checked)
        if opened.index.synthetic is not None:
            _log.info("stage %s replays synthetic text, %s", run_stage.name, opened.index.synthetic)
        replayed = [_replayed(run_stage, opened)]
    every = [*sets, *(part.dataset for part in replayed)]
    _refuse_other_tokens(every)
    _refuse_small_cache(data, every)
    return [*([WeightedDataset(sets[0])] if data.train is not None else _mixed(run_stage, sets)), *replayed]


def with_reservoir(
    stages: Sequence[RunStage],
    number: int,
    parts: list[WeightedDataset],
    generation: Generation | None,
    tokenizer_hash: str | None,
    vocab_size: int,
    tombstones: Tombstones = NO_TOMBSTONES,
) -> list[WeightedDataset]:
    """Return the opened training data of run stage `number` with a generation of the run's reservoir as the last.

    Raises:
        DataError: the reservoir is empty, or too many of its rows are lost.
    """
    run_stage = stages[number]
    assert run_stage.replay is not None
    if generation is None or not generation.num_rows:
        raise DataError(
            f"stage {run_stage.name} replays from the run's reservoir, which is empty: nothing was admitted before the "
            "stage began",
            "a reservoir that an earlier run stage has filled",
            f"set stages.{number}.replay.source to a folder of token shards, or leave `replay` out",
        )
    opened = [part.dataset for part in parts]
    view = open_reservoir(stages[:number], generation, opened, tokenizer_hash, vocab_size, tombstones)
    every = [*parts, _replayed(run_stage, view)]
    _refuse_small_cache(run_stage.data, [part.dataset for part in every])
    return every


def _replayed(run_stage: RunStage, dataset: TokenDataset) -> WeightedDataset:
    """Return a data set as what a run stage replays."""
    replay = run_stage.replay
    assert replay is not None
    # with an objective of its own its mean loss is weighed, which is known once all ranks have read the step
    weight = replay.loss_weight if replay.objective is None else 1.0
    return WeightedDataset(dataset, REPLAY, loss_weight=weight, is_replay=True, objective=replay.objective)


def open_reservoir(
    stages: Sequence[RunStage],
    generation: Generation,
    opened: Sequence[TokenDataset],
    tokenizer_hash: str | None,
    vocab_size: int,
    tombstones: Tombstones = NO_TOMBSTONES,
    most_stale: float = MOST_STALE,
) -> ReplayDataset:
    """Return the rows of a generation, read from data sets that are open and from the training data of run stages.

    Shards are found by their content. Data of completed run stages may be gone: then the rows that are not pinned are
    lost, as far as `ReplayDataset` allows.

    Raises:
        DataError: too many rows are lost.
    """
    datasets = list(opened)
    known = {dataset.location for dataset in datasets}
    for earlier in stages:
        for location in earlier.data.training_locations:
            if location not in known:
                known.add(location)
                try:
                    datasets.append(_open(earlier, "data", location, tokenizer_hash, vocab_size, tombstones))
                except DataError as error:
                    _log.warning("data of run stage %s is not there to be replayed: %s", earlier.name, error.wrong)
    return ReplayDataset(generation, datasets, tombstones, most_stale)


def _mixed(run_stage: RunStage, sets: list[TokenDataset]) -> list[WeightedDataset]:
    """Return the opened sources of a mixture with their weights and limits."""
    data, length = run_stage.data, run_stage.sequence_length
    return [
        WeightedDataset(
            dataset,
            source.name,
            weight,
            source.loss_weight,
            source.epochs,
            # whole rows, but one at least
            None if source.max_tokens is None else max(1, source.max_tokens // length),
        )
        for source, dataset, weight in zip(data.sources, sets, _weights(data, sets), strict=True)
    ]


def open_validation(
    run_stage: RunStage, tokenizer_hash: str | None, vocab_size: int, tombstones: Tombstones = NO_TOMBSTONES
) -> list[ValidationSet] | None:
    """Open the validation sets of a run stage, by name; None if it has none. Raises as `open_parts`."""
    return _open_sets(run_stage, "data.validation", run_stage.data.validation, tokenizer_hash, vocab_size, tombstones)


def open_replayed_validation(
    run_stage: RunStage, tokenizer_hash: str | None, vocab_size: int, tombstones: Tombstones = NO_TOMBSTONES
) -> list[ValidationSet] | None:
    """Open the held-out text for the objective of what a run stage replays, by name; None if it has none. Raises as
    `open_parts`."""
    given = None if run_stage.replay is None else run_stage.replay.validation
    found = _open_sets(run_stage, "replay.validation", given, tokenizer_hash, vocab_size, tombstones)
    return None if found is None else [(name or REPLAY, dataset) for name, dataset in found]


def _open_sets(
    run_stage: RunStage,
    key: str,
    given: str | dict[str, str] | None,
    tokenizer_hash: str | None,
    vocab_size: int,
    tombstones: Tombstones,
) -> list[ValidationSet] | None:
    if given is None:
        return None
    locations = given if isinstance(given, dict) else validation_locations(given, run_stage.data)
    opened = [
        (name, _open(run_stage, key, location, tokenizer_hash, vocab_size, tombstones))
        for name, location in locations.items()
    ]
    _refuse_other_tokens([dataset for _, dataset in opened])
    return opened


def validation_locations(location: str, data: DataConfig) -> dict[str, str]:
    """Return the data sets that one folder or URL stands for, by name: itself (unnamed), or each sub-folder that holds
    shards. The two parts of what `palimpsest prepare` wrote are no domains: one of them is trained on."""
    if is_remote(location):
        assert data.cache is not None, "resolve() lets no URL without a cache pass"
        names = RemoteFolder(location, ShardCache(data.cache.folder, data.cache.bytes)).data_sets()
    else:
        names = data_sets(Path(location))
    return {name: f"{location.rstrip('/')}/{name}" for name in domains(names)} or {"": location}


def stage_stream(run_stage: RunStage, parts: list[WeightedDataset], seed: int) -> Stream:
    """Return the stage's stream at its beginning. Raises `DataError` where the data does not serve the stage."""
    data = run_stage.data
    stream = Stream(
        parts,
        run_stage.sequence_length,
        run_stage.batches,
        seed,
        data.window_shards,
        data.attention,
        data.packing,
        run_stage.objective,
        share_table(run_stage, parts),
        data.row_lengths,
    )
    wanted = run_stage.batches.samples(run_stage.num_steps)
    if stream.num_samples is not None and stream.num_samples < wanted:
        raise DataError(
            f"stage {run_stage.name} trains on {wanted:,} samples, but its sources end after {stream.num_samples:,}",
            f"{wanted:,} samples or more",
            "raise data.sources.*.epochs or max_tokens, or shorten the stage",
        )
    if run_stage.replay is not None:
        _check_replayed(run_stage, stream)
    return stream


def share_table(run_stage: RunStage, parts: list[WeightedDataset]) -> ShareTable:
    """Return the shares of the sources of a run stage over its steps."""
    ratios, data = replay_ratios(run_stage), run_stage.data
    new = parts if ratios is None else parts[:-1]
    assert ratios is None or parts[-1].is_replay, "what is replayed from the run's reservoir is added before"
    weights = ((0, tuple(part.weight for part in new)),)
    if data.weights_table is not None:
        names = [part.name for part in new]
        weights = tuple((run_stage.first_step(row), whole_row(row, names)) for row in data.weights_table)
    return ShareTable(weights, ratios)


def check_raised_ratio(run_stage: RunStage, stream: Stream, ratio: float) -> None:
    """Raise `DataError` where the replayed data does not serve a ratio that an alarm may raise replay to."""
    largest, rows = math.ceil(Fraction(str(ratio)) * run_stage.batches.largest), stream.replay_rows
    if largest > rows:
        raise DataError(
            f"evaluation.raised_ratios: {ratio:g} of a step of {run_stage.batches.largest:,} samples are {largest:,}, "
            f"and stage {run_stage.name} has {rows:,} to replay in {stream.parts[-1].dataset.location}",
            "no row twice in a step",
            "lower the ratios, or replay from more data",
        )


def _check_replayed(run_stage: RunStage, stream: Stream) -> None:
    """Raise `DataError` where the replayed data does not serve the ratio, and warn where it is read often."""
    batches, source = run_stage.batches, stream.parts[-1].dataset.location
    replayed, rows = stream.mix(batches.samples(run_stage.num_steps))[-1], stream.replay_rows
    # of the steps at which a ratio or a size begins, the one that replays most; one sample more for what is rounded
    steps = {*(first for first, _ in stream.shares.ratios or ()), *batches.first_steps}
    shares = ((stream.shares.ratio(step), batches.size(step)) for step in steps if step < run_stage.num_steps)
    largest = max(math.ceil(ratio * size) for ratio, size in shares)
    epochs = replayed / rows
    told = f"stage {run_stage.name} replays {replayed:,} samples of {rows:,} in {source}: {epochs:.1f} epochs"
    if largest > rows or epochs > MOST_EPOCHS:
        step = f", and up to {largest:,} in one step" if largest > rows else ""
        raise DataError(
            f"{told}{step}",
            f"at most {MOST_EPOCHS} epochs, and no row twice in a step",
            "lower replay.ratio, shorten the stage, or replay from more data",
        )
    if epochs > MANY_EPOCHS:
        _log.warning("%s; beyond %d epochs repetition serves less and less", told, MANY_EPOCHS)


def _open(
    run_stage: RunStage,
    key: str,
    folder: str,
    tokenizer_hash: str | None,
    vocab_size: int,
    tombstones: Tombstones,
) -> TokenDataset:
    """Open a data set that `key` of a run stage names. Raises `DataError`, which names the stage and the key."""
    found = run_stage.data.cache
    cache = None if found is None else ShardCache(found.folder, found.bytes)
    try:
        dataset = TokenDataset(folder, tokenizer_hash, cache, tombstones)
    except DataError as error:
        wrong = f"stage {run_stage.name}, {key}: {error.wrong}"
        raise DataError(wrong, error.allowed, error.remedy) from error
    if dataset.index.vocab_size > vocab_size:
        raise DataError(
            f"the shards in {folder} have {dataset.index.vocab_size} tokens in their vocabulary, "
            f"model.vocab_size = {vocab_size}",
            f"model.vocab_size of {dataset.index.vocab_size} or more",
            "change the model, or prepare the text with a smaller tokenizer",
        )
    return dataset


def _refuse_small_cache(data: DataConfig, sets: list[TokenDataset]) -> None:
    """Raise `DataError` if the cache does not hold two windows of shards: the one in use, and the next."""
    needed = 0
    for dataset in sets:
        if dataset.is_remote:
            sizes = sorted(dataset.stored_bytes(number) for number in range(dataset.num_shards))
            # the largest shards, since which ones meet in a window changes with every epoch
            needed += sum(sizes[-2 * data.window_shards :])
    if data.cache is not None and data.cache.bytes < needed:
        raise DataError(
            f"data.cache.bytes = {data.cache.bytes:,} is less than two windows of {data.window_shards} shards",
            f"{needed:,} or more",
            "make the cache larger, or data.window_shards smaller (which mixes less)",
        )


def _refuse_other_tokens(sets: list[TokenDataset]) -> None:
    """Raise `DataError` if two data sets were written with different tokenizers."""
    first = sets[0]
    for other in sets[1:]:
        if other.index.tokenizer_hash != first.index.tokenizer_hash:
            raise DataError(
                f"{other.location} was written with tokenizer {other.index.tokenizer_hash}, "
                f"{first.location} with {first.index.tokenizer_hash}",
                "one tokenizer for all sources",
                "prepare one of them again",
            )


def _weights(data: DataConfig, sets: list[TokenDataset]) -> tuple[int, ...]:
    """Return the weights of the sources, where a table changes them the first ones."""
    if data.weights_table is not None:
        return whole_row(data.weights_table[0], [source.name for source in data.sources])
    given = [source.weight for source in data.sources if source.weight is not None]
    if given:
        return whole_parts(given)  # resolve() has checked them
    tokens = [dataset.index.num_tokens for dataset in sets]
    try:
        return whole_parts(tokens if data.temperature == 1 else [count ** (1 / data.temperature) for count in tokens])
    except (ValueError, OverflowError) as error:  # a temperature close to 0 is a large power
        raise DataError(
            f"the sources' tokens do not weigh: {error} ({', '.join(map(str, tokens))} tokens)",
            "no source so much smaller than the others",
            "give weights, or raise data.temperature",
        ) from error
