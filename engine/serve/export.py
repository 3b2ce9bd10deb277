"""Export of a model as a Hugging Face folder, streamed, and checked by reading it back.

The folder is made beside its final path and renamed once its weights were read back and transformers has loaded it and
agreed with our own forward pass on real text (`read_back`); so a folder that exists is right, and a failure leaves
nothing. Memory holds one parameter at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.interchange.convert import (
    Progress,
    Verify,
    compare_weights,
    export_weights,
    no_progress,
)
from engine.checkpoint.interchange.foreign_model import load, read_config
from engine.checkpoint.interchange.forms import form_of, older_spellings
from engine.checkpoint.interchange.mapping import ModelMap
from engine.checkpoint.interchange.sinks.safetensors_shards import SafetensorsSink, Shard, plan_shards
from engine.checkpoint.interchange.sources import SafetensorsFolder
from engine.serve.card import model_card
from engine.serve.deployment.held_out_text import LossAgreement, compare_losses, held_out_text, logits_of
from engine.serve.language_model import caches, read_tokenizer, their_config
from engine.serve.new_folder import new_folder
from engine.serve.read_back import WHOLE_BYTES, Agreement, check_logits
from engine.serve.same_tokens import SameTokens, same_tokens
from engine.serve.sample_text import TEXT
from engine.serve.source import Trained
from engine.serve.tokenizer_files import write_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of exported weights by the name of the option."""
SHARD_BYTES = 5 * 10**9
"""Bytes of one file at the most, as in `save_pretrained`'s neighbours on the hub."""


@dataclass(frozen=True)
class ExportOptions:
    """Choices of an export."""

    dtype: str | None = None
    """Name of the dtype of all weights; None means fp32, or for a converted checkpoint that of its source."""
    shard_bytes: int = SHARD_BYTES
    """Bytes of one file at the most, unless one tensor is larger."""
    verify: Verify = "full"
    """Part of the weights that is read back and compared; with `none` nothing is checked."""
    license_id: str | None = None
    """License for the model card; None means that none is stated."""


@dataclass(frozen=True)
class Exported:
    """Summary of an export."""

    folder: Path
    num_parameters: int
    dtype: str
    """Name of the dtype of most weights."""
    num_files: int
    num_resumed: int
    """Number of files that an earlier, killed conversion had written."""
    agreement: Agreement | None
    """Comparison with transformers; None where it was not asked for."""
    num_shard_tokens: int
    """Number of tokens of the run's shards that the exported tokenizer reproduces."""
    losses: LossAgreement | None
    """Comparison of the rounded weights with those of the checkpoint; None in fp32, and of large models."""


def export(
    trained: Trained, output: Path, options: ExportOptions = ExportOptions(), progress: Progress = no_progress
) -> Exported:
    """Write a Hugging Face folder and read it back.

    It holds config.json, safetensors, the tokenizer, a model card and, for a model that generates,
    generation_config.json.

    Raises:
        ConfigError: `output` is taken, a weight is not finite, or the model has no twin in Hugging Face's library.
        CheckpointError: what their library loads is not the same model.
        EnvironmentProblem: the folder cannot be written.
    """
    form_of(trained.config)  # before any work
    with new_folder(output, resumable=True) as partial:
        written = write_folder(trained, partial, output, options, progress)
        return check(trained, written, partial, output, options)


@dataclass(frozen=True)
class WrittenFolder:
    """The weights in a written folder: their map, the dtype of each tensor, and the files; and the tokenizer there."""

    map: ModelMap
    dtypes: dict[str, torch.dtype]
    shards: list[Shard]
    num_resumed: int
    tokens: SameTokens | None
    """Comparison of the tokenizer; None where there is none, or nothing is to be checked."""


def write_folder(
    trained: Trained,
    folder: Path,
    name: Path,
    options: ExportOptions = ExportOptions(),
    progress: Progress = no_progress,
) -> WrittenFolder:
    """Write all files of the model into an existing folder; `name` is how errors call it.

    Raises:
        ConfigError, CheckpointError: users of the folder would not get the run's tokenizer; no weight is written then.
    """
    default, others = _dtypes(trained, options)
    # The tokenizer first: its special tokens go into the configuration.
    config = _write_side_files(trained, folder, default, kept=not options.dtype)
    tokens = None
    if trained.tokenizer is not None and options.verify != "none":
        tokens = same_tokens(trained, folder, name, TEXT)  # before the long part of the work
    model_map = form_of(trained.config).mapping(trained.config, config.pad_token_id)
    dtypes = {name: others.get(name, default) for name in model_map.tensors}
    planned = {name: (shape, dtypes[name]) for name, shape in model_map.tensors.items()}
    shards = plan_shards(planned, options.shard_bytes)
    sink = SafetensorsSink(folder, shards, _identity(trained, planned))
    export_weights(trained.source, model_map, sink, progress)
    sink.close()
    (folder / "README.md").write_text(model_card(trained, config, options.license_id, default), encoding="utf-8")
    mode = stat.S_IMODE((folder / "README.md").stat().st_mode)  # as the user's umask has it; some files are copies
    for path in folder.iterdir():
        path.chmod(mode)
    return WrittenFolder(model_map, dtypes, shards, sink.resumed, tokens)


def _dtype_name(trained: Trained, options: ExportOptions) -> str:
    return options.dtype or trained.converted.get("dtype", "fp32")


def _dtypes(trained: Trained, options: ExportOptions) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """Return the dtype of the weights, and that of tensors which have another one."""
    others = {} if options.dtype else trained.converted.get("other_dtypes", {})
    return DTYPES[_dtype_name(trained, options)], {name: DTYPES[dtype] for name, dtype in others.items()}


def _identity(trained: Trained, planned: dict[str, Any]) -> str:
    """Return a hash of what makes two conversions write the same files."""
    checkpoint = (trained.checkpoint / "manifest.json").read_bytes()
    return hashlib.sha256(checkpoint + repr((trained.averaged, sorted(planned.items()))).encode()).hexdigest()


def _write_side_files(trained: Trained, folder: Path, dtype: torch.dtype, kept: bool) -> Any:
    """Write configuration and tokenizer; return the configuration.

    A checkpoint that was converted from such a folder gets that folder's own files, unless the dtype changes.
    """
    source = trained.side_files
    if kept and source is not None:
        for path in sorted(source.iterdir()):
            shutil.copyfile(path, folder / path.name)
        return read_config(folder)
    tokenizer = None
    if trained.tokenizer is not None:
        write_tokenizer(trained.tokenizer, folder, trained.config)
        tokenizer = read_tokenizer(folder)
    config = their_config(trained, tokenizer)
    config.dtype = dtype
    config.save_pretrained(folder)
    _add_fields(folder / "config.json", older_spellings(trained.config, dtype))
    if trained.config.family != "bert" and trained.config.task_head is None:
        from transformers import GenerationConfig

        generation = GenerationConfig.from_model_config(config)
        # what generate() does with this folder by default
        generation.use_cache = caches(config)
        if trained.run is not None and trained.run.stages[-1].objective.name == "answer":
            generation.do_sample = False  # as its answers were measured; pipelines would draw
        generation.save_pretrained(folder)
    return config


def _add_fields(path: Path, fields: dict[str, Any]) -> None:
    """Add fields to a file of JSON; a field that is there already gets this value."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(tree | fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check(
    trained: Trained, written: WrittenFolder, folder: Path, name: Path, options: ExportOptions = ExportOptions()
) -> Exported:
    """Read the folder back and compare weights and logits; `name` is how errors call it.

    Raises:
        CheckpointError: anything differs.
    """
    agreement, losses = None, None
    if options.verify != "none":
        ids = list(range(min(64, trained.config.vocab_size))) if written.tokens is None else written.tokens.ids
        # Logits cannot show everything: rows of tokens that are not in the text, for one.
        source = SafetensorsFolder(folder)
        compare_weights(trained.source, written.map, source, written.dtypes.__getitem__, options.verify)
        agreement = check_logits(trained.config, folder, ids, name)
        if _dtype_name(trained, options) != "fp32" and 4 * trained.num_parameters <= WHOLE_BYTES:
            losses = _check_loss(trained, folder, _dtype_name(trained, options), name)
    return Exported(
        folder=name,
        num_parameters=trained.num_parameters,
        dtype=_dtype_name(trained, options),
        num_files=len(written.shards),
        num_resumed=written.num_resumed,
        agreement=agreement,
        num_shard_tokens=0 if written.tokens is None else written.tokens.num_shard_tokens,
        losses=losses,
    )


def _check_loss(trained: Trained, folder: Path, dtype: str, name: Path) -> LossAgreement:
    """Compare the loss of rounded weights, computed in fp32, with ours."""
    model = load(folder, form_of(trained.config).architecture).check(folder).eval()
    reader = f"transformers with weights in {dtype}"
    return compare_losses(trained, held_out_text(trained), logits_of(model), dtype, reader, name)
