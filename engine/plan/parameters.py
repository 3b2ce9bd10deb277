"""Parameters of a model as names and shapes, by stage and by tensor rank, without building it.

`engine.models` builds the modules; this is the same list as numbers, so that a login node can count them. The two
are held together by a test. Names are logical names; a tied head has none of its own but is held twice when the
first and last stage are different.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.config.schema import ModelConfig


@dataclass(frozen=True)
class Entry:
    """One parameter: its whole shape (vocabulary padded) and whether tensor ranks share it."""

    name: str
    shape: tuple[int, ...]
    split: bool
    """Divided over the tensor axis; else every tensor rank holds all of it."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def local_numel(self, tensor_size: int) -> int:
        """Elements on one of `tensor_size` ranks."""
        return self.numel // tensor_size if self.split else self.numel


def layer_matrix_elements(model: ModelConfig) -> int:
    """Elements of the weight matrices of one layer (no biases, no norms)."""
    width = model.hidden_size
    attention = width * _qkv_width(model) + width * model.num_heads * model.head_size
    return attention + width * (_up_width(model) + model.inner_size)


def layer_entries(model: ModelConfig, layer: int) -> list[Entry]:
    """Parameters of the layer with the given global number."""
    width, prefix = model.hidden_size, f"layers.{layer}"
    up = "gate_up_proj" if model.activation == "swiglu" else "up_proj"
    return [
        *_norm(model, f"{prefix}.attention_norm"),
        *_linear(model, f"{prefix}.attention.qkv_proj", _qkv_width(model), width, bias_split=True),
        *_linear(model, f"{prefix}.attention.out_proj", width, model.num_heads * model.head_size, bias_split=False),
        *_norm(model, f"{prefix}.ffn_norm"),
        *_linear(model, f"{prefix}.ffn.{up}", _up_width(model), width, bias_split=True),
        *_linear(model, f"{prefix}.ffn.down_proj", width, model.inner_size, bias_split=False),
    ]


def embedding_entries(model: ModelConfig) -> list[Entry]:
    """Parameters that the first stage holds beside its layers."""
    entries = [Entry("embed_tokens.weight", (model.padded_vocab_size, model.hidden_size), split=True)]
    if model.position == "learned":
        entries.append(Entry("embed_positions.weight", (model.max_positions, model.hidden_size), split=False))
    return entries


def head_entries(model: ModelConfig) -> list[Entry]:
    """Parameters that the last stage holds beside its layers, the tied head under the embedding's name."""
    name = "embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
    return [
        *_norm(model, "final_norm"),
        Entry(name, (model.padded_vocab_size, model.hidden_size), split=True),
    ]


def model_entries(model: ModelConfig) -> list[Entry]:
    """Every parameter of the whole model, each name once."""
    return stage_entries(model, range(model.num_layers), is_first=True, is_last=True)


def stage_entries(model: ModelConfig, layers: range, is_first: bool, is_last: bool) -> list[Entry]:
    """Parameters of one pipeline stage, each name once."""
    entries = embedding_entries(model) if is_first else []
    for layer in layers:
        entries += layer_entries(model, layer)
    if is_last:
        entries += head_entries(model)
    return list({entry.name: entry for entry in entries}.values())


def num_parameters(model: ModelConfig, padded: bool = False) -> int:
    """Parameters of the whole model; the tied matrix counts once, padding rows only if `padded`."""
    total = sum(entry.numel for entry in model_entries(model))
    matrices = 1 if model.tie_embeddings else 2
    padding = (model.padded_vocab_size - model.vocab_size) * model.hidden_size * matrices
    return total if padded else total - padding


def _qkv_width(model: ModelConfig) -> int:
    return (model.num_heads + 2 * model.kv_heads) * model.head_size


def _up_width(model: ModelConfig) -> int:
    return model.inner_size * (2 if model.activation == "swiglu" else 1)


def _linear(model: ModelConfig, name: str, rows: int, columns: int, bias_split: bool) -> list[Entry]:
    entries = [Entry(f"{name}.weight", (rows, columns), split=True)]
    if model.bias:
        entries.append(Entry(f"{name}.bias", (rows,), split=bias_split))
    return entries


def _norm(model: ModelConfig, name: str) -> list[Entry]:
    entries = [Entry(f"{name}.weight", (model.hidden_size,), split=False)]
    if model.norm == "layernorm":
        entries.append(Entry(f"{name}.bias", (model.hidden_size,), split=False))
    return entries
