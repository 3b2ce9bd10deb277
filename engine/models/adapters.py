"""Adapters inside of layers: few trained parameters beside the frozen matrices of a pretrained model.

peft cannot put its own modules here: it replaces an `nn.Linear` by one that keeps it as `base_layer`, which renames
the parameters of the pretrained model, knows nothing of tensor-parallel layers, and would see one matrix where ours is
fused of several. So the modules are ours, with the names that peft's parameters have (`lora_A`, `ia3_l`), and an
adapter is saved in peft's format (`engine.checkpoint.interchange.peft_format`).

They know no process group: A and B of LoRA are plain `nn.Linear`, which `engine.parallel.tensor.shard` replaces as any
other. Beside a column-parallel layer A is whole and B column-parallel; beside a row-parallel one A is row-parallel,
which sums the narrow product over the ranks, and B whole. Sequence parallelism follows from the same layers.

Legend: B batch, T time, I and O features in and out (one of them local under tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.adapter_targets import Part, Target, adapted, all_targets, bottlenecks
from engine.config.schema.adapter import AdaLoRAConfig, BottleneckConfig, LoRAConfig
from engine.config.schema.model import ModelConfig
from engine.config.virtual_tokens import prefix_length
from engine.models.dropout import Dropout
from engine.parallel.sharding import HEADS, ROW, Table, column


class LoRA(nn.Module):
    """Low-rank change of a matrix: (B, T, I) -> what is added to (B, T, O)."""

    def __init__(self, target: Target, config: LoRAConfig) -> None:
        super().__init__()
        self.lora_A = nn.Linear(target.columns, config.rank, bias=False)
        self.lora_B = nn.Linear(config.rank, target.rows, bias=False)
        self.scale = config.alpha / config.rank

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        return self.lora_B(self.lora_A(x_BTI)) * self.scale


class AdaLoRA(nn.Module):
    """Low-rank change of a matrix in the form of a singular value decomposition (Zhang et al. 2023, equation 3):
    (B, T, I) -> what is added to (B, T, O)."""

    def __init__(self, target: Target, config: AdaLoRAConfig) -> None:
        super().__init__()
        # R = initial_rank elements; an unimportant one is zero, and its row of A and column of B stay.
        self.lora_E = nn.Parameter(torch.zeros(config.initial_rank, 1))
        self.lora_A = nn.Linear(target.columns, config.initial_rank, bias=False)
        self.lora_B = nn.Linear(config.initial_rank, target.rows, bias=False)
        self.scale = adalora_scale(config)

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        narrow_BTR = self.lora_A(x_BTI) * self.lora_E.squeeze(1)
        return self.lora_B(narrow_BTR) * self.scale


def adalora_scale(config: AdaLoRAConfig) -> float:
    """Return the factor of the product B E A, with peft's small number in the divisor."""
    return config.alpha / (config.initial_rank + 1e-5)


class Scaling(nn.Module):
    """Factors of the features of (B, T, features), local where tensor ranks split them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(num_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.ia3_l


class Bottleneck(nn.Module):
    """Network with few features inside and a residual connection: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD + self.up(F.gelu(self.down(x_BTD)))


class Bottlenecks(nn.ModuleDict):
    """Bottleneck adapters of a layer, by the part that they stand behind (Houlsby et al. 2019, figure 2)."""

    def behind(self, part: Part, made_BTD: torch.Tensor) -> torch.Tensor:
        """Return what a part of the layer has made, with dropout, after its adapter."""
        return self[part](made_BTD) if part in self else made_BTD


class Adapters(nn.ModuleDict):
    """Adapters of the linear layers of one part of a layer, by the name of their target."""

    def __init__(self, config: ModelConfig, part: Part, layer: int) -> None:
        targets = adapted(config, part)
        super().__init__({target.name: _module(target, config) for target in targets})
        self.layer, self.targets = layer, targets
        self.rows = {linear: _rows(config, part, linear) for linear in {target.linear for target in targets}}

    def project(self, name: str, linear: nn.Module, x_BTI: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
        """Return what the linear layer of a name makes of (B, T, I), with its adapters: (B, T, O)."""
        targets = [target for target in self.targets if target.linear == name]
        given_BTI = x_BTI
        for target in targets:
            if target.is_row and isinstance(scaling := self[target.name], Scaling):
                x_BTI = scaling(x_BTI)
        made_BTO = linear(x_BTI)
        blocks = []
        done, split = 0, self.rows[name] // made_BTO.size(-1) if targets and not targets[0].is_row else 1
        for target in targets:
            adapter = self[target.name]
            if isinstance(adapter, Scaling) and target.is_row:
                continue
            # a block of rows is split by itself: the n-th part of it is the n-th part of what stands before it, too
            first, rows = target.first // split, target.rows // split
            blocks += [made_BTO[..., done:first]] if first > done else []
            block_BTO = made_BTO[..., first : first + rows]
            if isinstance(adapter, Scaling):
                blocks.append(adapter(block_BTO))
            else:
                read_BTI = given_BTI if dropout is None else dropout.adapter_input(given_BTI, self.layer, target)
                blocks.append(block_BTO + adapter(read_BTI))
            done = first + rows
        if not blocks:
            return made_BTO
        blocks += [made_BTO[..., done:]] if done < made_BTO.size(-1) else []
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)


def adapters(config: ModelConfig, part: Part, layer: int) -> Adapters | None:
    """Make the adapters of a part of a layer; None where it has none."""
    return Adapters(config, part, layer) if adapted(config, part) else None


def bottleneck_adapters(config: ModelConfig, parts: Sequence[Part]) -> Bottlenecks | None:
    """Make the bottleneck adapters of a layer with these parts; None where it has none."""
    if not isinstance(config.adapter, BottleneckConfig):
        return None
    made = {part: Bottleneck(config.hidden_size, config.adapter.size) for part in bottlenecks(config) if part in parts}
    return Bottlenecks(made) if made else None


def project(
    held: nn.Module | None, name: str, linear: nn.Module, x_BTI: torch.Tensor, dropout: Dropout | None
) -> torch.Tensor:
    """Return what the linear layer of a name makes of (B, T, I), with its adapters where there are any."""
    if not isinstance(held, Adapters) or name not in held.rows:
        return cast(torch.Tensor, linear(x_BTI))
    return held.project(name, linear, x_BTI, dropout)


def adapter_sharding(config: ModelConfig) -> Table:
    """Return the sharding of the adapters' parameters over the tensor axis."""
    found: Table = {"layers.*.attention.adapters.prefix_*": HEADS} if prefix_length(config) else {}
    for target in (one for part in ("attention", "cross_attention", "ffn") for one in adapted(config, part)):
        name = f"layers.*.{target.part}.adapters.{target.name}"
        if isinstance(config.adapter, LoRAConfig | AdaLoRAConfig):
            found |= (
                {f"{name}.lora_A.weight": ROW} if target.is_row else {f"{name}.lora_B.weight": column(*target.blocks)}
            )
        else:
            found[f"{name}.ia3_l"] = column() if target.is_row else column(*target.blocks)
    return found


def _module(target: Target, config: ModelConfig) -> nn.Module:
    if isinstance(config.adapter, LoRAConfig):
        return LoRA(target, config.adapter)
    if isinstance(config.adapter, AdaLoRAConfig):
        return AdaLoRA(target, config.adapter)
    return Scaling(target.columns if target.is_row else target.rows)


def _rows(config: ModelConfig, part: Part, linear: str) -> int:
    """Return the number of output features of a linear layer over all tensor ranks."""
    return sum(one.rows for one in all_targets(config) if (one.part, one.linear) == (part, linear))
