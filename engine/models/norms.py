"""Norms. They compute in fp32 and return the dtype of their input, so that bf16 runs do not lose the small differences
that a norm magnifies.

Legend: B batch, T time, D width (of the hidden states, or of one head).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema.model import ModelConfig


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


def norm(config: ModelConfig, width: int | None = None) -> nn.Module:
    """Make the kind of norm that the configuration asks for, over the hidden states or over `width` features."""
    if config.norm == "layernorm":
        return LayerNorm(width or config.hidden_size, config.norm_epsilon, config.norm_bias)
    return RMSNorm(width or config.hidden_size, config.norm_epsilon)
