"""Import of a Hugging Face folder: a checkpoint of ours with the tokenizer, streamed, and compared with its source.

What is written looks like a run folder: `checkpoints/step-00000000` (weights alone, in fp32, which holds bf16 and fp16
exactly), `tokenizer/`, and in `huggingface/` the small files of the source as they were, for the way back.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint.folder import CHECKPOINTS
from engine.checkpoint.interchange.convert import Progress, Verify, blocks, compare_weights, no_progress
from engine.checkpoint.interchange.huggingface import ForeignModel, open_folder, side_files
from engine.checkpoint.interchange.sinks.checkpoint import write_checkpoint
from engine.checkpoint.interchange.sources import CheckpointSource
from engine.checkpoint.interchange.sources.fingerprint import fingerprint_of
from engine.checkpoint.manifest import CheckpointState
from engine.checkpoint.storage import Location
from engine.corpus.tokenizer_import import import_tokenizer
from engine.corpus.tokenizer_training import Purpose
from engine.data.tokenizer.files import MODEL_FILE
from engine.errors import ConfigError
from engine.models.families import family
from engine.parallel.sharding import ParameterSpec
from engine.redact import redacted
from engine.serve.new_folder import new_folder
from engine.serve.source import CONVERTED, SIDE_FILES, TOKENIZER

CODES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_PURPOSES: dict[str, Purpose] = {"gpt": "causal", "bert": "masked", "t5": "span_corruption"}
_TOKENIZER_FILES = (MODEL_FILE, "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class Imported:
    """Summary of an import."""

    checkpoint: Path
    opened: ForeignModel
    num_parameters: int
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
    """Write a model of theirs as one of ours.

    Raises:
        ConfigError: it is none that ours computes, lacks tensors or has others, holds values that are not finite, or
            its tokenizer has more tokens than the model.
        DataError: its tokenizer cannot be used.
        EnvironmentProblem, CheckpointError: the output cannot be written.
    """
    opened = open_folder(folder).check()
    with new_folder(output) as partial, side_files(folder) as local:
        has_tokenizer = any((local / name).is_file() for name in _TOKENIZER_FILES)
        tokenizer_hash, added = None, []
        if has_tokenizer:
            tokenizer, added = import_tokenizer(str(local), partial / TOKENIZER, _PURPOSES[opened.model.family])
            tokenizer_hash = tokenizer.hash
            _check_vocabulary(folder, tokenizer.vocab_size, opened, added)
        _keep_side_files(local, partial / SIDE_FILES)
        specs = family(opened.model).specs(opened.model)
        state = _state(folder, opened, tokenizer_hash)
        path = write_checkpoint(
            partial / CHECKPOINTS, state, specs, lambda spec: _values(opened, spec, progress), shard_bytes
        )
        written = CheckpointSource(path)
        if verify != "none":
            compare_weights(written, opened.map, opened.source, dtypes_of(opened).__getitem__, verify)
    count = sum(int(torch.Size(spec.stored_shape).numel()) for spec in specs)
    return Imported(output / path.relative_to(partial), opened, count, has_tokenizer, added)


def dtypes_of(opened: ForeignModel) -> dict[str, torch.dtype]:
    """Return the stored dtype of each tensor of a model of theirs."""
    return {name: opened.source.dtype(name) for name in opened.map.tensors}


def _state(folder: Location, opened: ForeignModel, tokenizer_hash: str | None) -> CheckpointState:
    dtypes = dtypes_of(opened)
    most, _ = Counter(dtypes.values()).most_common(1)[0]
    facts = {
        "kind": "huggingface",
        "source": str(redacted(str(folder))),
        "fingerprint": fingerprint_of(opened.source, opened.map),
        "dtype": CODES[most],
        "other_dtypes": {name: CODES[dtype] for name, dtype in dtypes.items() if dtype != most},
    }
    sections = {CONVERTED: facts} | ({} if tokenizer_hash is None else {"tokenizer": {"hash": tokenizer_hash}})
    return CheckpointState(
        step=0,
        tokens=0,
        zero_stage=0,
        config_hash=facts["fingerprint"][:16],
        config={"model": opened.model.model_dump(mode="json")},
        sections=sections,
    )


def _values(opened: ForeignModel, spec: ParameterSpec, progress: Progress) -> Iterator[torch.Tensor]:
    for block in blocks(opened.map.parameters[spec.name], lambda first, end: opened.read(spec.name, first, end)):
        yield block
        progress(block.nbytes)


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
