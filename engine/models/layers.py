"""Modules of a layer other than attention: feed-forward, and the layer that joins the parts.

Legend: B batch, T time, D width, F feed-forward (F may be local).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.adapter_targets import Part
from engine.config.schema.model import ModelConfig
from engine.models.adapters import adapter_sharding, adapters, bottleneck_adapters, project
from engine.models.attention import SelfAttention, View
from engine.models.dropout import ATTENTION_OUTPUT, FFN_OUTPUT, Dropout
from engine.models.norms import norm
from engine.parallel.functions import Functions
from engine.parallel.sharding import ROW, Table, column

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # Hendrycks and Gimpel 2016, section 2
    "gelu": F.gelu,
    "relu": F.relu,
    "swiglu": F.silu,  # of the gate (Shazeer 2020, equation 6)
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
}


class FeedForward(nn.Module):
    """D -> F, activation, F -> D."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.activation = layer, ACTIVATIONS[config.activation]
        self.up_proj = nn.Linear(config.hidden_size, config.feed_forward_size, bias=config.bias)
        self.down_proj = nn.Linear(config.feed_forward_size, config.hidden_size, bias=config.bias)
        self.adapters = adapters(config, "ffn", layer)

    def forward(self, x_BTD: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        inner_BTF = self.activation(project(self.adapters, "up_proj", self.up_proj, x_BTD, dropout))
        inner_BTF = inner_BTF if dropout is None else dropout.inner(inner_BTF, self.layer)
        return project(self.adapters, "down_proj", self.down_proj, inner_BTF, dropout)


class GatedFeedForward(nn.Module):
    """D -> gate and up (F each, fused), activation(gate) x up, F -> D."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.activation = layer, ACTIVATIONS[config.activation]
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.feed_forward_size, bias=config.bias)
        self.down_proj = nn.Linear(config.feed_forward_size, config.hidden_size, bias=config.bias)
        self.adapters = adapters(config, "ffn", layer)

    def forward(self, x_BTD: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        # One product for both. A tensor-parallel rank has the same features of gate and of up (two blocks).
        both_BTF = project(self.adapters, "gate_up_proj", self.gate_up_proj, x_BTD, dropout)
        gate_BTF, up_BTF = both_BTF.chunk(2, dim=-1)
        inner_BTF = self.activation(gate_BTF) * up_BTF
        inner_BTF = inner_BTF if dropout is None else dropout.inner(inner_BTF, self.layer)
        return project(self.adapters, "down_proj", self.down_proj, inner_BTF, dropout)


def feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    """Make the kind of feed-forward part that the configuration asks for; `layer` is the global number."""
    return GatedFeedForward(config, layer) if config.gated else FeedForward(config, layer)


class TransformerLayer(nn.Module):
    """Attention, then feed-forward, each with a norm of its own: before it (pre-norm) or behind the sum (post-norm).

    With `parallel_residual` both parts read the layer's input (pre-norm), and their results are added to it together.
    `number` is the global one. With `normed` the input comes straight from a norm (the first layer of ModernBERT): a
    pre-norm layer then has none before its attention.
    """

    def __init__(self, config: ModelConfig, functions: Functions, number: int, normed: bool = False) -> None:
        super().__init__()
        self.number = number
        self.post, self.parallel = config.post_norm, config.parallel
        self.attention_norm = nn.Identity() if normed and not self.post else norm(config)
        self.attention = SelfAttention(config, functions, number)
        self.ffn_norm = norm(config)
        self.ffn = feed_forward(config, number)
        self.adapters = bottleneck_adapters(config, ("attention", "ffn"))

    def forward(self, x_BTD: torch.Tensor, view: View) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.post:  # Vaswani et al. 2017; below, pre-norm (Xiong et al. 2020)
            made_BTD = view.dropped(self.attention(x_BTD, view), self.number, ATTENTION_OUTPUT)
            x_BTD = self.attention_norm(x_BTD + self._adapted("attention", made_BTD))
            made_BTD = view.dropped(self.ffn(x_BTD, view.dropout), self.number, FFN_OUTPUT)
            return self.ffn_norm(x_BTD + self._adapted("ffn", made_BTD))
        made_BTD = view.dropped(self.attention(self.attention_norm(x_BTD), view), self.number, ATTENTION_OUTPUT)
        sum_BTD = x_BTD + self._adapted("attention", made_BTD)
        read_BTD = x_BTD if self.parallel else sum_BTD
        made_BTD = view.dropped(self.ffn(self.ffn_norm(read_BTD), view.dropout), self.number, FFN_OUTPUT)
        return sum_BTD + self._adapted("ffn", made_BTD)

    def _adapted(self, part: Part, made_BTD: torch.Tensor) -> torch.Tensor:
        return made_BTD if self.adapters is None else self.adapters.behind(part, made_BTD)


def layer_sharding(config: ModelConfig) -> Table:
    """Return the sharding of the layers' parameters over the tensor axis."""
    # Column then row, with nothing between them that mixes heads or features: one sum per pair (Shoeybi et al. 2019,
    # section 3). Fused projections are split block by block. Biases of row-parallel layers are replicated.
    query_width, kv_width = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    inner = (config.feed_forward_size,) * (2 if config.gated else 1)
    return {
        "layers.*.attention.qkv_proj.*": column(query_width, kv_width, kv_width),
        "layers.*.attention.out_proj.weight": ROW,
        f"layers.*.ffn.{'gate_up_proj' if config.gated else 'up_proj'}.*": column(*inner),
        "layers.*.ffn.down_proj.weight": ROW,
    } | adapter_sharding(config)
