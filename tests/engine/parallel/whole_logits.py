"""The loss over the vocabulary from whole logits, in plain torch, and inputs for it.

Legend: B batch, T time, D width, V vocabulary (with its padding), N rows.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

BATCH, LENGTH, WIDTH, PADDED, REAL = 5, 40, 8, 24, 21

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""hidden_BTD, weight_VD, bias_V, targets_BT, weights_BT"""


def inputs(dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(BATCH, LENGTH, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(PADDED, WIDTH, generator=generator).to(dtype).requires_grad_()
    bias_V = torch.randn(PADDED, generator=generator).to(dtype).requires_grad_()
    targets_BT = torch.randint(0, REAL, (BATCH, LENGTH), generator=generator)
    weights_BT = torch.rand(BATCH, LENGTH, generator=generator)
    weights_BT[1] = 0.0
    return hidden_BTD, weight_VD, bias_V, targets_BT, weights_BT


def with_logits(hidden_BTD, weight_VD, bias_V, targets_BT, weights_BT, vocab_size) -> torch.Tensor:
    logits_BTV = F.linear(hidden_BTD, weight_VD, bias_V)[..., :vocab_size]
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    loss_N = F.cross_entropy(logits_BTV.flatten(0, 1).to(wide), targets_BT.flatten(), reduction="none")
    return (loss_N * weights_BT.flatten().to(wide)).sum()
