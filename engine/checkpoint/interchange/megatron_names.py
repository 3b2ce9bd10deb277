"""Names of Megatron's GPT, in all its spellings: Megatron-LM before and since Core, Transformer Engine's, DeepSpeed's.

One spelling is Core's without its stacks (`unified`); the map of a model (`megatron_map`) has that one. Queries, keys
and values are one matrix, group by group of query heads: the group's queries, its key, its value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.checkpoint.interchange.mapping import ModelMap, ParameterMap, Run
from engine.checkpoint.interchange.sources.unnamed import Parts, Unnamed
from engine.config.schema.model import ModelConfig
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
    (r"(?:.*\.)?word_embeddings_for_head\.weight", "output.weight"),
    (r"(?:.*\.)?(?:output_layer|final_linear|lm_head)\.weight", "output.weight"),
    (r"(?:.*\.)?word_embeddings\.weight", "embedding.weight"),
    (r"(?:.*\.)?position_embeddings\.weight", "positions.weight"),
    (r"(?:.*\.)?(?:final_layernorm|final_norm|norm)\.(weight|bias)", r"final_norm.\1"),
)
_OURS = {
    "embed_tokens": "embedding",
    "embed_positions": "positions",
    "attention_norm": "input_norm",
    "attention.qkv_proj": "qkv",
    "attention.out_proj": "proj",
    "ffn_norm": "mlp_norm",
    "ffn.up_proj": "fc1",
    "ffn.gate_up_proj": "fc1",
    "ffn.down_proj": "fc2",
    "final_norm": "final_norm",
    "lm_head": "output",
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
    "rotary_percent": (1.0, 1, None),
    "rotary_interleaved": (False, None),
    "num_experts": (None, 0, 1),
    "qk_layernorm": (False, None),
    "multi_latent_attention": (False, None),
}
"""Arguments of theirs -> the values that no form of ours lacks."""
PADDED = frozenset({"embedding.weight", "output.weight"})
"""Tensors with rows beyond the vocabulary's."""
IS_MEGATRON = re.compile(r".*attention\.(?:query_key_value|linear_qkv)\.weight")


def unified(parts: Parts) -> Parts:
    """Return tensors under the one spelling; what is no parameter of a GPT keeps its name."""
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
    """Return where the parameters of a GPT are by the one spelling; None for other families."""
    if model.family != "gpt":
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
    settings = found.settings
    wrong = [
        f"{theirs} = {settings[theirs]} (model.{ours} = {getattr(model, ours)})"
        for theirs, ours in _SAME.items()
        if settings.get(theirs) is not None and getattr(model, ours, None) is not None
        if settings[theirs] != getattr(model, ours)
        if not (theirs == "rotary_base" and model.position_table)
    ]
    wrong += [f"{key} = {settings[key]!r}" for key, fine in _REFUSED.items() if settings.get(key) not in fine]
    if any("tokentype_embeddings" in name or "binary_head" in name for name in found.weights):
        wrong.append("a BERT, which normalises before each block and not its embeddings")
    if wrong:
        raise ConfigError(
            f"{found.origin} is not of the model of the run file: {'; '.join(wrong)}",
            "a GPT with learned or rotary positions, whose sizes are those of `model`",
            "name the run file of the model that it is of",
        )


def _name(parameter: str) -> str:
    """Return the one spelling of a parameter of ours."""
    module, _, kind = parameter.rpartition(".")
    match = re.fullmatch(r"layers\.(\d+)\.(.*)", module)
    return f"layers.{match[1]}.{_OURS[match[2]]}.{kind}" if match else f"{_OURS[module]}.{kind}"


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
