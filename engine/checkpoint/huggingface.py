"""Weights and configuration to and from Hugging Face's GPT-2 and Llama models, by one name table per form.

The tables are read in both directions. A configuration must be exactly of a form: a mix (GPT-2 with rotary
positions, say) has no twin that computes the same and is refused by the names of the fields. Only real vocabulary
rows travel. Dropout does not: it is 0 on both sides. Nothing here reads a run or writes a folder: see
`engine.serve.export`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.config.schema import ModelConfig
from engine.errors import CheckpointError, ConfigError, PalimpsestError, report
from engine.models.gpt import specs
from engine.parallel.sharding import ParameterSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Theirs:
    """Modules whose parameters, one after the other along the outputs, are ours; `transposed` weights are (in, out)."""

    modules: tuple[str, ...]
    transposed: bool = False


def _one(module: str) -> Theirs:
    return Theirs((module,))


def _conv1d(module: str) -> Theirs:
    return Theirs((module,), transposed=True)


GPT2_NAMES = {
    "embed_tokens": _one("transformer.wte"),
    "embed_positions": _one("transformer.wpe"),
    "layers.#.attention_norm": _one("transformer.h.#.ln_1"),
    "layers.#.attention.qkv_proj": _conv1d("transformer.h.#.attn.c_attn"),
    "layers.#.attention.out_proj": _conv1d("transformer.h.#.attn.c_proj"),
    "layers.#.ffn_norm": _one("transformer.h.#.ln_2"),
    "layers.#.ffn.up_proj": _conv1d("transformer.h.#.mlp.c_fc"),
    "layers.#.ffn.down_proj": _conv1d("transformer.h.#.mlp.c_proj"),
    "final_norm": _one("transformer.ln_f"),
    "lm_head": _one("lm_head"),
}
LLAMA_NAMES = {
    "embed_tokens": _one("model.embed_tokens"),
    "layers.#.attention_norm": _one("model.layers.#.input_layernorm"),
    "layers.#.attention.qkv_proj": Theirs(tuple(f"model.layers.#.self_attn.{part}_proj" for part in "qkv")),
    "layers.#.attention.out_proj": _one("model.layers.#.self_attn.o_proj"),
    "layers.#.ffn_norm": _one("model.layers.#.post_attention_layernorm"),
    "layers.#.ffn.gate_up_proj": Theirs(("model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj")),
    "layers.#.ffn.down_proj": _one("model.layers.#.mlp.down_proj"),
    "final_norm": _one("model.norm"),
    "lm_head": _one("lm_head"),
}


@dataclass(frozen=True)
class Form:
    """One of the model forms that both sides have.

    `ours` are the values that `ModelConfig` must have, `theirs` the values that theirs may have, `fields` the
    fields that carry over (ours -> theirs) and `extras` what else their configuration says of ours.
    """

    name: str
    model_type: str
    names: Mapping[str, Theirs]
    ours: Mapping[str, Any]
    theirs: Mapping[str, tuple[Any, ...]]
    fields: Mapping[str, str]
    extras: Callable[[ModelConfig], dict[str, Any]]


GPT2 = Form(
    name="GPT-2",
    model_type="gpt2",
    names=GPT2_NAMES,
    ours={"position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True},
    theirs={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    fields={
        "vocab_size": "vocab_size",
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_heads": "n_head",
        "ffn_size": "n_inner",
        "max_positions": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    extras=lambda config: {
        "n_inner": config.inner_size,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "architectures": ["GPT2LMHeadModel"],
    },
)
LLAMA = Form(
    name="Llama",
    model_type="llama",
    names=LLAMA_NAMES,
    ours={"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False},
    theirs={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    fields={
        "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "ffn_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "norm_epsilon": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    extras=lambda config: {
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.inner_size,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "architectures": ["LlamaForCausalLM"],
    },
)
FORMS = (GPT2, LLAMA)


def to_huggingface(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> tuple[PretrainedConfig, Tensors]:
    """Their configuration and state dictionary for our weights (`tensors`: real rows, by logical name).

    The dtype is kept and tensors may share memory with ours; a tied head is left to `tie_weights`.

    Raises:
        ConfigError: the model is neither exactly GPT-2 nor exactly Llama.
        CheckpointError: parameters are missing, unknown or of another shape than the configuration says.
    """
    form = form_of(config)
    _check_tensors(config, tensors)
    state: Tensors = {}
    for spec in specs(config):
        modules, transposed, kind = _theirs(form, spec)
        parts = (tensors[spec.name],)
        if len(modules) > 1:  # copies: files of theirs must not share memory between tensors
            parts = tuple(part.clone() for part in tensors[spec.name].split(spec.blocks(), dim=0))
        for module, part in zip(modules, parts, strict=True):
            state[f"{module}.{kind}"] = part.t().contiguous() if transposed else part.contiguous()
    return _their_config(form, config), state


def from_huggingface(
    source: Path | PreTrainedModel, vocab_multiple: int = ModelConfig.model_fields["vocab_multiple"].default
) -> tuple[ModelConfig, Tensors]:
    """Our configuration and weights (fp32 copies, real rows, by logical name) of their folder or model.

    `vocab_multiple` becomes the key of that name, which theirs do not have.

    Raises:
        ConfigError: the folder cannot be read, or its model is not a GPT-2 or Llama that ours computes.
    """
    if isinstance(source, Path):
        config = our_config(_read_config(source), vocab_multiple)
        source = read_model(source)
    else:
        config = our_config(source.config, vocab_multiple)
    form, state = form_of(config), source.state_dict()
    tensors: Tensors = {}
    for spec in specs(config):
        modules, transposed, kind = _theirs(form, spec)
        parts = [state[f"{module}.{kind}"].detach().float() for module in modules]
        tensors[spec.name] = torch.cat([part.t() if transposed else part for part in parts])  # cat always copies
    return config, tensors


def form_of(config: ModelConfig) -> Form:
    """The form that a configuration is exactly of.

    Raises:
        ConfigError: it is a mix; names the fields that keep it from the nearest form.
    """
    wrong = {form.name: _mismatches(form, config) for form in FORMS}
    nearest = min(FORMS, key=lambda form: len(wrong[form.name]))
    problems = wrong[nearest.name]
    if problems:
        raise report(problems, f"Hugging Face has no twin of this model (nearest: {nearest.name})")
    return nearest


def our_config(theirs: PretrainedConfig, vocab_multiple: int) -> ModelConfig:
    """The `ModelConfig` that computes what their configuration does.

    Raises:
        ConfigError: there is none; names the fields.
    """
    form = next((form for form in FORMS if form.model_type == theirs.model_type), None)
    if form is None:
        raise ConfigError(
            f"a Hugging Face model of type {theirs.model_type}", " or ".join(form.model_type for form in FORMS)
        )
    problems: list[PalimpsestError] = [
        ConfigError(f"{name} = {getattr(theirs, name)!r}", " or ".join(map(repr, allowed)))
        for name, allowed in form.theirs.items()
        if getattr(theirs, name, allowed[0]) not in allowed
    ]
    values: dict[str, Any] = {ours: getattr(theirs, name) for ours, name in form.fields.items()}
    if form is LLAMA:
        values["rope_theta"] = float(_rope_theta(theirs, problems))
        _check_head_size(theirs, problems)
    if problems:
        raise report(problems, f"this {form.name} model has no twin here")
    return ModelConfig(**values, **form.ours, vocab_multiple=vocab_multiple)


def _mismatches(form: Form, config: ModelConfig) -> list[PalimpsestError]:
    problems: list[PalimpsestError] = [
        ConfigError(f"model.{key} = {getattr(config, key)}", f"{value} in {form.name} form")
        for key, value in form.ours.items()
        if getattr(config, key) != value
    ]
    if form is GPT2 and config.kv_heads != config.num_heads:
        problems.append(
            ConfigError(
                f"model.num_kv_heads = {config.kv_heads}", f"{config.num_heads} (model.num_heads) in {form.name} form"
            )
        )
    return problems


def _rope_theta(theirs: PretrainedConfig, problems: list[PalimpsestError]) -> float:
    """Base of their rotary frequencies; any scaling of them is a problem."""
    rope: dict[str, Any] = getattr(theirs, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        problems.append(ConfigError(f"rope_parameters.rope_type = {kind!r}", "'default'"))
    return rope.get("rope_theta", 10000.0)


def _check_head_size(theirs: Any, problems: list[PalimpsestError]) -> None:
    expected = theirs.hidden_size // theirs.num_attention_heads
    if getattr(theirs, "head_dim", None) not in (None, expected):
        problems.append(ConfigError(f"head_dim = {theirs.head_dim}", f"{expected} (hidden_size / num_attention_heads)"))


def _their_config(form: Form, config: ModelConfig) -> PretrainedConfig:
    from transformers import AutoConfig

    values = {name: getattr(config, ours) for ours, name in form.fields.items()} | form.extras(config)
    # Theirs default to token ids of their own vocabularies; whoever has the tokenizer sets the right ones.
    return AutoConfig.for_model(form.model_type, **values, bos_token_id=None, eos_token_id=None)


def _theirs(form: Form, spec: ParameterSpec) -> tuple[list[str], bool, str]:
    """(their modules, whether the tensor is transposed, weight or bias) of one of our parameters."""
    module, _, kind = spec.name.rpartition(".")
    layer = next(iter(re.findall(r"\.(\d+)\.", module)), "")
    entry = form.names[re.sub(r"\.\d+\.", ".#.", module)]
    return [name.replace("#", layer) for name in entry.modules], entry.transposed and kind == "weight", kind


def _check_tensors(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    expected = {spec.name: spec.stored_shape for spec in specs(config)}
    problems = list(_tensor_problems(expected, tensors))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the weights do not belong to this model: {'; '.join(problems[:3])}{more}",
            "the parameters of the configuration, whole and without padding",
            "convert with the configuration that the run was trained with",
        )


def _tensor_problems(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name, shape in expected.items():
        if name not in tensors:
            yield f"{name} is missing"
        elif tuple(tensors[name].shape) != shape:
            yield f"{name} has shape {tuple(tensors[name].shape)} and not {shape}"
    yield from (f"{name} is unknown" for name in tensors if name not in expected)


def _read_config(folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def read_model(folder: Path) -> PreTrainedModel:
    """The model of a Hugging Face folder, of any architecture of theirs, in fp32. No pickle is opened.

    Raises:
        ConfigError: the folder cannot be read.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{folder} cannot be read as a Hugging Face model: {str(error).splitlines()[0]}",
        "a folder with config.json and safetensors",
        "name a folder that `palimpsest convert` or save_pretrained wrote",
    )
