"""The held-out loss of a checkpoint in one process, on the CPU in fp32: each sample once, with exact target weights."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.checkpoint.load import read_state, read_weights
from engine.data.shards.dataset import TokenDataset
from engine.data.validation import ValidationSamples
from engine.models.families import family
from engine.models.materialize import whole_model
from engine.serve.source import run_of

_ROWS = 8


def held_out_loss(checkpoint: Path, dataset: TokenDataset) -> float:
    """Return the mean loss of a checkpoint over the targets of a data set, in nats, as `validation_loss` has it.

    Rows, objective and attention are those of the run stage in which the checkpoint was saved. Takes the whole model's
    memory. Raises `DataError` where the data does not serve the stage, `CheckpointError` where the checkpoint is
    damaged.
    """
    state = read_state(checkpoint)
    config = run_of(checkpoint, state)
    stage = config.stages[int(state.sections.get("progress", {}).get("run_stage", 0))]
    data = stage.data
    samples = ValidationSamples(
        dataset, stage.sequence_length, data.attention, packing=data.packing, objective=stage.objective
    )
    names = family(config.model).configured_head(config.model).losses
    model = whole_model(config.model, read_weights(checkpoint)).eval()
    losses_L, weights_L = torch.zeros(len(names), dtype=torch.float64), torch.zeros(len(names), dtype=torch.float64)
    with torch.inference_mode():
        for batch in samples.batches(0, 1, _ROWS):
            losses_L += model(**batch.inputs)["losses_L"].double()
            weights_L += torch.tensor([batch.weights[name] for name in names], dtype=torch.float64)
    # a loss without a target counts as 0, as in training
    return float(torch.where(weights_L > 0, losses_L / weights_L.clamp(min=1e-300), 0.0).sum())
