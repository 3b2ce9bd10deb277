"""Rows of labelled examples, for the objectives of tasks: one example is one row, padded to the row's length.

An example is a document whose tokens are those that the model sees, special tokens and a second text included. Beside
it lie columns: `label` (the row's, or one for each token, less than 0 where it has none), or `start` and `end` (the
positions of an answer's first and last token), and of pairs `second` (the number of tokens before the second text).

B batch (rows), T sequence length, C predicted numbers.
"""

from __future__ import annotations

import numpy as np

from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.rows import RowBuffer, SampledRows
from engine.data.objectives.sampling import SamplerContext
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import DataError

LABEL, SECOND, START, END = "label", "second", "start", "end"
"""Names of the columns."""
_ENCODE = "encode the examples with `palimpsest finetune`"


def missing(vocabulary: Vocabulary, sequence_length: int, objective: ObjectiveConfig) -> None:
    """Return None: special tokens are in the examples already."""
    del vocabulary, sequence_length, objective


def make_sampler(context: SamplerContext) -> ExampleSampler:
    """Return the sampler of a data set of examples. Raises `DataError` where it has no labels, or other ones."""
    samplers = {"token_classification": TokenSampler, "question_answering": AnswerSampler}
    return samplers.get(context.objective.name, ExampleSampler)(context)


class ExampleSampler:
    """Rows of one example each, with its label: a number of a label, or a number to predict."""

    labels: tuple[str, ...] = (LABEL,)
    """Names of the columns that it needs."""

    def __init__(self, context: SamplerContext) -> None:
        self.context = context
        columns = context.dataset.index.columns
        for name in self.labels:
            if name not in columns:
                raise DataError(
                    f"the shards in {context.dataset.location} have no column {name}, as objective "
                    f"{context.objective.name} needs",
                    "examples with labels",
                    _ENCODE,
                )
        self._has_pairs = SECOND in columns

    def count(self, shards: np.ndarray) -> np.ndarray:
        entries = self.context.dataset.index.shards
        return np.array([entries[number].num_documents for number in shards.tolist()], np.int64)

    def make(self, samples_B3: np.ndarray, shard_rows: np.ndarray, num_rows: int) -> SampledRows:
        """Return the examples: `last_B` is the position of a row's last token, and a label weighs 1, or 0 in padding
        rows and where the example was forgotten."""
        length = self.context.length
        buffer = RowBuffer.empty(num_rows, length, self.context.padding_id)
        types_BT = np.zeros((num_rows, length), np.int64)
        weights_B = np.zeros(num_rows, np.float32)
        for row, (number, document) in enumerate(shard_rows.tolist()):
            shard = self.context.shard(number)
            first, end = shard.documents[document : document + 2].tolist()
            self._require_fitting(number, document, end - first)
            buffer.write(row, shard.tokens[first:end], np.zeros(1, np.int64))
            weights_B[row] = not shard.is_forgotten(first)
            if self._has_pairs:
                types_BT[row, self.context.dataset.column(SECOND, number)[document] : end - first] = 1
        inputs = {
            "tokens_BT": buffer.tokens_BT,
            "token_types_BT": types_BT,
            "segments_BT": buffer.padding_BT(),
            "last_B": np.maximum(buffer.totals_B - 1, 0),
        }
        labelled, totals_B = self._labelled(shard_rows, weights_B)
        return SampledRows(inputs | labelled, {self.context.objective.name: totals_B}, buffer.documents_BT)

    def _labelled(self, shard_rows: np.ndarray, weights_B: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the inputs with labels and their weights, and the weight of each row's labels, (B,) fp64."""
        labels_B = self._numbers(LABEL, shard_rows, len(weights_B))
        is_number = self.context.objective.name == "regression"
        labels = {"labels_BC": labels_B.astype(np.float32)[:, None]} if is_number else {"labels_B": labels_B}
        return labels | {"label_weights_B": weights_B}, weights_B.astype(np.float64)

    def _numbers(self, name: str, shard_rows: np.ndarray, num_rows: int) -> np.ndarray:
        """Return the rows' numbers in a column, (B,) int64 or float64, 0 in padding rows."""
        column = self.context.dataset.column
        found = [column(name, number)[document] for number, document in shard_rows.tolist()]
        return np.array(found + [0] * (num_rows - len(found)))

    def rows_of(self, number: int, documents: np.ndarray, epoch: int) -> np.ndarray:
        del number, epoch  # row i is document i
        return np.unique(documents)

    def ranges(self, samples_B3: np.ndarray, shard_rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(shard_rows), 3), np.int64)
        for row, (number, document) in enumerate(shard_rows.tolist()):
            documents, _ = self.context.dataset.offsets(number)
            found[row] = number, documents[document], documents[document + 1]
        return found

    def _require_fitting(self, number: int, document: int, num_tokens: int) -> None:
        if num_tokens > self.context.length:
            raise DataError(
                f"example {document} of shard {number} in {self.context.dataset.location} has {num_tokens} tokens, "
                f"sequence_length = {self.context.length}",
                f"examples of {self.context.length} tokens or fewer",
                f"{_ENCODE} again: it cuts longer ones",
            )


class TokenSampler(ExampleSampler):
    """Rows of one example each, with a label for some of its tokens."""

    def _labelled(self, shard_rows: np.ndarray, weights_B: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        labels_BT = np.full((len(weights_B), self.context.length), -1, np.int64)
        for row, (number, document) in enumerate(shard_rows.tolist()):
            first, end = self.context.shard(number).documents[document : document + 2].tolist()
            labels_BT[row, : end - first] = self.context.dataset.column(LABEL, number)[first:end]
        weights_BT = (labels_BT >= 0) * weights_B[:, None]
        # tokens without a label get label 0 with weight 0; they are no class of their own
        labels = {"labels_BT": np.maximum(labels_BT, 0), "label_weights_BT": weights_BT}
        return labels, weights_BT.sum(1, dtype=np.float64)


class AnswerSampler(ExampleSampler):
    """Rows of a question and a window of its context, with the positions of the answer's first and last token."""

    labels = (START, END)

    def _labelled(self, shard_rows: np.ndarray, weights_B: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        ends = [self._numbers(name, shard_rows, len(weights_B)) for name in self.labels]
        labels = {"label_spans_B2": np.stack(ends, axis=1), "label_weights_B": weights_B}
        return labels, weights_B.astype(np.float64)
