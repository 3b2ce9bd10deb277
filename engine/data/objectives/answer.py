"""Rows of prompts and the answers to them: the loss is on the answers alone.

An example is a document of rounds: a prompt and the answer to it, one round or, in a dialogue, several. The parts of
the rounds are the shards' `sentences`, so those of a shard alternate: prompt, answer, prompt, answer. An answer has its
end of text with it. A decoder reads an example from left to right; in T5 the encoder reads the prompt of a single
round, and the decoder writes the answer.

B batch (rows), T sequence length (of the decoder), S sequence length of the encoder, R rounds of a shard.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.best_fit import BestFit
from engine.data.objectives.causal import CausalSampler
from engine.data.objectives.packing import Row, forgotten_at
from engine.data.objectives.rows import RowBuffer, SampledRows
from engine.data.objectives.sampling import Sampler, SamplerContext
from engine.data.shards.dataset import Shard, TokenDataset
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import DataError

_ENCODE = "encode the examples with `palimpsest finetune`"


class Rounds(NamedTuple):
    """First tokens of the prompts and of the answers of a shard's rounds, and the tokens behind the answers, int64."""

    prompts_R: np.ndarray
    answers_R: np.ndarray
    ends_R: np.ndarray


def rounds(sentences: np.ndarray) -> Rounds:
    """Return the rounds in a shard's offsets of parts, (2 R + 1,)."""
    return Rounds(sentences[:-1:2], sentences[1::2], sentences[2::2])


def missing(vocabulary: Vocabulary, sequence_length: int, objective: ObjectiveConfig) -> None:
    """Return None: special tokens are in the examples already."""
    del vocabulary, sequence_length, objective


def make_sampler(context: SamplerContext) -> Sampler:
    """Return the sampler of a data set of examples: T5's where answers have a length of their own.

    Raises:
        DataError: the shards do not say where answers begin.
    """
    index = context.dataset.index
    # each example has an even number of parts; what was prepared as text has sentences of any number
    if not index.has_sentences or index.num_sentences < 2 * index.num_documents or index.num_sentences % 2:
        raise DataError(
            f"the shards in {context.dataset.location} do not say where answers begin, as objective answer needs",
            "examples of prompts and answers",
            _ENCODE,
        )
    return _EncoderDecoderSampler(context) if context.objective.answer_length else _DecoderSampler(context)


class _OneDocument:
    """Packing of one document into each row."""

    name = "concatenate"

    def __init__(self, dataset: TokenDataset, capacity: int) -> None:
        """Hold rows of up to `capacity` tokens that have a successor."""
        self._dataset, self._capacity = dataset, capacity

    def count(self, shards: np.ndarray) -> np.ndarray:
        entries = self._dataset.index.shards
        return np.array([entries[number].num_documents for number in shards.tolist()], np.int64)

    def row(self, shard: Shard, number: int, row: int) -> Row:
        first, end = shard.documents[row : row + 2].tolist()
        _require_fitting(self._dataset, number, row, end - first - 1, self._capacity, "sequence_length")
        tokens, nothing = shard.tokens[first:end], np.empty(0, np.int64)
        return Row(tokens[:-1], tokens[1:], nothing, nothing, forgotten_at(shard, np.arange(first + 1, end)))

    def rows_of(self, number: int, documents: np.ndarray) -> np.ndarray:
        del number  # row i is document i
        return np.unique(documents)

    def ranges(self, shard_rows_N2: np.ndarray) -> np.ndarray:
        found = np.empty((len(shard_rows_N2), 3), np.int64)
        for row, (number, document) in enumerate(shard_rows_N2.tolist()):
            documents, _ = self._dataset.offsets(number)
            found[row] = number, documents[document], documents[document + 1]
        return found


class _DecoderSampler(CausalSampler):
    """Rows in which each token of an answer is predicted, one example in a row or, with best-fit packing, several."""

    def __init__(self, context: SamplerContext) -> None:
        # examples in one row never see each other
        super().__init__(replace(context, attention="document"))
        if context.packing == "best_fit":
            self.packing = BestFit(context.dataset, context.length, lookahead=True)
        else:
            self.packing = _OneDocument(context.dataset, context.length)
        self.count = self.packing.count

    def row(self, shard_row: list[int]) -> Row:
        number, row = shard_row
        return self.packing.row(_without_prompts(self.context.shard(number)), number, row)


def _without_prompts(shard: Shard) -> Shard:
    """Return the shard with its prompts among what is no target, beside the forgotten documents."""
    assert shard.sentences is not None, "checked when the sampler was made"
    found = rounds(shard.sentences)
    # rounds [0, 3, 5) and [5, 6, 9): prompts are [0, 3) and [5, 6); with the second one forgotten, [0, 3) and [5, 9)
    ends_R = np.where(shard.is_forgotten(found.prompts_R), found.ends_R, found.answers_R)
    return replace(shard, forgotten=np.stack([found.prompts_R, ends_R], axis=1))


class _EncoderDecoderSampler:
    """T5's rows: the prompt for the encoder, the answer, shifted by one behind a padding token, for the decoder."""

    def __init__(self, context: SamplerContext) -> None:
        self.context, self._packing = context, _OneDocument(context.dataset, context.length)
        self.count = self._packing.count

    def make(self, samples_B3: np.ndarray, shard_rows: np.ndarray, num_rows: int) -> SampledRows:
        """Return the rows: the tokens of an answer weigh 1, padding and forgotten examples 0."""
        context, start = self.context, np.zeros(1, np.int64)
        prompts = RowBuffer.empty(num_rows, context.length, context.padding_id)
        answers = RowBuffer.empty(num_rows, context.objective.answer_length, context.padding_id)
        for b, (number, document) in enumerate(shard_rows.tolist()):
            shard = context.shard(number)
            prompt, answer = self._parts(shard, number, document)
            prompts.write(b, prompt, start)
            answers.write(b, answer, start)
            if shard.is_forgotten(int(shard.documents[document])):
                answers.forget(b, np.arange(answer.size))
        weights_BT = answers.target_BT.astype(np.float32)
        inputs = {
            "tokens_BS": prompts.tokens_BT,
            "segments_BS": prompts.padding_BT(),
            "decoder_tokens_BT": np.pad(
                answers.tokens_BT[:, :-1], ((0, 0), (1, 0)), constant_values=context.padding_id
            ),
            # nothing before it sees the decoder's padding, and all of the decoder sees the prompt, segment 0
            "decoder_segments_BT": np.zeros(answers.tokens_BT.shape, np.int32),
            "targets_BT": answers.tokens_BT,
            "weights_BT": weights_BT,
        }
        return SampledRows(inputs, {"span": weights_BT.sum(axis=1)}, inputs["segments_BS"])

    def rows_of(self, number: int, documents: np.ndarray, epoch: int) -> np.ndarray:
        del epoch  # rows are the same in each
        return self._packing.rows_of(number, documents)

    def ranges(self, samples_B3: np.ndarray, shard_rows: np.ndarray) -> np.ndarray:
        return self._packing.ranges(shard_rows)

    def _parts(self, shard: Shard, number: int, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of an example's prompt and of its answer. Raises `DataError` where they do not fit."""
        assert shard.sentences is not None, "checked when the sampler was made"
        first, end = shard.documents[document : document + 2].tolist()
        # the part behind the first one begins with the answer; an example of T5 has one round
        answer = int(shard.sentences[np.searchsorted(shard.sentences, first, side="right")])
        lengths = self.context.length, self.context.objective.answer_length
        _require_fitting(self.context.dataset, number, document, answer - first, lengths[0], "sequence_length")
        _require_fitting(self.context.dataset, number, document, end - answer, lengths[1], "objective.answer_length")
        return shard.tokens[first:answer], shard.tokens[answer:end]


def _require_fitting(dataset: TokenDataset, number: int, document: int, num_tokens: int, length: int, key: str) -> None:
    if num_tokens > length:
        raise DataError(
            f"example {document} of shard {number} in {dataset.location} takes {num_tokens} tokens, {key} = {length}",
            f"examples of {length} tokens or fewer",
            f"{_ENCODE} again: it cuts longer ones",
        )
