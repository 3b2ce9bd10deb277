"""Predictions of a fine-tuned checkpoint on encoded examples, in one process, and what they are worth.

Legend: B batch, C labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.atomic import write_atomically
from engine.config.schema.stage import RunStage
from engine.data.objectives.examples import LABEL
from engine.data.shards.dataset import TokenDataset
from engine.data.validation import ValidationSamples
from engine.models.materialize import whole_model
from engine.serve.source import Trained
from engine.tasks.measures import Measures, of_labels, of_numbers

PREDICTIONS, MEASURES = "predictions.jsonl", "measures.json"
"""Names of the files in a run folder."""
_ROWS = 32


class Predictions(NamedTuple):
    """Logits of a model for each example of a data set, in its order, and the labels expected."""

    expected_N: np.ndarray
    """Numbers of the labels (int64), or the numbers of a regression (fp64)."""
    logits_NC: np.ndarray
    """fp32."""


def predict(trained: Trained, stage: RunStage, dataset: TokenDataset) -> Predictions:
    """Return the predictions of a fine-tuned model. Takes the whole model's memory.

    Raises:
        DataError: the data does not serve the stage.
        CheckpointError: the checkpoint is damaged.
    """
    samples = ValidationSamples(
        dataset, stage.sequence_length, stage.data.attention, packing=stage.data.packing, objective=stage.objective
    )
    model = whole_model(trained.config, trained.weights).eval()
    logits = []
    with torch.inference_mode():
        for batch in samples.batches(0, 1, _ROWS):
            inputs = {name: tensor for name, tensor in batch.inputs.items() if not name.startswith("label")}
            logits.append(model(**inputs)["logits_BC"].float().numpy())
    columns = [dataset.column(LABEL, number) for number in range(dataset.num_shards)]
    expected_N = np.concatenate(columns)
    # padding rows stand at the end
    return Predictions(expected_N, np.concatenate(logits)[: len(expected_N)])


def measures_of(predictions: Predictions, stage: RunStage) -> Measures:
    """Return the measures of predictions, those of the stage's objective."""
    if stage.objective.name == "regression":
        return of_numbers(predictions.expected_N, predictions.logits_NC[:, 0].astype(np.float64))
    return of_labels(predictions.expected_N, predictions.logits_NC.argmax(1), stage.objective.labels)


def write_predictions(predictions: Predictions, stage: RunStage, folder: Path) -> None:
    """Write a line of JSON for each example. Raises `OSError`."""
    lines = (json.dumps(row, ensure_ascii=False) for row in _rows(predictions, stage))
    write_atomically(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))


def _rows(predictions: Predictions, stage: RunStage) -> Iterator[dict[str, object]]:
    labels = stage.objective.labels
    for expected, logits_C in zip(predictions.expected_N, predictions.logits_NC, strict=True):
        if not labels:
            yield {"expected": float(expected), "predicted": float(logits_C[0])}
            continue
        shares_C = torch.from_numpy(logits_C).softmax(0).tolist()
        yield {
            "expected": labels[int(expected)],
            "predicted": labels[int(logits_C.argmax())],
            "probabilities": {name: round(share, 6) for name, share in zip(labels, shares_C, strict=True)},
        }
