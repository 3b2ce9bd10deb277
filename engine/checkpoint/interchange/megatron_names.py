"""Names of Megatron's GPT and BERT in all their spellings: Megatron-LM before and since Core, Transformer Engine's,
DeepSpeed's.

One spelling is Core's without its stacks (`unified`); the map of a model (`megatron_map`) has that one. Queries, keys
and values are one matrix, group by group of query heads: the group's queries, its key, its value. What the arguments
in the files and the names tell of the model is compared with ours in `check_settings`.

Follows megatron/legacy/model/bert_model.py (until core_v0.17) and megatron/core/models/bert/bert_model.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.checkpoint.interchange.mapping import ModelMap, ParameterMap, Run
from engine.checkpoint.interchange.sources.unnamed import Parts, Unnamed
from engine.config.schema.model import FamilyName, ModelConfig
from engine.errors import ConfigError
from engine.models.families import family
from engine.parallel.sharding import ParameterSpec, Shape

_WITHIN = (
    (r"(?:self_)?attention\.(?:query_key_value|linear_qkv)\.(weight|bias)", r"qkv.\1"),
    (r"(?:self_)?attention\.(?:dense|linear_proj)\.(weight|bias)", r"proj.\1"),
    (r"(?:self_)?attention\.linear_qkv\.layer_norm_(weight|bias)", r"input_norm.\1"),
    (r"input_(?:layer)?norm\.(weight|bias)", r"input_norm.\1"),
    (r"(?:post_attention_(?:layer)?norm|pre_mlp_layernorm)\.(weight|bias)", r"mlp_norm.\1"),
    (r"mlp\.linear_fc1\.layer_norm_(weight|bias)", r"mlp_norm.\1"),
    (r"mlp\.(?:dense_h_to_4h|linear_fc1)\.(weight|bias)", r"fc1.\1"),
    (r"mlp\.(?:dense_4h_to_h|linear_fc2)\.(weight|bias)", r"fc2.\1"),
)
"""Names within a layer -> the one spelling."""
_OUTSIDE = (
    (r"(?:.*\.)?lm_head\.dense\.(weight|bias)", r"transform.\1"),
    (r"(?:.*\.)?lm_head\.(?:layer_norm|layernorm|norm)\.(weight|bias)", r"transform_norm.\1"),
    (r"(?:.*\.)?(?:output_layer|lm_head)\.bias", "output.bias"),
    (r"(?:.*\.)?tokentype_embeddings\.weight", "types.weight"),
    (r"(?:.*\.)?pooler\.dense\.(weight|bias)", r"pooler.\1"),
    (r"(?:.*\.)?binary_head\.(weight|bias)", r"binary_head.\1"),
    (r"(?:.*\.)?word_embeddings_for_head\.weight", "output.weight"),
    (r"(?:.*\.)?(?:output_layer|final_linear|lm_head)\.weight", "output.weight"),
    (r"(?:.*\.)?word_embeddings\.weight", "embedding.weight"),
    (r"(?:.*\.)?position_embeddings\.weight", "positions.weight"),
    (r"(?:.*\.)?(?:final_layernorm|final_norm|norm)\.(weight|bias)", r"final_norm.\1"),
)
_OURS = {
    "embed_tokens": "embedding",
    "embed_positions": "positions",
    "embed_types": "types",
    "attention_norm": "input_norm",
    "attention.qkv_proj": "qkv",
    "attention.out_proj": "proj",
    "ffn_norm": "mlp_norm",
    "ffn.up_proj": "fc1",
    "ffn.gate_up_proj": "fc1",
    "ffn.down_proj": "fc2",
    "final_norm": "final_norm",
    "lm_head": "output",
    "head_transform": "transform",
    "head_norm": "transform_norm",
    "pooler": "pooler",
    "pair_head": "binary_head",
}
_SAME = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "ffn_hidden_size": "feed_forward_size",
    "layernorm_epsilon": "norm_epsilon",
    "norm_epsilon": "norm_epsilon",
    "rotary_base": "rope_theta",
}
"""Arguments of theirs -> keys of ours with the same value."""
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "apply_layernorm_1p": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "squared_relu": (False, None),
    "quick_geglu": (False, None),
    "rotary_percent": (1.0, 1, None),
    "rotary_interleaved": (False, None),
    "num_experts": (None, 0, 1),
    "qk_layernorm": (False, None),
    "multi_latent_attention": (False, None),
}
"""Arguments of theirs -> the values that no form of ours lacks."""
_REFUSED_OF_BERT: Mapping[str, tuple[Any, ...]] = {"openai_gelu": (False, None)}
"""Arguments of theirs -> the values with which a BERT's head over the vocabulary has the exact GELU, as ours has."""
_BERT_KEYS = {"norm_position": "pre", "embedding_norm": False, "local_attention": None}
"""Values of keys of ours that no argument of theirs changes."""
_BERT_TENSORS = frozenset({"transform.weight", "binary_head.weight", "types.weight"})
"""Tensors, in the one spelling, of which a BERT has one at least and a GPT none."""
_CROSS_ATTENTION = re.compile(r".*\b(?:inter|cross)_attention\.")
PADDED = frozenset({"embedding.weight", "output.weight", "output.bias"})
"""Tensors with rows beyond the vocabulary's."""
IS_MEGATRON = re.compile(r".*attention\.(?:query_key_value|linear_qkv)\.weight")


def unified(parts: Parts) -> Parts:
    """Return tensors under the one spelling; what is no parameter of a GPT or BERT keeps its name."""
    # DeepSpeed's pipeline names a layer by its place among all modules: 2., 3., ... are the layers 0, 1, ...
    places = sorted({int(name.split(".")[0]) for name in parts if re.match(r"\d+\.", name) and IS_MEGATRON.match(name)})
    return {_unified(name, places): held for name, held in parts.items()}


def _unified(name: str, places: list[int]) -> str:
    layer, rest = None, name
    if match := re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(.*)", name):
        layer, rest = int(match[1]), match[2]
    elif (match := re.fullmatch(r"(\d+)\.(.*)", name)) and places:
        place, rest = int(match[1]), match[2]
        if place in places:
            layer = places.index(place)
        elif place > places[-1] and rest in ("weight", "bias"):
            return f"final_norm.{rest}"  # a bare norm behind the last layer
    for pattern, new in _WITHIN if layer is not None else _OUTSIDE:
        if found := re.fullmatch(pattern, rest if layer is not None else name):
            said = found.expand(new)
            return f"layers.{layer}.{said}" if layer is not None else said
    return name


def megatron_map(model: ModelConfig) -> ModelMap | None:
    """Return where the parameters of a GPT or BERT are by the one spelling; None for other families."""
    if model.family not in ("gpt", "bert"):
        return None
    parameters = {spec.name: _mapped(model, spec) for spec in family(model).specs(model)}
    tied = bool(family(model).ties(model))
    return ModelMap(parameters, {"output.weight": "embedding.weight"} if tied else {})


def blocks_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the blocks of fused tensors of which each tensor rank has a share: of the gated projection."""
    specs = family(model).specs(model)
    return {_name(spec.name): spec.blocks() for spec in specs if ".ffn.gate_up_proj." in spec.name}


def check_settings(found: Unnamed, model: ModelConfig) -> None:
    """Refuse a checkpoint whose arguments are those of another model, or of one that no form of ours computes.

    Raises:
        ConfigError: names every argument.
    """
    settings, kind = found.settings, _family_of(found.weights)
    wrong = _other_family(model, kind)
    wrong += [
        f"{theirs} = {settings[theirs]} (model.{ours} = {getattr(model, ours)})"
        for theirs, ours in _SAME.items()
        if settings.get(theirs) is not None and getattr(model, ours, None) is not None
        if settings[theirs] != getattr(model, ours)
        if not (theirs == "rotary_base" and model.position_table)
    ]
    refused = {**_REFUSED, **(_REFUSED_OF_BERT if kind == "bert" else {})}
    wrong += [f"{key} = {settings[key]!r}" for key, fine in refused.items() if settings.get(key) not in fine]
    activation, said = _activation(settings)
    if activation not in (None, model.activation):
        wrong.append(f"{said}, which is {activation} here (model.activation = {model.activation})")
    if wrong:
        raise ConfigError(
            f"{found.origin} is not of the model of the run file: {'; '.join(wrong)}",
            "a GPT with learned or rotary positions or a BERT, whose sizes and options are those of `model`",
            "name the run file of the model that it is of",
        )


def _family_of(weights: Parts) -> FamilyName | None:
    """Return the family of the model that tensors under Megatron's names are of; None for other names."""
    if not any(map(IS_MEGATRON.match, weights)):
        return None
    if any(map(_CROSS_ATTENTION.match, weights)):
        return "t5"
    return "bert" if _BERT_TENSORS & unified(weights).keys() else "gpt"


def _other_family(model: ModelConfig, theirs: FamilyName | None) -> list[str]:
    """Return what tells a model of Megatron's of one family from a model of ours."""
    if theirs is not None and (theirs == "t5" or model.family != theirs):
        return [f"it holds a {theirs.upper()} (model.family = {model.family})"]
    if theirs != "bert":
        return []
    return [
        f"a BERT of Megatron's has {key} = {value} (model.{key} = {getattr(model, key)})"
        for key, value in _BERT_KEYS.items()
        if getattr(model, key) != value
    ]


def _activation(settings: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return our name of the activation that arguments of theirs ask for, and the argument; None where none says it.

    Their fused kernel of bias and GELU, the default, computes the tanh form (megatron/core/fusions/fused_bias_gelu.py),
    and without it the layers have the exact one.
    """
    for key, activation in (("swiglu", "swiglu"), ("openai_gelu", "gelu_tanh"), ("onnx_safe", "gelu")):
        if settings.get(key):
            return activation, f"{key} = {settings[key]!r}"
    fused = settings.get("bias_gelu_fusion")
    if fused is None:
        return None, ""
    return "gelu_tanh" if fused else "gelu", f"bias_gelu_fusion = {fused!r}"


def _name(parameter: str) -> str:
    """Return the one spelling of a parameter of ours."""
    module, _, kind = parameter.rpartition(".")
    match = re.fullmatch(r"layers\.(\d+)\.(.*)", module)
    before, own = (f"layers.{match[1]}.", match[2]) if match else ("", module)
    # theirs have no place for the head of a task, whose name is then missing in the files
    return f"{before}{_OURS.get(own, own)}.{kind}"


def _mapped(model: ModelConfig, spec: ParameterSpec) -> ParameterMap:
    name, shape = _name(spec.name), spec.stored_shape
    tensors: dict[str, Shape] = {name: shape}
    if ".qkv_proj." not in spec.name:
        return ParameterMap(spec.name, shape, tensors, (Run(name, 0, 0, shape[0]),))
    head, groups = model.head_size, model.num_kv_heads
    queries = model.num_heads // groups * head
    width, runs = queries + 2 * head, []
    for group in range(groups):
        # ours: all queries, all keys, all values; theirs: queries, key and value of group 0, those of group 1, ...
        runs.append(Run(name, group * queries, group * width, queries))
        runs.append(Run(name, groups * queries + group * head, group * width + queries, head))
        runs.append(Run(name, groups * (queries + head) + group * head, group * width + queries + head, head))
    return ParameterMap(spec.name, shape, tensors, tuple(sorted(runs, key=lambda run: run.ours)))
