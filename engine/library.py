"""Public face of Palimpsest for notebooks and scripts: open a checkpoint, iterate over data, build a model.

These names stay while the modules behind them may change; docs/library.md shows each, and its examples are tests. They
need one process and no process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.checkpoint.interchange.initial import model_of
from engine.checkpoint.load import read_state, read_weights
from engine.config.load import load_run as _load_run
from engine.config.schema.model import ModelConfig
from engine.config.schema.run import RunConfig
from engine.data.batch import Batch
from engine.data.loader import Loader
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.tombstones import read_tombstones
from engine.data.stage import run_stage_seed, stage_stream
from engine.data.tokenizer.folder import tokenizer_hash
from engine.models.families import family
from engine.models.initial import initial_value
from engine.models.materialize import whole_model
from engine.serve.language_model import LanguageModel
from engine.serve.language_model import open_language_model as _open_language_model
from engine.serve.source import find_checkpoint, run_of
from engine.train.saved_reservoir import open_stage

__all__ = [
    "Batch",
    "Checkpoint",
    "LanguageModel",
    "build_model",
    "documents",
    "global_batches",
    "load_run",
    "open_checkpoint",
    "open_language_model",
]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose bytes have been verified."""

    path: Path
    step: int
    tokens: int
    config: RunConfig
    """Configuration of the run that saved it."""

    def read_weights(self) -> dict[str, torch.Tensor]:
        """Return each parameter by its logical name, fp32 on the CPU, without the rows that pad a vocabulary."""
        return read_weights(self.path)

    def build_model(self) -> nn.Module:
        """Return the whole model with these weights, in fp32 on the CPU and in evaluation mode."""
        return whole_model(self.config.model, self.read_weights()).eval()


def load_run(path: Path | str, overrides: list[str] | None = None) -> RunConfig:
    """Return the configuration in a run file, or in the `config.yaml` of a run folder, with keys changed.

    Raises:
        ConfigError: it cannot be read, or a key or value is wrong.
    """
    return _load_run(Path(path), overrides, model_of)


def open_checkpoint(source: Path | str) -> Checkpoint:
    """Verify and open the newest whole checkpoint of a run folder, or the checkpoint folder `source`.

    Raises:
        ConfigError: `source` is neither.
        CheckpointError: no checkpoint is whole.
    """
    path = find_checkpoint(Path(source))
    state = read_state(path)
    return Checkpoint(path, state.step, state.tokens, run_of(path, state))


def open_language_model(source: Path | str, tokenizer: Path | str | None = None) -> LanguageModel:
    """Return model and tokenizer of a run, a checkpoint or a Hugging Face folder in Hugging Face's classes.

    Raises:
        ConfigError: `source` is none of them, or its model has no counterpart there.
        CheckpointError: no checkpoint is whole.
    """
    return _open_language_model(Path(source), None if tokenizer is None else Path(tokenizer))


def build_model(config: ModelConfig, seed: int = 0) -> nn.Module:
    """Return the whole model with the weights that a run with this seed starts from, in fp32 on the CPU.

    Its `forward` takes the inputs of a `Batch` as keywords. It returns a dictionary with `losses_L`, the weighted sum
    of each loss; without targets, `logits_BTV` of a model that predicts every token.
    """
    specs = family(config).specs(config)
    # Each parameter's values are a function of seed and name, so that a whole model has those of any layout; the rows
    # that pad a vocabulary are left out.
    return whole_model(config, {spec.name: initial_value(spec, config, seed)[: spec.real_rows] for spec in specs})


def documents(folder: Path | str) -> Iterator[np.ndarray]:
    """Yield the token ids of each document in a folder of token shards, in the order of the shards; forgotten ones are
    left out.

    The arrays are views of files, which are verified when they are first read: copy what is to be changed.

    Raises:
        DataError: the folder holds no shards, or one is damaged.
    """
    dataset = TokenDataset(Path(folder))
    for number in range(dataset.num_shards):
        shard = dataset.shard(number)
        # `documents` are offsets into `tokens`, one more than there are documents: (0, 3, 8) is [0, 3) and [3, 8).
        kept = ~shard.is_forgotten(shard.documents[:-1])
        for first, end in zip(shard.documents[:-1][kept], shard.documents[1:][kept], strict=True):
            yield shard.tokens[first:end]


def global_batches(run: RunConfig, run_stage: int = 0, first_step: int = 0) -> Iterator[Batch]:
    """Yield the global batch of each step of a run stage (from 0), its samples in their order, in one piece.

    Rows are a function of the seed: the ones that the run trains on in any layout, unless a rollback or a damaged shard
    left samples out, or an alarm raised the ratio of replay. Steps before `first_step` are passed over without their
    rows being read.

    Raises:
        DataError: data or tokenizer are missing, damaged, or do not belong together.
    """
    stage = run.stages[run_stage]
    parts = open_stage(run, run_stage, tokenizer_hash(run.tokenizer), read_tombstones(run.folder))
    stream = stage_stream(stage, parts, run_stage_seed(run.seed, run_stage))
    for _ in range(first_step):
        stream.skip()
    loader = Loader(stream)
    for step in range(first_step, stage.num_steps):
        # Data rank 0 of 1, and one micro-batch that is the whole global batch.
        (batch,) = loader.step(0, 1, stage.batches.size(step))
        yield batch
