"""Trained models as a user names them: a run folder or one of its checkpoints.

A run folder means its newest whole checkpoint. Every byte is verified before it is used. The model's
configuration is the checkpoint's own, so that a checkpoint that was moved out of its run still opens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint import manifest_json
from engine.checkpoint.folder import CHECKPOINTS, committed
from engine.checkpoint.interchange.foreign_model import check_finite
from engine.checkpoint.load import read_state, read_weights
from engine.checkpoint.manifest import CheckpointState
from engine.checkpoint.storage import MANIFEST
from engine.checkpoint.verify import verify
from engine.config.load import load_run, parse_run
from engine.config.schema.model import ModelConfig
from engine.config.schema.regularization import EMA
from engine.config.schema.run import RunConfig
from engine.data.tokenizer.folder import tokenizer_hash
from engine.errors import CheckpointError, ConfigError
from engine.logs import logger

log = logger(__name__)

RUN_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Trained:
    """A model as a run left it: fp32 master weights (real rows) by logical name, and the tokenizer's folder."""

    checkpoint: Path
    step: int
    tokens: int
    config: ModelConfig
    tokenizer: Path
    weights: dict[str, torch.Tensor]
    averaged: bool = False
    """True if the weights are the exponential moving average that the run has kept."""


def is_trained(source: Path) -> bool:
    """Return True if a folder looks like a run or a checkpoint; says nothing of its health."""
    return (source / MANIFEST).is_file() or (source / CHECKPOINTS).is_dir()


def open_trained(source: Path, tokenizer: Path | None = None, averaged: bool = False) -> Trained:
    """Return the newest whole model of a run folder, or the one of a checkpoint folder.

    `tokenizer` overrides the folder that the run was configured with. `averaged` asks for the moving average of the
    weights.

    Raises:
        ConfigError: `source` is neither, the tokenizer's folder is not there or holds another one, or weights are NaN
            or infinite.
        CheckpointError: no checkpoint is whole, or it holds no average.
    """
    checkpoint = find_checkpoint(source)
    state = read_state(checkpoint)
    run = run_of(checkpoint, state)
    folder = tokenizer or run.tokenizer
    if not folder.is_dir():
        raise ConfigError(
            f"tokenizer folder {folder} is not there",
            "the tokenizer that the run was trained with",
            "name it with --tokenizer, or call from the folder that the run was started in",
        )
    trained_with = state.sections.get("tokenizer", {}).get("hash")
    if trained_with is not None and tokenizer_hash(folder) != trained_with:
        raise ConfigError(
            f"the tokenizer in {folder} is not the one that {checkpoint} was trained with",
            f"a folder of hash {trained_with}, found {tokenizer_hash(folder)}",
            "name the right one with --tokenizer",
        )
    # last: whatever else is wrong is found before gigabytes are read
    weights = read_weights(checkpoint, EMA if averaged else None)
    check_finite(weights.items(), checkpoint)
    return Trained(checkpoint, state.step, state.tokens, run.model, folder, weights, averaged)


def find_checkpoint(source: Path) -> Path:
    """Return the verified checkpoint of `source`; checkpoints that are passed over are logged.

    Raises:
        ConfigError: `source` is neither a run folder nor a checkpoint.
        CheckpointError: the checkpoint, or every one of the run, is damaged, or the run has none.
    """
    if (source / MANIFEST).is_file():
        return _whole(source)
    if not (source / CHECKPOINTS).is_dir():
        what = "holds neither checkpoints/ nor manifest.json" if source.is_dir() else "is not there"
        raise ConfigError(
            f"{source} {what}", "a run folder or one of its checkpoints", "check the path, or train first"
        )
    # Newest first; a damaged one is told and the next one tried, as a resumed run does.
    for candidate in committed(source / CHECKPOINTS):
        try:
            return _whole(candidate)
        except CheckpointError as error:
            log.warning("%s", error.wrong)
    raise CheckpointError(
        f"run {source} has no whole checkpoint",
        "at least one that verifies",
        f"see `palimpsest checkpoint verify {source}`, or train on",
    )


def _whole(checkpoint: Path) -> Path:
    manifest_json.read(checkpoint)  # says more of a wrong version or name than a list of damage does
    damage = verify(checkpoint)
    if damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged: {damage[0]}{more}", "whole checkpoints", "use another one of the run"
        )
    return checkpoint


def run_of(checkpoint: Path, state: CheckpointState) -> RunConfig:
    """Return the configuration in the checkpoint or, where it carries none, of the run folder around it."""
    # empty in a checkpoint that was not saved by a run
    if state.config:
        return parse_run(state.config, f"in {checkpoint / MANIFEST}")
    return load_run(checkpoint.parent.parent / RUN_CONFIG)
