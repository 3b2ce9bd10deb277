"""Files of Megatron-LM's GPT, made from weights of ours by reshapes of whole tensors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.interchange.initial import open_source
from engine.config.schema.model import ModelConfig
from tests.engine.models.tiny import tiny

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
}
CORE = {
    "norm1": "input_layernorm",
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "norm2": "pre_mlp_layernorm",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}


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


def share(model: ModelConfig, key: str, value: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What a tensor rank holds of a tensor."""
    if key == "fc1.weight" and model.gated:
        return torch.cat([half.chunk(size)[rank] for half in value.chunk(2)])
    if key.startswith(("qkv", "fc1", "vocab")):
        return value.chunk(size)[rank].clone()
    return value.chunk(size, 1)[rank].clone() if key in ("proj.weight", "fc2.weight") else value


def padded(table: torch.Tensor) -> torch.Tensor:
    return torch.cat([table, torch.randn(ROWS - len(table), table.shape[1])])


def arguments(model: ModelConfig, **changes: Any) -> argparse.Namespace:
    found = {"num_layers": model.num_layers, "hidden_size": model.hidden_size, "norm_epsilon": model.norm_epsilon}
    found |= {"num_attention_heads": model.num_heads, "params_dtype": torch.bfloat16, "apply_layernorm_1p": False}
    return argparse.Namespace(**found, **changes)


def save_legacy(
    folder: Path, model: ModelConfig, weights: Tensors, tensor: int, pipe: int, changes: dict[str, Any] | None = None
) -> None:
    """Files as Megatron-LM's own saver lays them out, with some entries of their content changed."""
    per_stage = model.num_layers // pipe
    for stage in range(pipe):
        for rank in range(tensor):
            encoder: Tensors = {}
            for local in range(per_stage):
                for key, value in layer_of(model, weights, stage * per_stage + local).items():
                    name, kind = key.split(".")
                    held = share(model, key, value, rank, tensor)
                    encoder[f"layers.{local}.{LEGACY[name]}.{kind}"] = held
            tree: dict[str, Any] = {"encoder": encoder}
            table = share(model, "vocab", padded(weights["embed_tokens.weight"]), rank, tensor)
            if stage == 0:
                tree["embedding"] = {"word_embeddings": {"weight": table}}
                if "embed_positions.weight" in weights:
                    tree["embedding"]["position_embeddings"] = {"weight": weights["embed_positions.weight"]}
            if stage == pipe - 1:
                encoder |= {
                    f"final_norm.{k}": weights[f"final_norm.{k}"]
                    for k in ("weight", "bias")
                    if f"final_norm.{k}" in weights
                }
                if "lm_head.weight" in weights:
                    head = share(model, "vocab", padded(weights["lm_head.weight"]), rank, tensor)
                    tree["output_layer"] = {"weight": head}
            path = folder / "iter_0000007" / (f"mp_rank_{rank:02d}" if pipe == 1 else f"mp_rank_{rank:02d}_{stage:03d}")
            path.mkdir(parents=True)
            content = {"args": arguments(model), "checkpoint_version": 3.0, "iteration": 7}
            torch.save(content | {"model": {"language_model": tree}} | (changes or {}), path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")


def check_read(folder: Path, model: ModelConfig, weights: Tensors) -> None:
    opened = open_source(str(folder), model=model).check()
    for name, value in weights.items():
        assert torch.equal(opened.read(name), value), name
        assert torch.equal(opened.read(name, 1, 3), value[1:3]), name


MODELS = {"gpt2": tiny("gpt2"), "llama": tiny("llama", num_layers=4), "llama-tied": tiny("llama", tie_embeddings=True)}
