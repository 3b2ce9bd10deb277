"""Rows of labelled examples, for the objectives of tasks: one example is one row, padded to the row's length.

An example is a document whose tokens are those that the model sees, special tokens and a second text included; the
columns `label` and, of pairs, `second` (the number of tokens before the second text) lie beside it.

B batch (rows), T sequence length, C predicted numbers.
"""

from __future__ import annotations

import numpy as np

from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.rows import RowBuffer, SampledRows
from engine.data.objectives.sampling import SamplerContext
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import DataError

LABEL, SECOND = "label", "second"
"""Names of the columns."""
_ENCODE = "encode the examples with `palimpsest finetune`"


def missing(vocabulary: Vocabulary, sequence_length: int, objective: ObjectiveConfig) -> None:
    """Return None: special tokens are in the examples already."""
    del vocabulary, sequence_length, objective


def make_sampler(context: SamplerContext) -> ExampleSampler:
    """Return the sampler of a data set of examples. Raises `DataError` where it has no labels, or other ones."""
    return ExampleSampler(context)


class ExampleSampler:
    """Rows of one example each, with its label."""

    def __init__(self, context: SamplerContext) -> None:
        self.context = context
        columns = context.dataset.index.columns
        if LABEL not in columns:
            raise DataError(
                f"the shards in {context.dataset.location} have no column {LABEL}, as objective "
                f"{context.objective.name} needs",
                "examples with labels",
                _ENCODE,
            )
        self._has_pairs = SECOND in columns
        self._is_classification = context.objective.name == "classification"

    def count(self, shards: np.ndarray) -> np.ndarray:
        entries = self.context.dataset.index.shards
        return np.array([entries[number].num_documents for number in shards.tolist()], np.int64)

    def make(self, samples_B3: np.ndarray, shard_rows: np.ndarray, num_rows: int) -> SampledRows:
        """Return the examples: `last_B` is the position of a row's last token, and a label weighs 1, or 0 in padding
        rows and where the example was forgotten."""
        length = self.context.length
        buffer = RowBuffer.empty(num_rows, length, self.context.padding_id)
        types_BT = np.zeros((num_rows, length), np.int64)
        labels_B, weights_B = np.zeros(num_rows), np.zeros(num_rows, np.float32)
        for row, (number, document) in enumerate(shard_rows.tolist()):
            shard = self.context.shard(number)
            first, end = shard.documents[document : document + 2].tolist()
            self._require_fitting(number, document, end - first)
            buffer.write(row, shard.tokens[first:end], np.zeros(1, np.int64))
            labels_B[row] = self.context.dataset.column(LABEL, number)[document]
            weights_B[row] = not shard.is_forgotten(first)
            if self._has_pairs:
                types_BT[row, self.context.dataset.column(SECOND, number)[document] : end - first] = 1
        inputs = {
            "tokens_BT": buffer.tokens_BT,
            "token_types_BT": types_BT,
            "segments_BT": buffer.padding_BT(),
            "last_B": np.maximum(buffer.totals_B - 1, 0),
            "label_weights_B": weights_B,
        }
        inputs |= self._labels(labels_B)
        return SampledRows(inputs, {self.context.objective.name: weights_B.astype(np.float64)}, buffer.documents_BT)

    def _labels(self, labels_B: np.ndarray) -> dict[str, np.ndarray]:
        if self._is_classification:
            return {"labels_B": labels_B.astype(np.int64)}
        return {"labels_BC": labels_B.astype(np.float32)[:, None]}

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
