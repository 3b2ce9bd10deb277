"""Predictions of a fine-tuned checkpoint on encoded examples, in one process.

Legend: B batch, T tokens of a row, C labels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from engine.atomic import write_atomically
from engine.config.schema.stage import RunStage
from engine.data.shards.dataset import TokenDataset
from engine.data.stage_validation import samples_of
from engine.models.materialize import whole_model
from engine.serve.source import Trained
from engine.tasks.kind import Predictions
from engine.tasks.kinds import KINDS
from engine.tasks.kinds.answer import Answer

PREDICTIONS, MEASURES = "predictions.jsonl", "measures.json"
"""Names of the files in a run folder."""
_ROWS = 32


def predict(trained: Trained, stage: RunStage, dataset: TokenDataset) -> Predictions:
    """Return the predictions of a fine-tuned model. Takes the whole model's memory.

    Raises:
        DataError: the data does not serve the stage.
        CheckpointError: the checkpoint is damaged.
    """
    kind = KINDS[stage.objective.name]
    if isinstance(kind, Answer):
        return kind.generate(trained, dataset)
    return kind.decode(logits_of(trained, stage, dataset), dataset, stage.objective)


def logits_of(trained: Trained, stage: RunStage, dataset: TokenDataset) -> list[np.ndarray]:
    """Return the logits of each row of a data set, in its order: (C,), or of its n tokens (n, C); fp32.

    Raises as `predict`.
    """
    samples = samples_of(stage, [("", dataset)], None)
    model = whole_model(trained.config, trained.weights).eval()
    logits: dict[int, np.ndarray] = {}
    with torch.inference_mode():
        numbers = samples.numbers(0, 1, _ROWS)
        for place, whole in enumerate(samples.batches(0, 1, _ROWS)):
            batch = whole.cut(samples.row_length(place * _ROWS, (place + 1) * _ROWS))
            inputs = {name: tensor for name, tensor in batch.inputs.items() if not name.startswith("label")}
            (found,) = model(**inputs).values()
            # padding rows stand behind the others
            logits |= zip(numbers[place].tolist(), found.float().numpy(), strict=False)
    return without_padding([logits[number] for number in range(len(logits))], dataset)


def without_padding(logits: Sequence[np.ndarray], dataset: TokenDataset) -> list[np.ndarray]:
    """Return the logits of the rows of a data set, those of tokens, (T, C), cut to the n tokens of each row."""
    documents = [np.diff(dataset.offsets(number)[0]) for number in range(dataset.num_shards)]
    lengths = np.concatenate(documents).tolist()
    return [row if row.ndim == 1 else row[:length] for row, length in zip(logits, lengths, strict=True)]


def write_predictions(predictions: Predictions, folder: Path) -> None:
    """Write the predictions to the run folder, an object a line. Raises `OSError`."""
    lines = (json.dumps(row, ensure_ascii=False) for row in predictions.rows())
    write_atomically(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))
