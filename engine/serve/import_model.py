"""Import of a model from another format: a checkpoint of ours, streamed, and compared with its source.

What is written looks like a run folder: `checkpoints/step-N` (weights in fp32, which holds bf16 and fp16 exactly, and
on request the optimizer's moments), `tokenizer/`, and of a Hugging Face folder in `huggingface/` the small files of
the source as they were, for the way back. An import that was killed goes on behind its last whole file.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.folder import CHECKPOINTS
from engine.checkpoint.interchange.convert import (
    Progress,
    Verify,
    blocks,
    compare_moments,
    compare_weights,
    no_progress,
)
from engine.checkpoint.interchange.huggingface import ForeignModel, open_folder, side_files
from engine.checkpoint.interchange.initial import own_weights
from engine.checkpoint.interchange.sinks.checkpoint import no_moments, write_checkpoint
from engine.checkpoint.interchange.source_model import CONVERTED, SourceModel
from engine.checkpoint.interchange.sources.fingerprint import fingerprint_of
from engine.checkpoint.manifest import CheckpointState
from engine.checkpoint.storage import Location
from engine.corpus.tokenizer_import import import_tokenizer
from engine.corpus.tokenizer_training import Purpose
from engine.data.tokenizer.files import MODEL_FILE
from engine.data.tokenizer.folder import tokenizer_hash
from engine.errors import ConfigError
from engine.models.families import family
from engine.redact import redacted
from engine.serve.new_folder import new_folder
from engine.serve.source import SIDE_FILES, TOKENIZER

CODES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_PURPOSES: dict[str, Purpose] = {"gpt": "causal", "bert": "masked", "t5": "span_corruption"}
_TOKENIZER_FILES = (MODEL_FILE, "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class ImportOptions:
    """Choices of an import."""

    shard_bytes: int
    """Bytes of one file at the most, unless one parameter is larger."""
    verify: Verify = "full"
    """Part of what was written that is read back and compared."""
    with_moments: bool = False
    """True carries the optimizer's moments."""


@dataclass(frozen=True)
class Imported:
    """Summary of an import."""

    checkpoint: Path
    opened: SourceModel
    num_parameters: int
    moments: tuple[str, ...]
    tokenizer: bool
    added_tokens: list[str]
    """Tokens that the family's objective needs and the tokenizer lacked."""


def import_folder(
    folder: Location,
    output: Path,
    shard_bytes: int,
    verify: Verify = "full",
    progress: Progress = no_progress,
) -> Imported:
    """Write a model of a Hugging Face folder as one of ours.

    Raises:
        ConfigError: it is none that ours computes, lacks tensors or has others, holds values that are not finite, or
            its tokenizer has more tokens than the model.
        DataError: its tokenizer cannot be used.
        EnvironmentProblem, CheckpointError: the output cannot be written.
    """
    opened = open_folder(folder).check()
    with new_folder(output, resumable=True) as partial, side_files(folder) as local:
        _clear(partial)
        has_tokenizer = any((local / name).is_file() for name in _TOKENIZER_FILES)
        used, added = None, []
        if has_tokenizer:
            tokenizer, added = import_tokenizer(str(local), partial / TOKENIZER, _PURPOSES[opened.model.family])
            used = tokenizer.hash
            _check_vocabulary(folder, tokenizer.vocab_size, opened, added)
        _keep_side_files(local, partial / SIDE_FILES)
        options = ImportOptions(shard_bytes, verify)
        path, _ = _write(opened, "huggingface", folder, partial, options, progress, used)
    return Imported(output / path, opened, _num_parameters(opened), (), has_tokenizer, added)


def import_weights(
    opened: SourceModel,
    kind: str,
    source: Location,
    output: Path,
    options: ImportOptions,
    tokenizer: Path | None = None,
    progress: Progress = no_progress,
) -> Imported:
    """Write a model that was opened from `source` as one of ours, with a copy of our tokenizer where one is named.

    Raises:
        ConfigError: the source lacks tensors of the model or has others, or holds values that are not finite.
        DataError: the folder named as `tokenizer` holds none.
        EnvironmentProblem, CheckpointError: the output cannot be written.
    """
    opened.check()
    with new_folder(output, resumable=True) as partial:
        _clear(partial)
        used = None
        if tokenizer is not None:
            used = tokenizer_hash(tokenizer)
            (partial / TOKENIZER).mkdir()
            for path in tokenizer.iterdir():
                if path.is_file():
                    shutil.copyfile(path, partial / TOKENIZER / path.name)
        path, moments = _write(opened, kind, source, partial, options, progress, used)
    return Imported(output / path, opened, _num_parameters(opened), moments, tokenizer is not None, [])


def dtypes_of(opened: SourceModel) -> dict[str, torch.dtype]:
    """Return the stored dtype of each tensor of a model of theirs."""
    return {name: opened.source.dtype(name) for name in opened.map.tensors}


def _write(
    opened: SourceModel,
    kind: str,
    source: Location,
    partial: Path,
    options: ImportOptions,
    progress: Progress,
    tokenizer: str | None,
) -> tuple[Path, tuple[str, ...]]:
    """Write and compare the checkpoint; return its path below `partial`, and the moments that it holds."""
    specs = family(opened.model).specs(opened.model)
    moments_of = opened.moments_of if options.with_moments else no_moments
    facts = _facts(opened, kind, source)
    state = _state(opened, facts, options.with_moments, tokenizer)

    def values(spec: Any, name: str) -> Iterator[torch.Tensor]:
        one = opened.map.parameters[spec.name]
        for block in blocks(one, lambda first, end: opened.read(spec.name, first, end, name)):
            yield block
            progress(block.nbytes)

    identity = hashlib.sha256(repr((facts, options.shard_bytes, options.with_moments)).encode()).hexdigest()
    path = write_checkpoint(partial / CHECKPOINTS, state, specs, values, options.shard_bytes, moments_of, identity)
    written = own_weights(path)
    if options.verify != "none":
        compare_weights(written.source, opened.map, opened.source, dtypes_of(opened).__getitem__, options.verify)
        compare_moments(written, opened, options.verify)
    return path.relative_to(partial), tuple(written.moments)


def _num_parameters(opened: SourceModel) -> int:
    return sum(int(torch.Size(one.shape).numel()) for one in opened.map.parameters.values())


def _clear(partial: Path) -> None:
    """Remove what a killed import has left, but for the files of its checkpoint, which are noted with their hashes."""
    for path in partial.iterdir():
        if path.is_dir() and not path.name.strip(".").startswith(CHECKPOINTS):
            shutil.rmtree(path)


def _facts(opened: SourceModel, kind: str, source: Location) -> dict[str, Any]:
    dtypes = dtypes_of(opened)
    most, _ = Counter(dtypes.values()).most_common(1)[0]
    return {
        "kind": kind,
        "source": str(redacted(str(source))),
        "fingerprint": fingerprint_of(opened.source, opened.map),
        "dtype": CODES[most],
        "other_dtypes": {name: CODES[dtype] for name, dtype in dtypes.items() if dtype != most},
    }


def _state(opened: SourceModel, facts: dict[str, Any], with_moments: bool, tokenizer: str | None) -> CheckpointState:
    sections = {CONVERTED: facts} | ({} if tokenizer is None else {"tokenizer": {"hash": tokenizer}})
    return CheckpointState(
        # a step belongs to an optimizer's state
        step=(opened.step or 0) if with_moments else 0,
        tokens=0,
        zero_stage=0,
        config_hash=facts["fingerprint"][:16],
        config={"model": opened.model.model_dump(mode="json")},
        sections=sections,
    )


def _keep_side_files(local: Path, folder: Path) -> None:
    folder.mkdir()
    for path in sorted(local.iterdir()):
        if path.is_file() and path.name != "README.md" and ".safetensors" not in path.name and path.suffix != ".bin":
            shutil.copyfile(path, folder / path.name)


def _check_vocabulary(folder: Location, num_tokens: int, opened: ForeignModel, added: list[str]) -> None:
    if num_tokens > opened.model.vocab_size:
        more = f", {len(added)} of them added for the objective ({', '.join(added[:3])})" if added else ""
        raise ConfigError(
            f"the tokenizer in {folder} has {num_tokens} tokens{more}, the model {opened.model.vocab_size} rows",
            f"at most {opened.model.vocab_size} tokens",
            "take the tokenizer that the model was trained with",
        )
