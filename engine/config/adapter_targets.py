"""The matrices of a layer that an adapter may change, by the names that `adapter.targets` matches. Pure.

A matrix of ours may be several of Hugging Face's (queries, keys and values), which an adapter changes one by one, or
one (GPT-2's `c_attn`), which has one adapter as a whole: so the file of an adapter fits their modules.
"""

from __future__ import annotations

import fnmatch
import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from engine.config.huggingface_forms import nearest
from engine.config.schema.adapter import BottleneckConfig, TargetedAdapter
from engine.config.schema.model import ModelConfig

Part = Literal["attention", "cross_attention", "ffn"]
"""Parts of a layer that have matrices."""
PARTS: tuple[Part, ...] = ("attention", "cross_attention", "ffn")
NAMES = ("query", "key", "value", "output", "qkv", "gate", "up", "down", "gate_up")
"""Names of the matrices of a part, each at the number of its site of dropout."""
MARK = ".adapters."
"""Part of the name of every parameter of an adapter, and of no other."""


@dataclass(frozen=True)
class Target:
    """A matrix of a part of each layer, or a block of its rows."""

    name: str
    """Name within its part: `query`."""
    part: Part
    linear: str
    """Name of the linear layer whose rows, or some of them, it is."""
    first: int
    """Number of its first row among those of the linear layer."""
    blocks: tuple[int, ...]
    """Numbers of its rows (output features) in each block that tensor ranks split by itself."""
    columns: int
    """Number of its input features."""
    is_row: bool
    """Tensor ranks split it along its input features, otherwise along its output features."""

    @property
    def rows(self) -> int:
        return sum(self.blocks)

    @property
    def key(self) -> str:
        """Name with its part, as `attention.query`."""
        return f"{self.part}.{self.name}"

    def matches(self, pattern: str) -> bool:
        """Return True if a pattern matches the name, with its part or without."""
        return fnmatch.fnmatchcase(self.key, pattern) or fnmatch.fnmatchcase(self.name, pattern)

    @property
    def site(self) -> int:
        """Number of its site of dropout among those of a layer."""
        return PARTS.index(self.part) * len(NAMES) + NAMES.index(self.name)


@lru_cache(maxsize=256)
def all_targets(model: ModelConfig) -> tuple[Target, ...]:
    """Return the matrices of the layers of a model; those of `cross_attention` are in some layers only."""
    width, inner = model.hidden_size, model.feed_forward_size
    queries, keys = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    fused = nearest(model)[0].fused
    qkv = {"query": queries, "key": keys, "value": keys}
    found = _targets("attention", "qkv_proj", qkv, width, "qkv" if "qkv_proj" in fused else None)
    found += _targets("attention", "out_proj", {"output": width}, queries, is_row=True)
    if model.family == "t5":
        found += _targets("cross_attention", "q_proj", {"query": queries}, width)
        found += _targets("cross_attention", "kv_proj", {"key": keys, "value": keys}, width)
        found += _targets("cross_attention", "out_proj", {"output": width}, queries, is_row=True)
    if model.gated:
        whole = "gate_up" if "gate_up_proj" in fused else None
        found += _targets("ffn", "gate_up_proj", {"gate": inner, "up": inner}, width, whole)
    else:
        found += _targets("ffn", "up_proj", {"up": inner}, width)
    return (*found, *_targets("ffn", "down_proj", {"down": width}, inner, is_row=True))


def _targets(
    part: Part, linear: str, blocks: dict[str, int], columns: int, whole: str | None = None, is_row: bool = False
) -> list[Target]:
    """Return the targets of a linear layer: one for each block of rows, or one of the name `whole`."""
    if whole is not None:
        return [Target(whole, part, linear, 0, (*blocks.values(),), columns, is_row)]
    firsts = itertools.accumulate(blocks.values(), initial=0)
    return [
        Target(name, part, linear, first, (rows,), columns, is_row)
        for first, (name, rows) in zip(firsts, blocks.items(), strict=False)
    ]


@lru_cache(maxsize=256)
def bottlenecks(model: ModelConfig) -> tuple[Part, ...]:
    """Return the parts of a layer behind which the model has a bottleneck adapter; empty without such adapters."""
    if not isinstance(model.adapter, BottleneckConfig):
        return ()
    patterns = model.adapter.targets or model.adapter.default_targets
    return tuple(part for part in parts_of(model) if any(fnmatch.fnmatchcase(part, pattern) for pattern in patterns))


def parts_of(model: ModelConfig) -> tuple[Part, ...]:
    """Return the parts of the layers of a model; `cross_attention` is in some layers only."""
    return tuple(part for part in PARTS if part != "cross_attention" or model.family == "t5")


@lru_cache(maxsize=256)
def adapted(model: ModelConfig, part: Part) -> tuple[Target, ...]:
    """Return the matrices of a part of each layer that the model's adapter changes; empty where it changes none."""
    if not isinstance(model.adapter, TargetedAdapter) or isinstance(model.adapter, BottleneckConfig):
        return ()
    patterns = model.adapter.targets or model.adapter.default_targets
    return tuple(
        one for one in all_targets(model) if one.part == part and any(one.matches(pattern) for pattern in patterns)
    )
