"""The parts of a decoder layer other than attention: norms, feed-forward, and the layer that joins them.

Norms compute in fp32 and return the dtype of their input, so that bf16 runs do not lose the small differences
that a norm magnifies. Layers are pre-norm: each part adds to the residual stream what it makes of its norm.

Legend: B batch, T time, D width, F feed-forward (F may be local).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema import ModelConfig
from engine.models.attention import SelfAttention, View
from engine.parallel.functions import Functions


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) with scale and shift."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D), dtype kept."""
        shape = (x_BTD.size(-1),)
        return F.layer_norm(x_BTD.float(), shape, self.weight.float(), self.bias.float(), self.epsilon).to(x_BTD.dtype)


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
    """The kind of norm that the configuration asks for, over D."""
    kind = LayerNorm if config.norm == "layernorm" else RMSNorm
    return kind(config.hidden_size, config.norm_epsilon)


class GeluFeedForward(nn.Module):
    """D -> F, GELU in its tanh form (Hendrycks and Gimpel 2016, section 2), F -> D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.inner_size, bias=config.bias)
        self.down_proj = nn.Linear(config.inner_size, config.hidden_size, bias=config.bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down_proj(F.gelu(self.up_proj(x_BTD), approximate="tanh"))


class SwigluFeedForward(nn.Module):
    """D -> gate and up (F each, fused), silu(gate) x up, F -> D (Shazeer 2020, equation 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.inner_size, bias=config.bias)
        self.down_proj = nn.Linear(config.inner_size, config.hidden_size, bias=config.bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        gate_BTF, up_BTF = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate_BTF) * up_BTF)


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each on the residual stream behind a norm of its own."""

    def __init__(self, config: ModelConfig, functions: Functions) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = SelfAttention(config, functions.attention)
        self.ffn_norm = norm(config)
        self.ffn = SwigluFeedForward(config) if config.activation == "swiglu" else GeluFeedForward(config)

    def forward(self, x_BTD: torch.Tensor, view: View) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), view)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))
