"""Functions that a model receives instead of a process group: attention and the loss over the vocabulary.

A model calls them with its own rank's tensors. The plain versions here are right wherever one rank holds all heads and
the whole vocabulary; tensor parallelism passes others. Nothing here communicates.

Legend: B batch, T time, D width, H heads, G key/value heads, K head size, V vocabulary (all of it, padding included);
N blocks of R tokens, S = 3 R or 2 R tokens that a block sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from engine.parallel.cross_entropy import linear_cross_entropy
from engine.parallel.label_cross_entropy import label_cross_entropy
from engine.parallel.packed import Documents, packed_attention

Drop = Callable[..., torch.Tensor]
"""(probabilities_BHTT, first_head=0) -> probabilities_BHTT with some of them 0. An attention function that works on
some of the heads that it was called with passes the number of its first one."""


@dataclass(frozen=True)
class Band:
    """Mask of rows in which no token attends further than R tokens: a row is cut into blocks of R, each of which
    attends to the block before it, itself and, where S is 3 R, the one behind it.

    `mask_BNRS` is true where a query sees a key (B may be 1). Rows are filled up to N blocks; padding sees some key,
    too (a softmax over none would be NaN), and no token of the row sees padding.
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
"""(hidden, weight_VD, bias_V or None, targets, weights, vocab_size, into=None, smoothing=None) -> fp32 scalar, the
weighted sum of the tokens' losses; see `engine.parallel.cross_entropy`."""
LabelCrossEntropy = Callable[..., torch.Tensor]
"""(logits, labels, weights, smoothing=None, padding=None) -> weighted losses; see
`engine.parallel.label_cross_entropy`."""


def attention(
    q_BTHK: torch.Tensor,
    k_BTGK: torch.Tensor,
    v_BTGK: torch.Tensor,
    mask: Mask | None,
    scale: float | None = None,
    drop: Drop | None = None,
) -> torch.Tensor:
    """Compute softmax attention, out_BTHK; query heads share the G key/value heads in consecutive groups of H / G.

    `mask` (B, 1 or H, T, T) is boolean, true where a query (first T) sees a key (second T), or of the queries' dtype
    and added to the scores; or a `Band`, or `Documents` where the device has a kernel for them: both without `drop`.
    Keys may be of another length than queries. With `drop` probabilities exist one by one, else the fastest kernel is
    taken.
    """
    # Documents and bands never hold a mask of T x T; `drop` needs every probability in memory.
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
    """Compute attention block by block: each is a row of its own for the kernel, so time and memory grow with T alone.

    Beltagy et al. 2020, Longformer, section 3.1. With T = 5 and R = 2 the row is filled up to the blocks (0, 1),
    (2, 3), (4, -), and the second one sees the keys 0 to 5, of which 5 is padding.
    """
    num_rows, length = q_BTHK.shape[:2]
    num_blocks, reach, num_seen = band.mask_BNRS.shape[1:]
    neighbours, missing = num_seen // reach, num_blocks * reach - length
    q_NRHK = F.pad(q_BTHK, (0, 0, 0, 0, 0, missing)).unflatten(1, (num_blocks, reach)).flatten(0, 1)

    def seen(x_BTGK: torch.Tensor) -> torch.Tensor:
        """Return the keys or values that each block sees, (B, T, G, K) -> (B N, S, G, K)."""
        # Blocks of padding at the ends, so that the first and, of three, the last block have neighbours as well.
        behind = (neighbours - 2) * reach
        filled = F.pad(x_BTGK, (0, 0, 0, 0, reach, missing + behind)).unflatten(1, (-1, reach))
        return torch.cat([filled[:, i : i + num_blocks] for i in range(neighbours)], dim=2).flatten(0, 1)

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
    """Compute attention with one tensor operation per step, for `drop`; the softmax is in fp32."""
    shared_by = q_BTHK.size(2) // k_BTGK.size(2)
    # (B, T, G, K) -> (B, H, T, K): with 4 query and 2 key/value heads, heads 0 and 1 get the first of the two.
    k_BHTK, v_BHTK = (x_BTGK.repeat_interleave(shared_by, 2).transpose(1, 2) for x_BTGK in (k_BTGK, v_BTGK))
    scores_BHTT = q_BTHK.transpose(1, 2) @ k_BHTK.transpose(2, 3) * (scale or q_BTHK.size(-1) ** -0.5)
    if mask is None:
        mask = torch.ones(scores_BHTT.shape[2:], dtype=torch.bool, device=scores_BHTT.device).tril()
    seen = mask.dtype == torch.bool
    scores_BHTT = scores_BHTT.masked_fill(~mask, -torch.inf) if seen else scores_BHTT + mask
    # Dropped after the softmax and not normalised again: `drop` scales what is left, so that the mean stays.
    probabilities_BHTT = torch.softmax(scores_BHTT, -1, dtype=torch.float32).to(v_BHTK.dtype)
    return (drop(probabilities_BHTT) @ v_BHTK).transpose(1, 2)


def _same(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


@dataclass(frozen=True)
class SequenceSlice:
    """Slice of a row's tokens that a model is given, and of hidden states that it holds, under sequence parallelism.

    Rows are cut into `size` equal slices. A rank is given the tokens, targets and weights of slice `position`, and all
    document numbers. Between the blocks it holds one `shared_by`-th of its slice as hidden states.

    Row of 8 tokens, `size` 2, `shared_by` 2: position 1 is given tokens 4 to 7, and its tensor rank 1 holds 6 and 7.
    """

    position: int = 0
    size: int = 1
    shared_by: int = 1

    def given(self, hidden_BTD: torch.Tensor) -> int:
        """Return the number of a row's tokens that a model is given, from the hidden states that it holds.

        Attention gets as many.
        """
        return hidden_BTD.size(1) * self.shared_by

    def whole(self, hidden_BTD: torch.Tensor) -> int:
        """Return the number of tokens of the whole row."""
        return self.given(hidden_BTD) * self.size

    def first(self, num_given: int) -> int:
        """Return the position in the row of the first of the given tokens."""
        return self.position * num_given

    def own(self, whole_BT: torch.Tensor) -> torch.Tensor:
        """Return the given tokens' slice of a tensor with a number for each token of the row; a view.

        Also for a tensor with a number for each of this rank's heads: attention of the sequence axis (`ulysses`) works
        on the `position`-th part of the heads for whole rows, cut in the same way.
        """
        length = whole_BT.size(-1) // self.size
        return whole_BT.narrow(-1, self.position * length, length)


@dataclass(frozen=True)
class Functions:
    """Functions and numbers that depend on the layout, with which `engine.models` builds a model."""

    attention: Attention = attention
    linear_cross_entropy: LinearCrossEntropy = linear_cross_entropy
    label_cross_entropy: LabelCrossEntropy = label_cross_entropy
    whole_rows: Callable[[torch.Tensor], torch.Tensor] = _same
    """Return hidden states of all given tokens, (B, T, D), from those held between the blocks; for heads."""
    whole_sequence: Callable[[torch.Tensor], torch.Tensor] = _same
    """Return numbers of all tokens of the row, (B, T, C), from those of the given ones; for heads that compare tokens
    of a row with each other. Each rank's loss sends its gradient to all of them."""
    sequence_slice: SequenceSlice = SequenceSlice()
    tensor_rank: int = 0
    """Position on the tensor axis. With n heads on this rank its first one has the global number `tensor_rank` x n."""

    def first_held(self, hidden_BTD: torch.Tensor) -> int:
        """Return the position in the row of the first of the hidden states that this rank holds."""
        within = self.tensor_rank * hidden_BTD.size(1) if self.sequence_slice.shared_by > 1 else 0
        return self.sequence_slice.first(self.sequence_slice.given(hidden_BTD)) + within


PLAIN = Functions()
"""One rank holds every head and the whole vocabulary."""
