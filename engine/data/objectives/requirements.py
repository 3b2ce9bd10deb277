"""What an objective needs of the shards, checked before the first batch: special tokens, sentences, lengths."""

from __future__ import annotations

from engine.config.lengths import noise, span_lengths
from engine.config.schema.objective import ObjectiveConfig
from engine.data.shards.dataset import TokenDataset
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import DataError

TRAIN_TOKENIZER = "train a tokenizer with `palimpsest tokenizer --purpose {}` and prepare the text with it"


def require(dataset: TokenDataset, sequence_length: int, objective: ObjectiveConfig) -> None:
    """Raises `DataError` where the shards cannot serve the objective at this length."""
    if objective.name == "causal":
        return
    vocabulary = dataset.index.vocabulary
    if vocabulary is None:
        raise DataError(
            f"the shards in {dataset.location} do not say which tokens are special, as objective {objective.name} "
            "needs",
            "shards that a newer `palimpsest prepare` wrote",
            "prepare the text again with --overwrite",
        )
    if missing := _missing(vocabulary, sequence_length, objective):
        raise DataError(
            f"the tokenizer of the shards in {dataset.location} has no {missing}, as objective {objective.name} needs",
            f"a tokenizer with {missing}",
            TRAIN_TOKENIZER.format(objective.name),
        )
    if objective.pairs != "none" and not dataset.index.has_sentences:
        raise DataError(
            f"the shards in {dataset.location} have no sentences, as objective.pairs = {objective.pairs} needs",
            "shards with sentences",
            "prepare the text again with --sentences LANGUAGE (and --overwrite)",
        )
    if objective.pairs != "none" and dataset.index.num_sentences <= dataset.index.num_documents:
        raise DataError(
            f"each document in {dataset.location} is one sentence: no sentence has one that follows it, so "
            f"objective.pairs = {objective.pairs} has nothing to learn",
            "documents of several sentences",
            "set objective.pairs=none, or prepare text whose documents are longer",
        )


def _missing(vocabulary: Vocabulary, sequence_length: int, objective: ObjectiveConfig) -> str | None:
    """What the objective needs and the tokenizer lacks."""
    if objective.name == "fill_in_the_middle":
        return None if vocabulary.fill else "marks of prefix, middle and suffix"
    if objective.name == "masked":
        if vocabulary.mask is None:
            return "mask token"
        framed = vocabulary.classify is not None and vocabulary.separate is not None
        return None if framed or objective.pairs == "none" else "tokens for [CLS] and [SEP]"
    lengths = span_lengths(sequence_length, objective.rate, objective.mean_span_length)
    _, spans = noise(lengths.read, objective.rate, objective.mean_span_length)
    return None if spans <= len(vocabulary.sentinels) else f"{spans} sentinels (it has {len(vocabulary.sentinels)})"
