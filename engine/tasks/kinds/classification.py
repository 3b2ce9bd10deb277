"""Classification of texts and of pairs of texts: one label of several for each.

Legend: N examples, C labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.config.schema.data import ColumnsConfig
from engine.config.schema.objective import ObjectiveConfig, ObjectiveName
from engine.data.objectives.examples import LABEL
from engine.data.shards.dataset import TokenDataset
from engine.extras import need
from engine.tasks.examples import TextExamples, find_labels, read_examples, require_examples_of
from engine.tasks.framing import Framing
from engine.tasks.kind import EncodedRow, MainMeasure
from engine.tasks.measures import Measures, of_labels


@dataclass(frozen=True)
class LabelPredictions:
    """Logits of the labels for each example, and the label expected."""

    labels: tuple[str, ...]
    expected_N: np.ndarray
    """Numbers of the labels, int64."""
    logits_NC: np.ndarray
    """fp32."""

    def measures(self) -> Measures:
        """Return accuracy, F1, Matthews' correlation and the confusion matrix."""
        return of_labels(self.expected_N, self.logits_NC.argmax(1), self.labels)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the label expected and predicted, and the probabilities of all."""
        for expected, logits_C in zip(self.expected_N, self.logits_NC, strict=True):
            shares_C = torch.from_numpy(logits_C).softmax(0).tolist()
            yield {
                "expected": self.labels[int(expected)],
                "predicted": self.labels[int(logits_C.argmax())],
                "probabilities": {name: round(share, 6) for name, share in zip(self.labels, shares_C, strict=True)},
            }


class Classification:
    """Predicts one label of several for a text or a pair."""

    name: ObjectiveName = "classification"
    main_measure = MainMeasure("accuracy", higher_is_better=True)

    def require_packages(self) -> None:
        need("sklearn", "measuring labels", "tasks")

    def read(self, location: str, columns: ColumnsConfig) -> TextExamples:
        return read_examples(location, columns)

    def labels(self, parts: Mapping[str, TextExamples], named: tuple[str, ...]) -> tuple[str, ...]:
        labels = named or find_labels(parts["train"])
        numbers = {part: examples.numbered(labels) for part, examples in parts.items()}
        require_examples_of(labels, parts["train"], numbers["train"])
        return labels

    def head(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return {"task": self.name, "num_labels": len(labels)}

    def encode(
        self, examples: TextExamples, objective: ObjectiveConfig, framing: Framing, length: int
    ) -> Iterator[EncodedRow]:
        for row, label in zip(framing.rows(examples, length), examples.numbered(objective.labels), strict=True):
            yield EncodedRow(row.ids, {LABEL: label, **row.columns})

    def decode(
        self, logits: Sequence[np.ndarray], dataset: TokenDataset, objective: ObjectiveConfig
    ) -> LabelPredictions:
        return LabelPredictions(objective.labels, dataset.whole_column(LABEL), np.stack(logits))
