"""Run folders as training leaves them: a tiny model of random weights, saved by the real saver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.manifest import CheckpointState
from engine.checkpoint.saver import Saver
from engine.config.load import parse_run
from engine.config.resolve import Layout
from engine.config.resume import meaning_hash
from engine.config.schema.model import BERTConfig
from engine.config.schema.run import RunConfig
from engine.models.families import family
from engine.parallel.axes import Grid
from engine.parallel.groups import ALONE, Groups
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import MOMENTS, ParameterShard, Placement
from tests.engine.models.tiny import BERT_FORMS, FORMS, T5_FORMS, random_weights


def one_process() -> Groups:
    """The groups of a world of one, with no process group behind them."""
    layout = Layout(pipe=1, data=1, sequence=1, tensor=1)
    grid = Grid(layout)
    names = ("world", "zero", "sequence", "tensor", "pipe", "pipe_backward", "wrap", "wrap_backward", "model")
    return Groups(layout, grid, 0, grid.coordinates(0), **dict.fromkeys(names, ALONE), near=None, ties={})


def run_config(folder: Path, form: str, tokenizer: Path, train: Path = Path("t")) -> RunConfig:
    stage = {"data": {"train": str(train)}, "sequence_length": 32, "global_batch_size": 1, "duration": {"steps": 9}}
    model = (FORMS | BERT_FORMS | T5_FORMS)[form]
    if isinstance(model, BERTConfig):
        stage["objective"] = {"name": "masked", "pairs": "next_sentence" if model.pair_head else "none"}
    if model.family == "t5":
        stage["objective"] = "span_corruption"
    return parse_run(
        {
            "folder": str(folder),
            "tokenizer": str(tokenizer),
            "model": model.model_dump(mode="json"),
            "stages": [stage],
        },
        "test",
    )


def save(
    config: RunConfig,
    step: int,
    seed: int,
    sections: dict[str, Any] | None = None,
    moments: dict[str, dict[str, torch.Tensor]] | None = None,
) -> None:
    """Saves a checkpoint of random weights, padded as an engine holds them, and of these moments, if any."""
    weights, shards, placements = random_weights(config.model, seed), [], []
    for spec in family(config.model).specs(config.model):
        own = {moment: _padded(spec, values[spec.name]) for moment, values in (moments or {}).items()}
        shards.append(ParameterShard(spec, 0, _padded(spec, weights[spec.name]), own))
        placements.append(Placement(spec, (0,), 0, shards[-1].length, tuple(own) or MOMENTS))
    state = CheckpointState(step, 32 * step, 0, meaning_hash(config), config.model_dump(mode="json"), sections or {})
    Saver(config.folder / "checkpoints", one_process()).save(shards, placements, state, "test", 0)


def _padded(spec: ParameterSpec, values: torch.Tensor) -> torch.Tensor:
    full = torch.zeros(spec.shape)
    full[: len(values)] = values
    return full.flatten()
