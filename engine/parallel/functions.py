"""The functions that a model receives instead of a process group: attention and the loss over the vocabulary.

A model calls them with what its own rank holds. The plain versions here are right wherever one rank holds all
heads and the whole vocabulary; tensor parallelism passes others. Nothing here communicates.

Legend: B batch, T time, D width, H heads, G key/value heads, K head size, V vocabulary (all of it, padding included).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from engine.parallel.cross_entropy import linear_cross_entropy

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float | None], torch.Tensor]
"""(q_BTHK, k_BTGK, v_BTGK, mask_B1TT or bias_BHTT or None, scale or None) -> out_BTHK; no mask means causal over the
whole row, no scale K ** -0.5."""

LinearCrossEntropy = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, int], torch.Tensor
]
"""(hidden, weight_VD, bias_V or None, targets, weights, vocab_size) -> fp32 scalar, the weighted sum of the tokens'
losses; see `engine.parallel.cross_entropy`."""


def attention(
    q_BTHK: torch.Tensor,
    k_BTGK: torch.Tensor,
    v_BTGK: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention, out_BTHK; query heads share the G key/value heads in consecutive groups of H / G.

    `mask` (B, 1 or H, T, T) is boolean, true where a query (first T) sees a key (second T), or of the queries' dtype
    and added to the scores. Keys may be of another length than queries.
    """
    out_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGK.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_BTHK.size(2) != k_BTGK.size(2),
    )
    return out_BHTK.transpose(1, 2)


def _same(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


@dataclass(frozen=True)
class Time:
    """Which tokens of a row a model is given and which hidden states it holds, where ranks share the rows' time.

    Of `size` equal stretches it is given the tokens, targets and weights of one, `position`; document numbers it is
    given whole. Of that stretch it holds one `shared_by`-th as hidden states between the blocks.
    """

    position: int = 0
    size: int = 1
    shared_by: int = 1

    def given(self, hidden_BTD: torch.Tensor) -> int:
        """Tokens that a model is given of a row, from the hidden states that it holds: those that attention gets."""
        return hidden_BTD.size(1) * self.shared_by

    def first(self, num_given: int) -> int:
        """Where the first of the given tokens stands in the row."""
        return self.position * num_given

    def own(self, whole_BT: torch.Tensor) -> torch.Tensor:
        """The given tokens' part of what holds a number for each token of the row; a view."""
        length = whole_BT.size(-1) // self.size
        return whole_BT.narrow(-1, self.position * length, length)


@dataclass(frozen=True)
class Functions:
    """What `engine.models` is built with."""

    attention: Attention = attention
    linear_cross_entropy: LinearCrossEntropy = linear_cross_entropy
    whole_rows: Callable[[torch.Tensor], torch.Tensor] = _same
    """Hidden states of all given tokens, (B, T, D), from those held between the blocks; for heads."""
    time: Time = Time()


PLAIN = Functions()
"""One rank holds every head and the whole vocabulary."""
