"""Weights and configuration to and from Hugging Face's models, by one name table per form of model.

The tables (`forms`) are read in both directions. A configuration must be exactly of a form: a mix
(GPT-2 with rotary positions, say) has no twin that computes the same and is refused by the names of the fields. Only
real vocabulary rows travel. Dropout does not: it is 0 on both sides. Nothing here reads a run or writes a folder: see
`engine.serve.export`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.checkpoint.interchange.bert_forms import BERT, BERT_WITHOUT_PAIRS, MODERN_BERT, ROBERTA
from engine.checkpoint.interchange.foreign_model import load, read_config
from engine.checkpoint.interchange.forms import GPT2, LLAMA, Form, Theirs
from engine.checkpoint.interchange.t5_form import T5
from engine.checkpoint.mismatch import check_tensors
from engine.config.huggingface_forms import nearest
from engine.config.schema.model import ModelConfig, make_model
from engine.errors import ConfigError, PalimpsestError, report
from engine.models.families import family
from engine.parallel.sharding import ParameterSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Tensors = dict[str, torch.Tensor]
Names = Callable[[ParameterSpec, torch.Tensor], Tensors]
"""Function from a parameter or a moment of it (stored shape) to its parts by the names of another format."""
FORMS = (GPT2, LLAMA, BERT, BERT_WITHOUT_PAIRS, ROBERTA, MODERN_BERT, T5)


def to_huggingface(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor], padding_id: int | None = None
) -> tuple[PretrainedConfig, Tensors]:
    """Their configuration and state dictionary for our weights (`tensors`: real rows, by logical name).

    The dtype is kept and tensors may share memory with ours; a tied head is left to `tie_weights`. `padding_id` is the
    tokenizer's; without one the padding token is the form's own.

    Raises:
        ConfigError: the model is not exactly of one of the forms.
        CheckpointError: parameters are missing, unknown or of another shape than the configuration says.
    """
    form = form_of(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_tensors(shapes, {spec.name: spec.stored_shape for spec in family(config).specs(config)}, "the source")
    theirs = _their_config(form, config, padding_id)
    state: Tensors = {}
    for spec in family(config).specs(config):
        state |= _their_tensors(config, form, spec, tensors[spec.name], theirs.pad_token_id)
    return theirs, state


def their_names(config: ModelConfig, padding_id: int | None = None) -> Names:
    """Return a function that does for one parameter at a time what `to_huggingface` does for all.

    Raises:
        ConfigError: the model is not exactly of one of the forms.
    """
    form = form_of(config)
    padding_id = _their_config(form, config, padding_id).pad_token_id
    return lambda spec, tensor: _their_tensors(config, form, spec, tensor, padding_id)


def _their_tensors(
    config: ModelConfig, form: Form, spec: ParameterSpec, tensor: torch.Tensor, padding_id: int | None
) -> Tensors:
    entry, names = _theirs(config, form, spec)
    parts, state = (tensor,), {}
    if len(names) > 1:  # copies: files of theirs must not share memory between tensors
        parts = tuple(part.clone() for part in tensor.split(spec.blocks(), dim=0))
    for name, part in zip(names, parts, strict=True):
        if entry.after_padding:
            assert padding_id is not None, f"{form.name} counts positions from it on"
            # Padding token 1: two rows of zeros, and our position 0 is their row 2.
            part = torch.cat([part.new_zeros(padding_id + 1, *part.shape[1:]), part])
        # biases (1-D) have no orientation
        state[name] = part.t().contiguous() if entry.transposed and part.dim() == 2 else part.contiguous()
    return state


def from_huggingface(
    source: Path | PreTrainedModel, vocab_multiple: int = ModelConfig.model_fields["vocab_multiple"].default
) -> tuple[ModelConfig, Tensors]:
    """Our configuration and weights (fp32 copies, real rows, by logical name) of their folder or model.

    `vocab_multiple` becomes the key of that name, which theirs do not have.

    Raises:
        ConfigError: the folder cannot be read, lacks tensors or has others, or its model is none that ours computes.
    """
    if isinstance(source, Path):
        config = our_config(read_config(source), vocab_multiple)
        source = read_model(source)
    else:
        config = our_config(source.config, vocab_multiple, type(source).__name__)
    form, state = form_of(config), source.state_dict()
    tensors: Tensors = {}
    for spec in family(config).specs(config):
        entry, names = _theirs(config, form, spec)
        tensors[spec.name] = _ours(entry, [state[name] for name in names], source.config.pad_token_id)
    # transformers loads such a file as it is, although the configuration says tied (`t5_form`).
    if form is T5 and config.tie_embeddings and not torch.equal(state["lm_head.weight"], state["shared.weight"]):
        raise ConfigError(
            "lm_head.weight is not shared.weight, although they are tied", "scale_decoder_outputs = false"
        )
    return config, tensors


def tensors_in(folder: Path) -> dict[str, torch.Tensor | None]:
    """Return the weights that a folder of theirs holds, by logical name, for a comparison.

    None stands for a parameter of its configuration that no file holds whole; a tensor that the model has no place for
    stands under its own name.

    Raises:
        ConfigError: the folder cannot be read, or its model is none that ours computes.
    """
    theirs = read_config(folder)
    # No padding: stored rows are all that is compared.
    config = our_config(theirs, vocab_multiple=1)
    form, loaded = form_of(config), load(folder, _architecture(theirs))
    state, missing = loaded.model.state_dict(), set(loaded.missing)
    found: dict[str, torch.Tensor | None] = dict.fromkeys(loaded.unexpected, torch.empty(0))
    for spec in family(config).specs(config):
        entry, names = _theirs(config, form, spec)
        whole = missing.isdisjoint(names)
        found[spec.name] = _ours(entry, [state[name] for name in names], theirs.pad_token_id) if whole else None
    return found


def _ours(entry: Theirs, parts: list[torch.Tensor], padding_id: int | None) -> torch.Tensor:
    """Return the parameter of ours, an fp32 copy, that theirs make up together."""
    parts = [part.detach().float() for part in parts]
    if entry.after_padding:
        assert padding_id is not None, "positions are counted from it on"
        parts = [part[padding_id + 1 :] for part in parts]
    return torch.cat([part.t() if entry.transposed and part.dim() == 2 else part for part in parts])  # cat copies


def read_model(folder: Path) -> PreTrainedModel:
    """Return the model of a Hugging Face folder, of any architecture of theirs, in fp32. No pickle is opened.

    Raises:
        ConfigError: the folder cannot be read, lacks tensors or has others, or holds values that are not finite.
    """
    return load(folder, _architecture(read_config(folder))).check(folder)


def _architecture(theirs: PretrainedConfig) -> str:
    form = _form_of_theirs(theirs)
    return "AutoModelForCausalLM" if form is None else form.architecture


def form_of(config: ModelConfig) -> Form:
    """Return the form that a configuration matches exactly.

    Raises:
        ConfigError: it is a mix; names the fields that keep it from the nearest form.
    """
    twin, problems = nearest(config)
    if problems:
        raise report(problems, f"Hugging Face has no twin of this model (nearest: {twin.name})")
    return next(form for form in FORMS if form.twin is twin)


def our_config(theirs: PretrainedConfig, vocab_multiple: int, architecture: str = "") -> ModelConfig:
    """Return the `ModelConfig` that computes what their configuration does, of a model of the class `architecture`.

    Raises:
        ConfigError: there is none; names the fields.
    """
    form = _form_of_theirs(theirs, architecture)
    if form is None:
        raise ConfigError(
            f"a Hugging Face model of type {theirs.model_type}", " or ".join({form.model_type: 0 for form in FORMS})
        )
    problems: list[PalimpsestError] = [
        ConfigError(f"{name} = {getattr(theirs, name)!r}", " or ".join(map(repr, allowed)))
        for name, allowed in form.theirs.items()
        # A field that their class does not have cannot ask for anything else.
        if getattr(theirs, name, allowed[0]) not in allowed
    ]
    values: dict[str, Any] = {ours: getattr(theirs, name) for ours, name in form.fields.items()}
    values = {key: value for key, value in values.items() if value is not None}  # None is their word for a default
    values |= form.read(theirs, problems)
    if problems:
        raise report(problems, f"this {form.name} model has no twin here")
    return make_model(**values, **form.twin.values, vocab_multiple=vocab_multiple)


def _form_of_theirs(theirs: PretrainedConfig, architecture: str = "") -> Form | None:
    """Return the form of their model type; of several, that of the class, given or named in the configuration."""
    forms = [form for form in FORMS if form.model_type == theirs.model_type]
    said = [architecture, *(theirs.architectures or [])]
    return next((form for form in forms if form.architecture in said), forms[0] if forms else None)


def _their_config(form: Form, config: ModelConfig, padding_id: int | None) -> PretrainedConfig:
    from transformers import AutoConfig

    values = {name: getattr(config, ours) for ours, name in form.fields.items()} | form.extras(config)
    # Theirs default to token ids of their own vocabularies; whoever has the tokenizer sets the right ones.
    values |= {"bos_token_id": None, "eos_token_id": None, "architectures": [form.architecture]}
    theirs = AutoConfig.for_model(form.model_type, **values)
    if padding_id is not None:
        theirs.pad_token_id = padding_id
    if form.after_padding:
        # 512 positions and padding token 1 make 514, as in roberta-base
        theirs.max_position_embeddings = config.max_positions + theirs.pad_token_id + 1
    return theirs


def _theirs(config: ModelConfig, form: Form, spec: ParameterSpec) -> tuple[Theirs, list[str]]:
    """Return the table entry of one of our parameters, and the names of those of theirs that it is made of."""
    module, _, kind = spec.name.rpartition(".")
    key, layer = form.key(config, module)
    # Some biases of theirs belong to another module than the weight (BERT's `cls.predictions`).
    entry = form.names.get(f"{key}.{kind}") or form.names[key]
    return entry, [f"{name.replace('#', layer)}.{kind}" for name in entry.modules]
