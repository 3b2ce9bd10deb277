"""Files of Megatron-LM's GPT and BERT, made from weights of ours by reshapes of whole tensors."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.interchange.initial import open_source
from engine.config.schema.model import ModelConfig
from tests.engine.models.tiny import BERT_FORMS, tiny

Tensors = dict[str, torch.Tensor]
ROWS = 544
"""Rows of a vocabulary of 512 or fewer, padded as `--make-vocab-size-divisible-by` does."""
LEGACY = {
    "norm1": "input_norm",
    "qkv": "self_attention.query_key_value",
    "proj": "self_attention.dense",
    "norm2": "post_attention_norm",
    "fc1": "mlp.dense_h_to_4h",
    "fc2": "mlp.dense_4h_to_h",
    "layers": "language_model.encoder.layers",
    "embed_tokens": "language_model.embedding.word_embeddings",
    "embed_positions": "language_model.embedding.position_embeddings",
    "embed_types": "language_model.embedding.tokentype_embeddings",
    "final_norm": "language_model.encoder.final_norm",
    "head_transform": "lm_head.dense",
    "head_norm": "lm_head.norm",
    "lm_head": "language_model.output_layer",
    "lm_head.bias": "lm_head.bias",
    "tied": "word_embeddings_for_head",
    "pooler": "language_model.pooler.dense",
    "pair_head": "binary_head",
}
CORE = {
    "norm1": "input_layernorm",
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "norm2": "pre_mlp_layernorm",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
    "layers": "decoder.layers",
    "embed_tokens": "embedding.word_embeddings",
    "embed_positions": "embedding.position_embeddings",
    "embed_types": "embedding.tokentype_embeddings",
    "final_norm": "decoder.final_layernorm",
    "head_transform": "lm_head.dense",
    "head_norm": "lm_head.layer_norm",
    "lm_head": "output_layer",
    "tied": "output_layer",
    "pooler": "pooler.dense",
    "pair_head": "binary_head",
}
# Core's BERT has its layers in `encoder`, its GPT in `decoder`
BERT_CORE = CORE | {"layers": "encoder.layers", "final_norm": "encoder.final_layernorm"}
BERT_OLD = LEGACY | {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "head_norm": "lm_head.layernorm"}
BERT_OLD |= {"layers": "language_model.transformer.layers", "final_norm": "language_model.transformer.final_layernorm"}
"""The names of Megatron-LM 2."""
FIRST = ("embed_tokens", "embed_positions", "embed_types")
LAST = ("final_norm", "head_transform", "head_norm", "lm_head", "pooler", "pair_head")
_GROUPS = ("word_embeddings", "position_embeddings", "tokentype_embeddings", "encoder", "transformer", "pooler")
_GROUPS += ("output_layer", "lm_head", "binary_head", "word_embeddings_for_head")


def layer_of(model: ModelConfig, weights: Tensors, layer: int) -> Tensors:
    """One layer's tensors, whole, by the keys of `LEGACY`."""
    found: Tensors = {}
    ours = {"norm1": "attention_norm", "proj": "attention.out_proj", "norm2": "ffn_norm", "fc2": "ffn.down_proj"}
    ours["fc1"] = "ffn.gate_up_proj" if model.gated else "ffn.up_proj"
    for kind in ("weight", "bias"):
        for key, name in ours.items():
            if f"layers.{layer}.{name}.{kind}" in weights:
                found[f"{key}.{kind}"] = weights[f"layers.{layer}.{name}.{kind}"]
        if (name := f"layers.{layer}.attention.qkv_proj.{kind}") in weights:
            head, groups = model.head_size, model.num_kv_heads
            q, k, v = weights[name].split([model.num_heads * head, groups * head, groups * head])
            rest = q.shape[1:]
            grouped = torch.cat([one.reshape(groups, -1, *rest) for one in (q, k, v)], 1)
            found[f"qkv.{kind}"] = grouped.reshape(-1, *rest)
    return found


def outside(weights: Tensors, names: dict[str, str], modules: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of modules outside of the layers, whole, under their names; those of the vocabulary padded."""
    for module in modules:
        for kind in ("weight", "bias"):
            if (ours := f"{module}.{kind}") in weights:
                name = names.get(ours, f"{names[module]}.{kind}")
                yield name, padded(weights[ours]) if module in ("embed_tokens", "lm_head") else weights[ours]


def share(model: ModelConfig, key: str, value: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What a tensor rank holds of a tensor: by the key of `LEGACY` in a layer, by its rows outside of them."""
    if key == "fc1.weight" and model.gated:
        return torch.cat([half.chunk(size)[rank] for half in value.chunk(2)])
    if key.startswith(("qkv", "fc1")) or len(value) == ROWS:
        return value.chunk(size)[rank].clone()
    return value.chunk(size, 1)[rank].clone() if key in ("proj.weight", "fc2.weight") else value


def padded(table: torch.Tensor) -> torch.Tensor:
    return torch.cat([table, torch.randn(ROWS - len(table), *table.shape[1:])])


def arguments(model: ModelConfig, **changes: Any) -> argparse.Namespace:
    found = {"num_layers": model.num_layers, "hidden_size": model.hidden_size, "norm_epsilon": model.norm_epsilon}
    found |= {"num_attention_heads": model.num_heads, "params_dtype": torch.bfloat16, "apply_layernorm_1p": False}
    return argparse.Namespace(**found | changes)


def save_legacy(
    folder: Path,
    model: ModelConfig,
    weights: Tensors,
    tensor: int,
    pipe: int,
    changes: dict[str, Any] | None = None,
    names: dict[str, str] = LEGACY,
) -> None:
    """Files as Megatron-LM's own saver lays them out, with some entries of their content changed."""
    for stage in range(pipe):
        whole = dict(stage_of(model, weights, names, stage, pipe))
        for rank in range(tensor):
            flat = {name: share(model, key, value, rank, tensor) for name, (key, value) in whole.items()}
            path = folder / "iter_0000007" / (f"mp_rank_{rank:02d}" if pipe == 1 else f"mp_rank_{rank:02d}_{stage:03d}")
            path.mkdir(parents=True)
            content = {"args": arguments(model), "checkpoint_version": 3.0, "iteration": 7}
            # since Core a module's own names, before that a tree of them
            held = nested(flat) if names["layers"].startswith("language_model") else flat
            torch.save(content | {"model": held} | (changes or {}), path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")


def stage_of(
    model: ModelConfig, weights: Tensors, names: dict[str, str], stage: int, pipe: int
) -> Iterator[tuple[str, tuple[str, torch.Tensor]]]:
    """The whole tensors of a pipeline stage: their name, and the key in `LEGACY` and value."""
    per_stage = model.num_layers // pipe
    if stage == 0:
        yield from ((name, ("", value)) for name, value in outside(weights, names, FIRST))
    for local in range(per_stage):
        for key, value in layer_of(model, weights, stage * per_stage + local).items():
            name, kind = key.split(".")
            yield f"{names['layers']}.{local}.{names[name]}.{kind}", (key, value)
    if stage == pipe - 1:
        yield from ((name, ("", value)) for name, value in outside(weights, names, LAST))
        if stage > 0 and model.tie_embeddings:
            yield f"{names['tied']}.weight", ("", padded(weights["embed_tokens.weight"]))


def nested(flat: Tensors) -> dict[str, Any]:
    """A tree with a branch for each of Megatron-LM's groups, and plain names in it."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        parts, branch = name.split("."), tree
        depth = 1 + next(number for number, part in enumerate(parts) if part in _GROUPS)
        for part in parts[:depth]:
            branch = branch.setdefault(part, {})
        branch[".".join(parts[depth:])] = value
    return tree


def check_read(folder: Path, model: ModelConfig, weights: Tensors) -> None:
    opened = open_source(str(folder), model=model).check()
    for name, value in weights.items():
        assert torch.equal(opened.read(name), value), name
        assert torch.equal(opened.read(name, 1, 3), value[1:3]), name


MODELS = {
    "gpt2": tiny("gpt2"),
    "llama": tiny("llama", num_layers=4),
    "llama-tied": tiny("llama", tie_embeddings=True),
    "bert": BERT_FORMS["megatron-bert"],
    "bert-without-pairs": BERT_FORMS["megatron-bert-without-pairs"].model_copy(update={"token_types": 0}),
    "bert-untied": BERT_FORMS["megatron-bert"].model_copy(update={"tie_embeddings": False, "num_kv_heads": 2}),
}
