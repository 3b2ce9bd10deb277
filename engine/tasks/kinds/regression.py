"""Regression: a number for each text or pair of texts.

Legend: N examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config.schema.data import ColumnsConfig
from engine.config.schema.objective import ObjectiveConfig, ObjectiveName
from engine.data.objectives.examples import LABEL
from engine.data.shards.dataset import TokenDataset
from engine.extras import need
from engine.tasks.examples import TextExamples, read_examples
from engine.tasks.framing import Framing
from engine.tasks.kind import EncodedRow, MainMeasure
from engine.tasks.measures import Measures, of_numbers


@dataclass(frozen=True)
class NumberPredictions:
    """The number predicted for each example, and the number expected; fp64."""

    expected_N: np.ndarray
    predicted_N: np.ndarray

    def measures(self) -> Measures:
        """Return the mean squared error and the correlations of Pearson and Spearman."""
        return of_numbers(self.expected_N, self.predicted_N)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the number expected and predicted."""
        for expected, predicted in zip(self.expected_N.tolist(), self.predicted_N.tolist(), strict=True):
            yield {"expected": float(expected), "predicted": predicted}


class Regression:
    """Predicts a number for a text or a pair."""

    name: ObjectiveName = "regression"
    main_measure = MainMeasure("mean_squared_error", higher_is_better=False)

    def require_packages(self) -> None:
        need("scipy", "measuring numbers", "tasks")

    def read(self, location: str, columns: ColumnsConfig) -> TextExamples:
        return read_examples(location, columns)

    def labels(self, parts: Mapping[str, TextExamples], named: tuple[str, ...]) -> tuple[str, ...]:
        for examples in parts.values():
            examples.numbers()
        return named

    def head(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return {"task": self.name, "num_labels": 1}

    def encode(
        self, examples: TextExamples, objective: ObjectiveConfig, framing: Framing, length: int
    ) -> Iterator[EncodedRow]:
        for row, number in zip(framing.rows(examples, length), examples.numbers(), strict=True):
            yield EncodedRow(row.ids, {LABEL: number, **row.columns})

    def decode(
        self, logits: Sequence[np.ndarray], dataset: TokenDataset, objective: ObjectiveConfig
    ) -> NumberPredictions:
        return NumberPredictions(dataset.whole_column(LABEL), np.stack(logits)[:, 0].astype(np.float64))
