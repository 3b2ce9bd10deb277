"""Samplers: a run stage's objective made into rows of a micro-batch, and its needs checked against the shards.

A sampler counts the samples of shards, and makes the model's inputs of those it is asked for. Each objective has a
file of its own beside this one, named after it, with its sampler. Invariant: a sample's inputs are a function of
(data set, objective, sequence length, seed, address); no rank, batch or restart enters.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from engine.config.objectives import OBJECTIVES
from engine.config.schema.data import Attention, PackingName
from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.draws import PURPOSE_OBJECTIVE, words_of_no_sample, write_words
from engine.data.objectives.rows import RowBuffer, SampledRows
from engine.data.shards.dataset import Shard, TokenDataset
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import DataError

TRAIN_TOKENIZER = "train a tokenizer with `palimpsest tokenizer --purpose {}` and prepare the text with it"


class Sampler(Protocol):
    """The samples that one objective makes of a data set."""

    def count(self, shards: np.ndarray) -> np.ndarray:
        """Return the samples in each of the shards (n,), (n,) int64. Raises `DataError` where offsets are damaged."""
        ...

    def make(self, samples_B3: np.ndarray, shard_rows: np.ndarray, num_rows: int) -> SampledRows:
        """Return the rows of the samples at `shard_rows` (rows, 2), filled up to `num_rows` with padding rows.

        Raises `DataError` where a shard is damaged.
        """
        ...

    def rows_of(self, number: int, documents: np.ndarray, epoch: int) -> np.ndarray:
        """Return the rows of a shard in an epoch that hold something of its documents (n,), (rows,) int64, rising."""
        ...

    def ranges(self, samples_B3: np.ndarray, shard_rows: np.ndarray) -> np.ndarray:
        """Return the tokens that the samples at `shard_rows` (rows, 2) are made of, (M, 3) int64: shard, first token,
        the one behind the last. Reads offsets at most; raises `DataError` where these are damaged."""
        ...


@dataclass(frozen=True)
class SamplerContext:
    """The data set, lengths and settings that a sampler is made from."""

    dataset: TokenDataset
    length: int
    """Tokens of a row: the stage's `sequence_length`."""
    seed: int
    attention: Attention
    packing: PackingName
    objective: ObjectiveConfig

    @property
    def vocabulary(self) -> Vocabulary:
        assert self.dataset.index.vocabulary is not None, "require() lets nothing else pass"
        return self.dataset.index.vocabulary

    @property
    def padding_id(self) -> int:
        index = self.dataset.index
        found = index.vocabulary.padding if index.vocabulary is not None else None
        # ends of text pad for a tokenizer that has no padding token
        return index.eos_id if found is None else found

    def shard(self, number: int) -> Shard:
        return self.dataset.shard(number)

    def words(self, samples_B3: np.ndarray, num_rows: int, num_words: int) -> np.ndarray:
        """Return random words of the samples, (num_rows, num_words) uint64; 0 in padding rows."""
        drawn = words_of_no_sample(num_rows, num_words, len(samples_B3))
        write_words(self.seed, PURPOSE_OBJECTIVE, samples_B3, drawn, np.arange(len(samples_B3)))
        return drawn[:, :num_words]

    def segments(self, buffer: RowBuffer) -> np.ndarray:
        """Return segments (B, T) int32: tokens with equal numbers see each other; padding has a number of its own."""
        return buffer.documents_BT if self.attention == "document" else buffer.padding_BT()


class ObjectiveModule(Protocol):
    """The names that an objective's file exports."""

    def make_sampler(self, context: SamplerContext) -> Sampler:
        """Return the sampler of a data set that has all that is needed."""
        ...

    def missing(self, vocabulary: Vocabulary, sequence_length: int, objective: ObjectiveConfig) -> str | None:
        """Return the special tokens that a tokenizer lacks, in words; None where it has all."""
        ...


def make_sampler(
    dataset: TokenDataset,
    sequence_length: int,
    seed: int,
    attention: Attention,
    packing: PackingName = "concatenate",
    objective: ObjectiveConfig | None = None,
) -> Sampler:
    """Return the sampler of an objective. Raises `DataError` where the shards lack what it needs."""
    objective = objective or ObjectiveConfig()
    require(dataset, sequence_length, objective)
    return sampler_of(SamplerContext(dataset, sequence_length, seed, attention, packing, objective))


def sampler_of(context: SamplerContext) -> Sampler:
    """Return the sampler of a context whose data set has all that its objective needs."""
    return _module(context.objective).make_sampler(context)


def require(dataset: TokenDataset, sequence_length: int, objective: ObjectiveConfig) -> None:
    """Raise `DataError` where the shards cannot serve the objective at this length."""
    if not OBJECTIVES[objective.name].special_tokens:
        return
    vocabulary = dataset.index.vocabulary
    if vocabulary is None:
        raise DataError(
            f"the shards in {dataset.location} do not say which tokens are special, as objective {objective.name} "
            "needs",
            "shards that a newer `palimpsest prepare` wrote",
            "prepare the text again with --overwrite",
        )
    if missing := _module(objective).missing(vocabulary, sequence_length, objective):
        raise DataError(
            f"the tokenizer of the shards in {dataset.location} has no {missing}, as objective {objective.name} needs",
            f"a tokenizer with {missing}",
            TRAIN_TOKENIZER.format(objective.name),
        )
    if objective.pairs != "none":
        _require_sentences(dataset, objective)


def _require_sentences(dataset: TokenDataset, objective: ObjectiveConfig) -> None:
    if not dataset.index.has_sentences:
        raise DataError(
            f"the shards in {dataset.location} have no sentences, as objective.pairs = {objective.pairs} needs",
            "shards with sentences",
            "prepare the text again with --sentences LANGUAGE (and --overwrite)",
        )
    if dataset.index.num_sentences <= dataset.index.num_documents:
        raise DataError(
            f"each document in {dataset.location} is one sentence: no sentence has one that follows it, so "
            f"objective.pairs = {objective.pairs} has nothing to learn",
            "documents of several sentences",
            "set objective.pairs=none, or prepare text whose documents are longer",
        )


def _module(objective: ObjectiveConfig) -> ObjectiveModule:
    # imported when it is used, by the objective's name: a new objective is a new file
    name = OBJECTIVES[objective.name].module or objective.name
    return cast(ObjectiveModule, importlib.import_module(f"engine.data.objectives.{name}"))
