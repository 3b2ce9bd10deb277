"""Modules of a layer other than attention: norms, feed-forward, and the layer that joins them.

Norms compute in fp32 and return the dtype of their input, so that bf16 runs do not lose the small differences
that a norm magnifies.

Legend: B batch, T time, D width, F feed-forward (F may be local).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema.model import ModelConfig
from engine.models.attention import SelfAttention, View
from engine.models.dropout import ATTENTION_OUTPUT, FFN_OUTPUT
from engine.parallel.functions import Functions
from engine.parallel.sharding import ROW, Table, column


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) with scale and, unless told otherwise, shift."""

    def __init__(self, width: int, epsilon: float, bias: bool = True) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D), dtype kept."""
        shape, bias = (x_BTD.size(-1),), None if self.bias is None else self.bias.float()
        return F.layer_norm(x_BTD.float(), shape, self.weight.float(), bias, self.epsilon).to(x_BTD.dtype)


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019, equation 4), scale only."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D), dtype kept."""
        return F.rms_norm(x_BTD.float(), (x_BTD.size(-1),), self.weight.float(), self.epsilon).to(x_BTD.dtype)


def norm(config: ModelConfig) -> nn.Module:
    """Make the kind of norm that the configuration asks for, over D."""
    if config.norm == "layernorm":
        return LayerNorm(config.hidden_size, config.norm_epsilon, config.norm_bias)
    return RMSNorm(config.hidden_size, config.norm_epsilon)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # Hendrycks and Gimpel 2016, section 2
    "gelu": F.gelu,
    "relu": F.relu,
    "swiglu": F.silu,  # of the gate (Shazeer 2020, equation 6)
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
}


InnerDrop = Callable[[torch.Tensor], torch.Tensor]
"""(B, T, F) -> (B, T, F) with some elements 0."""


class FeedForward(nn.Module):
    """D -> F, activation, F -> D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = nn.Linear(config.hidden_size, config.feed_forward_size, bias=config.bias)
        self.down_proj = nn.Linear(config.feed_forward_size, config.hidden_size, bias=config.bias)

    def forward(self, x_BTD: torch.Tensor, drop: InnerDrop | None = None) -> torch.Tensor:
        """(B, T, D) -> (B, T, D); `drop` sets some inner features to 0."""
        inner_BTF = self.activation(self.up_proj(x_BTD))
        return self.down_proj(inner_BTF if drop is None else drop(inner_BTF))


class GatedFeedForward(nn.Module):
    """D -> gate and up (F each, fused), activation(gate) x up, F -> D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.feed_forward_size, bias=config.bias)
        self.down_proj = nn.Linear(config.feed_forward_size, config.hidden_size, bias=config.bias)

    def forward(self, x_BTD: torch.Tensor, drop: InnerDrop | None = None) -> torch.Tensor:
        """(B, T, D) -> (B, T, D); `drop` sets some inner features to 0."""
        # One product for both. A tensor-parallel rank has the same features of gate and of up (two blocks).
        gate_BTF, up_BTF = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
        inner_BTF = self.activation(gate_BTF) * up_BTF
        return self.down_proj(inner_BTF if drop is None else drop(inner_BTF))


def feed_forward(config: ModelConfig) -> nn.Module:
    """Make the kind of feed-forward part that the configuration asks for."""
    return GatedFeedForward(config) if config.gated else FeedForward(config)


class TransformerLayer(nn.Module):
    """Attention, then feed-forward, each with a norm of its own: before it (pre-norm) or behind the sum (post-norm).

    `number` is the global one. With `normed` the input comes straight from a norm (the first layer of ModernBERT): a
    pre-norm layer then has none before its attention.
    """

    def __init__(self, config: ModelConfig, functions: Functions, number: int, normed: bool = False) -> None:
        super().__init__()
        self.number = number
        self.post = config.post_norm
        self.attention_norm = nn.Identity() if normed and not self.post else norm(config)
        self.attention = SelfAttention(config, functions, number)
        self.ffn_norm = norm(config)
        self.ffn = feed_forward(config)

    def forward(self, x_BTD: torch.Tensor, view: View) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.post:  # Vaswani et al. 2017; below, pre-norm (Xiong et al. 2020)
            made_BTD = self.attention(x_BTD, view)
            x_BTD = self.attention_norm(x_BTD + view.dropped(made_BTD, self.number, ATTENTION_OUTPUT))
            made_BTD = self.ffn(x_BTD, view.inner_drop(self.number))
            return self.ffn_norm(x_BTD + view.dropped(made_BTD, self.number, FFN_OUTPUT))
        made_BTD = self.attention(self.attention_norm(x_BTD), view)
        x_BTD = x_BTD + view.dropped(made_BTD, self.number, ATTENTION_OUTPUT)
        made_BTD = self.ffn(self.ffn_norm(x_BTD), view.inner_drop(self.number))
        return x_BTD + view.dropped(made_BTD, self.number, FFN_OUTPUT)


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
    }
