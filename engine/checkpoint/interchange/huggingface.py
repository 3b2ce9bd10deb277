"""Models of Hugging Face's library, to and from ours: whole ones in memory, and folders that are read row by row.

The tables are in `forms`, the correspondence of parameters in `mapping`. A configuration must be exactly of a form: a
mix (GPT-2 with rotary positions, say) has no twin that computes the same and is refused by the names of the fields.
Only real vocabulary rows travel. Dropout does not: it belongs to the run. Nothing here reads a run or writes a folder.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.checkpoint.interchange.foreign_model import load, read_config
from engine.checkpoint.interchange.forms import (
    BERT,
    BERT_WITHOUT_PAIRS,
    MEGATRON_BERT,
    MEGATRON_BERT_WITHOUT_PAIRS,
    Form,
    form_of,
    form_of_theirs,
    require_form,
)
from engine.checkpoint.interchange.mapping import ModelMap
from engine.checkpoint.interchange.source_model import SourceModel
from engine.checkpoint.interchange.sources import (
    MemorySource,
    SafetensorsFolder,
    Source,
)
from engine.checkpoint.interchange.sources.renamed import renamed
from engine.checkpoint.interchange.sources.safetensors_folder import unreadable
from engine.checkpoint.mismatch import check_tensors
from engine.checkpoint.storage import Location
from engine.config.schema.model import ModelConfig
from engine.models.families import family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Tensors = dict[str, torch.Tensor]
VOCAB_MULTIPLE: int = ModelConfig.model_fields["vocab_multiple"].default
SIDE_FILES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")
"""Endings of the small files of a folder: configurations, tokenizer, chat template, code that is refused."""
_PAIRED = ((BERT_WITHOUT_PAIRS, BERT), (MEGATRON_BERT_WITHOUT_PAIRS, MEGATRON_BERT))
"""Forms without the head for pairs, and those with it."""


@dataclass(frozen=True, kw_only=True)
class ForeignModel(SourceModel):
    """A model of theirs: the form that it is of, and its configuration."""

    form: Form
    theirs: PretrainedConfig


def open_folder(folder: Location, vocab_multiple: int = VOCAB_MULTIPLE) -> ForeignModel:
    """Open a folder of theirs; reads configuration and headers.

    `vocab_multiple` becomes the key of that name, which theirs do not have.

    Raises:
        ConfigError: the folder cannot be read, or its model is none that ours computes.
    """
    theirs = read_configuration(folder)
    form = require_form(theirs)
    model = form.our_config(theirs, vocab_multiple)
    source = renamed(SafetensorsFolder(folder), form.prefix, form.heads, form.spellings)
    paired = next((whole for without, whole in _PAIRED if without is form), None)
    if paired is not None and "cls.seq_relationship.weight" in source.shapes:
        # bert-base-uncased names the class without pairs and has the head for them: nothing is dropped
        form = paired
        model = form.our_config(theirs, vocab_multiple)
    return _foreign(model, form, theirs, source)


def read_configuration(folder: Location) -> PretrainedConfig:
    """Return the configuration of a folder of theirs. Raises `ConfigError` where it cannot be read."""
    with side_files(folder) as local:
        return read_config(local)


def open_model(theirs: PreTrainedModel, vocab_multiple: int = VOCAB_MULTIPLE) -> ForeignModel:
    """Open a live model of theirs. Raises `ConfigError` where it is none that ours computes."""
    config = theirs.config
    form = require_form(config, type(theirs).__name__)
    model = form.our_config(config, vocab_multiple)
    source = MemorySource(theirs.state_dict(), type(theirs).__name__)
    return _foreign(model, form, config, renamed(source, form.prefix, form.heads, form.spellings))


def _foreign(model: ModelConfig, form: Form, theirs: PretrainedConfig, source: Source) -> ForeignModel:
    model_map = form.mapping(model, theirs.pad_token_id)
    return ForeignModel(model=model, map=model_map, source=source, unused=form.unused, form=form, theirs=theirs)


@contextlib.contextmanager
def side_files(folder: Location) -> Iterator[Path]:
    """Yield a local folder with the small files of a folder of theirs: itself, or copies of those behind a URL."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for path in folder.iterdir():
                if path.name.endswith(SIDE_FILES) and path.is_file():
                    with path.open("rb") as file:
                        (Path(scratch) / path.name).write_bytes(file.read())
        except OSError as error:
            raise unreadable(folder, str(error.strerror or error)) from error
        yield Path(scratch)


def from_huggingface(
    source: Path | PreTrainedModel, vocab_multiple: int = VOCAB_MULTIPLE
) -> tuple[ModelConfig, Tensors]:
    """Return our configuration and weights (fp32 copies, real rows, by logical name) of their folder or model.

    Raises:
        ConfigError: the folder cannot be read, lacks tensors or has others, or its model is none that ours computes.
    """
    found = open_folder(source, vocab_multiple) if isinstance(source, Path) else open_model(source, vocab_multiple)
    found.check()
    return found.model, {name: found.read(name) for name in found.map.parameters}


def to_huggingface(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor], padding_id: int | None = None
) -> tuple[PretrainedConfig, Tensors]:
    """Return their configuration and state dictionary for our weights (`tensors`: real rows, by logical name).

    The dtype is kept and tensors may share memory with ours; a tied head is left to `tie_weights`. `padding_id` is the
    tokenizer's; without one the padding token is the form's own.

    Raises:
        ConfigError: the model is not exactly of one of the forms.
        CheckpointError: parameters are missing, unknown or of another shape than the configuration says.
    """
    form = form_of(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_tensors(shapes, {spec.name: spec.stored_shape for spec in family(config).specs(config)}, "the source")
    theirs = form.their_config(config, padding_id)
    model_map, state = form.mapping(config, theirs.pad_token_id), {}
    for name in model_map.parameters:
        state |= _parts(model_map, name, tensors[name])
    return theirs, state


def their_map(config: ModelConfig, padding_id: int | None = None) -> ModelMap:
    """Return where each parameter of a model of ours is in Hugging Face's class of the same form.

    Raises:
        ConfigError: the model is not exactly of one of the forms.
    """
    form = form_of(config)
    return form.mapping(config, form.their_config(config, padding_id).pad_token_id)


def _parts(model_map: ModelMap, name: str, tensor: torch.Tensor) -> Tensors:
    parts = dict(model_map.parts(name, tensor))
    # Copies where there are several: files of theirs must not share memory between tensors.
    return {name: part.clone() if len(parts) > 1 else part.contiguous() for name, part in parts.items()}


def read_model(folder: Path) -> PreTrainedModel:
    """Return the model of a Hugging Face folder, of any architecture of theirs, in fp32. No pickle is opened.

    Raises:
        ConfigError: the folder cannot be read, lacks tensors or has others, or holds values that are not finite.
    """
    form = form_of_theirs(read_config(folder))
    return load(folder, "AutoModelForCausalLM" if form is None else form.architecture).check(folder)
