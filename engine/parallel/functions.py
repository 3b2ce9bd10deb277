"""The functions that a model receives instead of a process group: attention and the loss over the vocabulary.

A model calls them with what its own rank holds. The plain versions here are right wherever one rank holds all
heads and the whole vocabulary; tensor parallelism passes others. Nothing here communicates.

Legend: B batch, T time, D width, H heads, G key/value heads, K head size, V vocabulary (all of it, padding included);
N blocks of R tokens, S = 3 R tokens that a block sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from engine.parallel.cross_entropy import linear_cross_entropy
from engine.parallel.packed import Documents, packed_attention

Drop = Callable[..., torch.Tensor]
"""(probabilities_BHTT, first_head=0) -> the same with some of them 0. A function of attention that works on some of the
heads that it was called with says which is its first."""


@dataclass(frozen=True)
class Band:
    """Who sees whom in a row where nobody sees further than R tokens: a row is cut into blocks of R, each of which sees
    the block before it, itself and the one behind it.

    `mask_BNRS` is true where a query sees a key (B may be 1). Rows are filled up to N blocks; what is filled in sees
    something, too, and is seen by no token of the row.
    """

    mask_BNRS: torch.Tensor


Mask = torch.Tensor | Band | Documents


class Attention(Protocol):
    """(q_BTHK, k_BTGK, v_BTGK, mask_B1TT, bias_BHTT, another `Mask` or None, scale or None, drop or None) -> out_BTHK.

    No mask means causal over the whole row, no scale K ** -0.5, no drop that no probability is dropped."""

    def __call__(
        self,
        q_BTHK: torch.Tensor,
        k_BTGK: torch.Tensor,
        v_BTGK: torch.Tensor,
        mask: Mask | None,
        /,
        scale: float | None = None,
        drop: Drop | None = None,
    ) -> torch.Tensor: ...


LinearCrossEntropy = Callable[..., torch.Tensor]
"""(hidden, weight_VD, bias_V or None, targets, weights, vocab_size, into=None) -> fp32 scalar, the weighted sum of the
tokens' losses; see `engine.parallel.cross_entropy`."""


def attention(
    q_BTHK: torch.Tensor,
    k_BTGK: torch.Tensor,
    v_BTGK: torch.Tensor,
    mask: Mask | None,
    scale: float | None = None,
    drop: Drop | None = None,
) -> torch.Tensor:
    """Softmax attention, out_BTHK; query heads share the G key/value heads in consecutive groups of H / G.

    `mask` (B, 1 or H, T, T) is boolean, true where a query (first T) sees a key (second T), or of the queries' dtype
    and added to the scores; or a `Band`, or `Documents` where the device has a kernel for them: both without `drop`.
    Keys may be of another length than queries. With `drop` probabilities exist one by one, else the fastest kernel is
    taken.
    """
    if isinstance(mask, Documents):
        assert drop is None, "what drops probabilities is given a mask"
        return packed_attention(q_BTHK, k_BTGK, v_BTGK, mask, scale)
    if isinstance(mask, Band):
        assert drop is None, "probabilities of a band have no places in a row's scores"
        return _banded_attention(q_BTHK, k_BTGK, v_BTGK, mask, scale)
    if drop is not None:
        return _explicit_attention(q_BTHK, k_BTGK, v_BTGK, mask, scale, drop)
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


def _banded_attention(
    q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, band: Band, scale: float | None
) -> torch.Tensor:
    """The same block by block: each is a row of its own for the kernel, so time and memory grow with T alone."""
    num_rows, length = q_BTHK.shape[:2]
    num_blocks, reach = band.mask_BNRS.shape[1:3]
    missing = num_blocks * reach - length
    q_NRHK = F.pad(q_BTHK, (0, 0, 0, 0, 0, missing)).unflatten(1, (num_blocks, reach)).flatten(0, 1)

    def seen(x_BTGK: torch.Tensor) -> torch.Tensor:
        """(B N, S, G, K): what each block sees."""
        filled = F.pad(x_BTGK, (0, 0, 0, 0, reach, missing + reach)).unflatten(1, (num_blocks + 2, reach))
        return torch.cat((filled[:, :-2], filled[:, 1:-1], filled[:, 2:]), dim=2).flatten(0, 1)

    mask_N1RS = band.mask_BNRS.expand(num_rows, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    out_NRHK = attention(q_NRHK, seen(k_BTGK), seen(v_BTGK), mask_N1RS, scale)
    return out_NRHK.unflatten(0, (num_rows, num_blocks)).flatten(1, 2)[:, :length]


def _explicit_attention(
    q_BTHK: torch.Tensor,
    k_BTGK: torch.Tensor,
    v_BTGK: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    drop: Drop,
) -> torch.Tensor:
    """The same, written out; the softmax is in fp32."""
    shared_by = q_BTHK.size(2) // k_BTGK.size(2)
    k_BHTK, v_BHTK = (x_BTGK.repeat_interleave(shared_by, 2).transpose(1, 2) for x_BTGK in (k_BTGK, v_BTGK))
    scores_BHTT = q_BTHK.transpose(1, 2) @ k_BHTK.transpose(2, 3) * (scale or q_BTHK.size(-1) ** -0.5)
    if mask is None:
        mask = torch.ones(scores_BHTT.shape[2:], dtype=torch.bool, device=scores_BHTT.device).tril()
    seen = mask.dtype == torch.bool
    scores_BHTT = scores_BHTT.masked_fill(~mask, -torch.inf) if seen else scores_BHTT + mask
    probabilities_BHTT = torch.softmax(scores_BHTT, -1, dtype=torch.float32).to(v_BHTK.dtype)
    return (drop(probabilities_BHTT) @ v_BHTK).transpose(1, 2)


def _same(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


@dataclass(frozen=True)
class SequenceSlice:
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

    def whole(self, hidden_BTD: torch.Tensor) -> int:
        """Tokens of the row."""
        return self.given(hidden_BTD) * self.size

    def first(self, num_given: int) -> int:
        """Where the first of the given tokens stands in the row."""
        return self.position * num_given

    def own(self, whole_BT: torch.Tensor) -> torch.Tensor:
        """The given tokens' part of what holds a number for each token of the row; a view.

        Of numbers for each of this rank's heads: those of the heads that its attention sees, which then sees the row.
        """
        length = whole_BT.size(-1) // self.size
        return whole_BT.narrow(-1, self.position * length, length)


@dataclass(frozen=True)
class Functions:
    """What `engine.models` is built with."""

    attention: Attention = attention
    linear_cross_entropy: LinearCrossEntropy = linear_cross_entropy
    whole_rows: Callable[[torch.Tensor], torch.Tensor] = _same
    """Hidden states of all given tokens, (B, T, D), from those held between the blocks; for heads."""
    sequence_slice: SequenceSlice = SequenceSlice()
    tensor_rank: int = 0
    """This rank holds the heads number `tensor_rank` times its own many, and those behind."""

    def first_held(self, hidden_BTD: torch.Tensor) -> int:
        """Where the first of the hidden states that are held stands in its row."""
        within = self.tensor_rank * hidden_BTD.size(1) if self.sequence_slice.shared_by > 1 else 0
        return self.sequence_slice.first(self.sequence_slice.given(hidden_BTD)) + within


PLAIN = Functions()
"""One rank holds every head and the whole vocabulary."""
