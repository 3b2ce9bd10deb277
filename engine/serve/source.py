"""Trained models as a user names them: a run folder or one of its checkpoints.

A run folder means its newest whole checkpoint. Every byte is verified before it is used. The model's
configuration is the checkpoint's own, so that a checkpoint that was moved out of its run still opens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import manifest_json
from engine.checkpoint.folder import CHECKPOINTS, committed
from engine.checkpoint.interchange.mapping import unchanged
from engine.checkpoint.interchange.source_model import CONVERTED
from engine.checkpoint.interchange.sources import CheckpointSource, Source, read_parameter
from engine.checkpoint.interchange.sources.merged import merged
from engine.checkpoint.load import read_state
from engine.checkpoint.manifest import CheckpointState
from engine.checkpoint.storage import MANIFEST
from engine.checkpoint.verify import verify
from engine.config.load import load_run, parse_run
from engine.config.schema.model import ModelConfig, make_model, without_vocabulary
from engine.config.schema.regularization import EMA
from engine.config.schema.run import RunConfig
from engine.data.tokenizer.folder import tokenizer_hash
from engine.errors import CheckpointError, ConfigError
from engine.logs import logger
from engine.models.families import family

log = logger(__name__)

RUN_CONFIG = "config.yaml"


TOKENIZER, SIDE_FILES = "tokenizer", "huggingface"
"""Folders in what `convert` wrote: the tokenizer, and the small files of the Hugging Face folder that it came from."""


@dataclass(frozen=True)
class Described:
    """A checkpoint's model and tokenizer, and the run that trained it; a converted one has no run behind it."""

    model: ModelConfig
    tokenizer: Path | None
    run: RunConfig | None


@dataclass(frozen=True)
class Trained:
    """A model in a checkpoint: fp32 master weights (real rows) by logical name, read from `source`, and its tokenizer's
    folder, if it has one."""

    checkpoint: Path
    state: CheckpointState
    config: ModelConfig
    run: RunConfig | None
    tokenizer: Path | None
    source: Source
    averaged: bool = False
    """True if the weights are the exponential moving average that the run has kept."""

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def tokens(self) -> int:
        return self.state.tokens

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.source.shapes.values())

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """All weights by logical name, read anew into this process's memory.

        Raises:
            ConfigError: a weight is not finite.
        """
        model_map = unchanged(family(self.config).specs(self.config))
        return {name: read_parameter(self.source, one) for name, one in model_map.parameters.items()}

    @property
    def converted(self) -> dict[str, Any]:
        """Facts about the source that `convert` made the checkpoint from; empty for one that a run saved."""
        return dict(self.state.sections.get(CONVERTED, {}))

    @property
    def side_files(self) -> Path | None:
        """Folder with the small files of the Hugging Face folder that the checkpoint was made from."""
        folder = self.checkpoint.resolve().parent.parent / SIDE_FILES
        return folder if self.converted and folder.is_dir() else None


def is_trained(source: Path) -> bool:
    """Return True if a folder looks like a run or a checkpoint; says nothing of its health."""
    return (source / MANIFEST).is_file() or (source / CHECKPOINTS).is_dir()


def open_trained(source: Path, tokenizer: Path | None = None, averaged: bool = False, merge: bool = True) -> Trained:
    """Return the newest whole model of a run folder, or the one of a checkpoint folder.

    `tokenizer` overrides the folder that the run was configured with. `averaged` asks for the moving average of the
    weights. With `merge` an adapter is added into the weights, where its method allows it.

    Raises:
        ConfigError: `source` is neither, or the tokenizer's folder is not there or holds another one.
        CheckpointError: no checkpoint is whole, or it holds no average.
    """
    checkpoint = find_checkpoint(source)
    state = read_state(checkpoint)
    described = describe(checkpoint, state)
    folder = tokenizer or described.tokenizer
    if folder is not None:
        _check_tokenizer(folder, checkpoint, state)
    weights: Source = CheckpointSource(checkpoint, EMA if averaged else None)
    model = without_vocabulary(described.model)
    if merge:
        weights, model = merged(weights, model)
    return Trained(checkpoint, state, model, described.run, folder, weights, averaged)


def _check_tokenizer(folder: Path, checkpoint: Path, state: CheckpointState) -> None:
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


def find_checkpoint(source: Path) -> Path:
    """Return the verified checkpoint of `source`; checkpoints that are passed over are logged.

    Raises:
        ConfigError: `source` is neither a run folder nor a checkpoint.
        CheckpointError: the checkpoint, or every one of the run, is damaged, or the run has none.
    """
    if (source / MANIFEST).is_file():
        return _whole(source)
    if not (source / CHECKPOINTS).is_dir():
        what = "is a file" if source.is_file() else "is not there"
        what = "holds neither checkpoints/ nor manifest.json" if source.is_dir() else what
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


def describe(checkpoint: Path, state: CheckpointState) -> Described:
    """Return the model and the tokenizer of a checkpoint."""
    if CONVERTED in state.sections:
        folder = checkpoint.resolve().parent.parent / TOKENIZER
        return Described(make_model(**state.config["model"]), folder if folder.is_dir() else None, None)
    run = run_of(checkpoint, state)
    return Described(run.model, run.tokenizer, run)


def run_of(checkpoint: Path, state: CheckpointState) -> RunConfig:
    """Return the configuration in the checkpoint or, where it carries none, of the run folder around it.

    Raises:
        ConfigError: the checkpoint was converted, so that no run is behind it.
    """
    if CONVERTED in state.sections:
        raise ConfigError(
            f"{checkpoint} was converted from {state.sections[CONVERTED].get('source')}: there is no run behind it",
            "a checkpoint that a run saved",
            "start a run from it with `init_from`",
        )
    # empty in a checkpoint that was not saved by a run
    if state.config:
        return parse_run(state.config, f"in {checkpoint / MANIFEST}")
    return load_run(checkpoint.parent.parent / RUN_CONFIG)
