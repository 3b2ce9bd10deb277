"""Figures that the families of models share: parameters, operations and saved activations of their common parts.

The torch-free twin of `engine.models.layers`: a family (`engine.plan.gpt`, ...) puts its figures together from these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from engine.config.adapter_targets import MARK, Part, adapted, bottlenecks
from engine.config.objectives import RowLengths
from engine.config.schema.adapter import AdaLoRAConfig, BottleneckConfig, LoRAConfig
from engine.config.schema.model import ModelConfig
from engine.config.virtual_tokens import prefix_length, prompt_length

Device = Literal["cpu", "cuda"]
"""Kind of device that a run computes on."""
HEAD_NORMS = ("q_norm", "k_norm")
"""Names of the norms of each head of queries and keys."""
PREFIX = f"{MARK}prefix_"
"""Part of the names of the keys and values that stand in front of a row's."""
LARGEST_HEAD = 256
"""Largest head of flash attention over documents, in multiples of 8."""


@dataclass(frozen=True)
class Entry:
    """One parameter: its whole shape (vocabulary padded), and its division over tensor ranks."""

    name: str
    shape: tuple[int, ...]
    split: bool
    """Divided over the tensor axis; else every tensor rank holds all of it."""
    padding: int = 0
    """Elements that are padding of the vocabulary."""
    count: int = 1
    """Parameters that it stands for: this one, and those of equal layers."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_linear(self) -> bool:
        """True if it is the matrix of a linear layer that tensor ranks share: what Muon updates (the twin of
        `engine.optim.groups.by_muon`)."""
        return self.split and len(self.shape) == 2 and self.name.startswith("layers.") and MARK not in self.name

    @property
    def multiplies(self) -> bool:
        """True if it is a matrix of a layer that multiplies every token: keys and values of a prefix do not."""
        return len(self.shape) == 2 and PREFIX not in self.name

    def local_numel(self, tensor_size: int) -> int:
        """Elements on one of `tensor_size` ranks."""
        return self.numel // tensor_size if self.split else self.numel


@dataclass(frozen=True, eq=False)
class Entries:
    """Several parameters, hashed by identity.

    So sums over them are cached without hashing every entry: a ranking asks for the same few sums thousands of times.
    """

    held: tuple[Entry, ...]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.held)

    def local_numel(self, tensor_size: int, multiple: int = 1) -> int:
        """Return the elements of all on one of `tensor_size` ranks, each parameter filled up to a multiple."""
        return _local_numel(self, tensor_size, multiple)

    @cached_property
    def linear(self) -> Entries:
        """The parameters among them that Muon updates."""
        return Entries(tuple(entry for entry in self.held if entry.is_linear))

    def without(self, names: frozenset[str]) -> Entries:
        """Return them without those of these names."""
        return _without(self, names) if names else self


@lru_cache(maxsize=4096)
def _without(entries: Entries, names: frozenset[str]) -> Entries:
    return Entries(tuple(entry for entry in entries if entry.name not in names))


@lru_cache(maxsize=4096)
def _local_numel(entries: Entries, tensor_size: int, multiple: int) -> int:
    # Ceiling to a multiple without floats: -(-5 // 4) * 4 = 8.
    return sum(-(-entry.local_numel(tensor_size) // multiple) * multiple * entry.count for entry in entries)


def vocabulary(model: ModelConfig, name: str, width: int | None = None) -> Entry:
    """Return a parameter with a row for each token: a matrix of `hidden_size` columns, or of `width` (0: a vector)."""
    columns = model.hidden_size if width is None else width
    shape = (model.padded_vocab_size, columns) if columns else (model.padded_vocab_size,)
    padding = (model.padded_vocab_size - model.vocab_size) * (columns or 1)
    return Entry(name, shape, split=True, padding=padding)


def norm(model: ModelConfig, name: str, width: int | None = None) -> list[Entry]:
    """Return the parameters of a norm over the hidden states, or over `width` features."""
    shape = (width or model.hidden_size,)
    entries = [Entry(f"{name}.weight", shape, split=False)]
    if model.norm == "layernorm" and model.norm_bias:
        entries.append(Entry(f"{name}.bias", shape, split=False))
    return entries


def linear(
    name: str, rows: int, columns: int, *, bias: bool, split: bool = True, bias_split: bool = False
) -> list[Entry]:
    """Return the parameters of a linear layer, its matrix (out, in) and its bias (out,) if it has one."""
    entries = [Entry(f"{name}.weight", (rows, columns), split)]
    if bias:
        entries.append(Entry(f"{name}.bias", (rows,), bias_split))
    return entries


def self_attention(model: ModelConfig, name: str) -> list[Entry]:
    """Return the parameters of the fused projection to queries, keys and values, of the norms of their heads, and of
    the output projection."""
    width, heads = model.hidden_size, model.num_heads * model.head_size
    found = linear(f"{name}.qkv_proj", qkv_width(model), width, bias=model.biased_qkv, bias_split=True)
    for each in HEAD_NORMS if model.normed_heads else ():
        found += norm(model, f"{name}.{each}", model.head_size)
    return found + linear(f"{name}.out_proj", width, heads, bias=model.bias) + adapters(model, name, "attention")


def of_each_head(name: str) -> bool:
    """Return True for a parameter that every head uses: a tensor rank has its own heads' part of the gradient."""
    return name.split(".")[-2] in HEAD_NORMS


def feed_forward(model: ModelConfig, name: str) -> list[Entry]:
    """Return the parameters of the feed-forward part, gated or not."""
    up = "gate_up_proj" if model.gated else "up_proj"
    inner = model.feed_forward_size * (2 if model.gated else 1)
    return [
        *linear(f"{name}.{up}", inner, model.hidden_size, bias=model.bias, bias_split=True),
        *linear(f"{name}.down_proj", model.hidden_size, model.feed_forward_size, bias=model.bias),
        *adapters(model, name, "ffn"),
    ]


def bottleneck_adapters(model: ModelConfig, name: str, parts: tuple[Part, ...]) -> list[Entry]:
    """Return the parameters of the bottleneck adapters behind these parts of a layer."""
    found, width = [], model.hidden_size
    for part in bottlenecks(model) if isinstance(model.adapter, BottleneckConfig) else ():
        if part in parts and isinstance(model.adapter, BottleneckConfig):
            found += linear(f"{name}.adapters.{part}.down", model.adapter.size, width, bias=True, split=False)
            found += linear(f"{name}.adapters.{part}.up", width, model.adapter.size, bias=True, split=False)
    return found


def prompt(model: ModelConfig) -> list[Entry]:
    """Return the embeddings in front of those of a row's tokens."""
    length = prompt_length(model)
    return [Entry("embed_prompt.adapters.weight", (length, model.hidden_size), split=False)] if length else []


def held_tokens(model: ModelConfig, lengths: RowLengths) -> int:
    """Return the hidden states of a row: those of its tokens and of a prompt."""
    return lengths.tokens + prompt_length(model)


def seen_tokens(model: ModelConfig, lengths: RowLengths) -> int:
    """Return the keys of a row: those of its hidden states and of a prefix."""
    return held_tokens(model, lengths) + prefix_length(model)


def adapters(model: ModelConfig, name: str, part: Part) -> list[Entry]:
    """Return the parameters of the adapters of a part of a layer, the twin of `engine.models.adapters`."""
    if part == "attention" and (length := prefix_length(model)):
        shape = (length, model.num_kv_heads * model.head_size)
        return [Entry(f"{name}{PREFIX}{kind}", shape, split=True) for kind in ("key", "value")]
    found = []
    for target in adapted(model, part):
        prefix, is_row = f"{name}.adapters.{target.name}", target.is_row
        if isinstance(model.adapter, LoRAConfig):
            rank = model.adapter.rank
            found += linear(f"{prefix}.lora_A", rank, target.columns, bias=False, split=is_row)
            found += linear(f"{prefix}.lora_B", target.rows, rank, bias=False, split=not is_row)
        elif isinstance(model.adapter, AdaLoRAConfig):
            rank = model.adapter.initial_rank
            found.append(Entry(f"{prefix}.lora_E", (rank, 1), split=False))
            found += linear(f"{prefix}.lora_A", rank, target.columns, bias=False, split=is_row)
            found += linear(f"{prefix}.lora_B", target.rows, rank, bias=False, split=not is_row)
        else:
            found.append(Entry(f"{prefix}.ia3_l", (target.columns if is_row else target.rows,), split=True))
    return found


def qkv_width(model: ModelConfig) -> int:
    """Width of the fused projection's output: query heads, key heads and value heads."""
    return (model.num_heads + 2 * model.num_kv_heads) * model.head_size


def matrix_elements(entries: list[Entry]) -> int:
    """Elements of the matrices among some parameters: each multiplies every token that passes."""
    return sum(entry.numel for entry in entries if entry.multiplies)


def score_operations(model: ModelConfig, num_queries: int, num_keys: int) -> int:
    """Forward operations of scores and weighted values (no causal discount)."""
    return 4 * num_queries * num_keys * model.num_heads * model.head_size


def saved_by_attention(model: ModelConfig, num_tokens: int, tensor_size: int) -> int:
    """Elements that the backward pass of self-attention needs: queries, keys, values and output.

    Keys and values are also those of a prefix. With norms of heads also their fp32 inputs. With dropout also the
    probabilities, before and after it, and a byte each that says which stayed.
    """
    prefix = prefix_length(model)
    probabilities = saved_probabilities(model, num_tokens, num_tokens + prefix, tensor_size)
    put_in_front = 2 * prefix * model.num_kv_heads * model.head_size
    # fp32 inputs are 1 element in fp32 and 2 in bf16: 3/2 for both
    normed = 3 * num_tokens * (model.num_heads + model.num_kv_heads) * model.head_size // 2 if model.normed_heads else 0
    return (exchanged(model, num_tokens) + put_in_front + normed) // tensor_size + probabilities


def saved_probabilities(model: ModelConfig, num_queries: int, num_keys: int, tensor_size: int) -> int:
    """Elements of the attention probabilities, before and after dropout, and of its mask; 0 without dropout."""
    # Two copies of an element and one byte of mask, as elements of 4 bytes: 2 + 1/4 = 9/4. In bf16 the mask is 1/2 of
    # an element, which is left out.
    return 9 * model.num_heads * num_queries * num_keys // 4 // tensor_size if model.attention_dropout else 0


def needs_masks(model: ModelConfig, dtype: str, device: Device) -> bool:
    """Return True if attention inside documents takes a mask of every pair of tokens: everywhere but on a GPU
    whose kernels do without, in bf16 and without dropout. The twin of `engine.parallel.packed.kernel` for the GPUs
    of `engine.plan.hardware` (compute capability 8.0 or higher)."""
    head = model.head_size
    # Flash attention takes heads in multiples of 8; flex attention takes powers of two from 16 on (`n & (n-1) == 0`).
    flash, flex = head % 8 == 0 and head <= LARGEST_HEAD, head >= 16 and head & (head - 1) == 0
    return device == "cpu" or dtype != "bf16" or model.attention_dropout > 0 or not (flash or flex)


def saved_by_feed_forward(model: ModelConfig, num_tokens: int, tensor_size: int) -> int:
    """Elements that the feed-forward part saves: before and after its activation (gated: the activated gate, too)."""
    return num_tokens * model.feed_forward_size * (4 if model.gated else 2) // tensor_size


def exchanged(model: ModelConfig, num_tokens: int) -> int:
    """Elements of self-attention's queries, keys, values and results."""
    return num_tokens * 2 * (model.num_heads + model.num_kv_heads) * model.head_size


def kept_products(model: ModelConfig, num_tokens: int, tensor_size: int) -> int:
    """Elements of what self-attention and a feed-forward part keep under selective recomputation and tensor
    parallelism splits: queries, keys, values, the attention output, and what enters the activation."""
    inner = model.feed_forward_size * (2 if model.gated else 1)
    return num_tokens * (qkv_width(model) + model.num_heads * model.head_size + inner) // tensor_size
