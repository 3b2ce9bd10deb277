"""Validation sets of a run stage and of the other stages of its run, which say what is forgotten and what transfers.

A run stage is evaluated on its own sets, and on those of the others as it reads data itself: with its objective and its
sequence length. A set without a name has that of its run stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.config.schema.stage import RunStage
from engine.data.shards.tombstones import NO_TOMBSTONES, Tombstones
from engine.data.stage import open_replayed_validation, open_validation
from engine.data.validation import ValidationSamples, ValidationSet
from engine.errors import DataError
from engine.logs import logger

_log = logger(__name__)


class OtherValidation(NamedTuple):
    """Validation sets of the run stages before and after one, each under a name of its own."""

    earlier: list[ValidationSet]
    later: list[ValidationSet]
    replayed: Sequence[ValidationSet] = ()
    """Held-out text for the objective of what the run stage replays."""


def open_others(
    stages: Sequence[RunStage],
    number: int,
    own: list[ValidationSet] | None,
    tokenizer_hash: str,
    vocab_size: int,
    tombstones: Tombstones = NO_TOMBSTONES,
) -> OtherValidation:
    """Open the validation sets of all run stages but number `number`, without those that it has itself, and the
    held-out text for the objective of what that one replays.

    The data of a completed run stage may be gone: such a set is left out, with a warning.

    Raises:
        DataError: the held-out text is not there, or is of another tokenizer.
    """
    # By name and by content: an earlier set may stand in this stage under another name.
    known = {name or stages[number].name for name, _ in own or []} | {dataset.fingerprint for _, dataset in own or []}
    found: tuple[list[ValidationSet], list[ValidationSet]] = ([], [])
    for other, run_stage in enumerate(stages):
        if other == number or run_stage.data.validation is None:
            continue
        try:
            opened = open_validation(run_stage, tokenizer_hash, vocab_size, tombstones) or []
        except DataError as error:
            _log.warning("the held-out data of run stage %s is not evaluated: %s", run_stage.name, error.wrong)
            continue
        for given, dataset in opened:
            name = given or run_stage.name
            if not {name, dataset.fingerprint} & known:
                known |= {name, dataset.fingerprint}
                found[other > number].append((name, dataset))
    replayed = open_replayed_validation(stages[number], tokenizer_hash, vocab_size, tombstones)
    return OtherValidation(*found, replayed or ())


def samples_of(run_stage: RunStage, sets: Sequence[ValidationSet], max_samples: int | None) -> ValidationSamples:
    """Return the samples of validation sets as a run stage reads them. Raises `DataError` as `ValidationSamples`."""
    data = run_stage.data
    return ValidationSamples(
        sets,
        run_stage.sequence_length,
        data.attention,
        max_samples,
        data.packing,
        run_stage.objective,
        data.row_lengths,
    )


def replayed_samples_of(
    run_stage: RunStage, sets: Sequence[ValidationSet], max_samples: int | None
) -> ValidationSamples:
    """Return the samples of held-out text for the objective of what a run stage replays. Raises `DataError` as
    `ValidationSamples`."""
    objective, length = run_stage.replayed_objective, run_stage.sequence_length
    assert objective is not None
    return ValidationSamples(
        sets, length, run_stage.data.attention, max_samples, objective=objective, beside=run_stage.objective
    )


def other_samples(
    run_stage: RunStage, sets: Sequence[ValidationSet], max_samples: int | None
) -> ValidationSamples | None:
    """Return the samples of the sets of other run stages, without those that lack what this one's objective needs."""
    usable = []
    for name, dataset in sets:
        try:
            samples_of(run_stage, [(name, dataset)], max_samples)
        except DataError as error:
            _log.warning("held-out set %s is not evaluated in run stage %s: %s", name, run_stage.name, error.wrong)
            continue
        usable.append((name, dataset))
    return samples_of(run_stage, usable, max_samples) if usable else None
