"""Attention inside the documents of packed rows, on a GPU, without a mask of every pair of tokens.

`kernel` selects by device: "varlen" (flash attention over the documents, one behind the other; Dao 2023,
FlashAttention-2), "flex" (torch's compiled block masks, where torch is too old for the first; Dong et al. 2024), or
"mask" (scaled dot products under a boolean mask, `engine.models.attention.document_mask`): a CPU has neither of the
others with a gradient, fp32 on a GPU is there for comparisons, and dropout and T5's biases need the scores one by one.
The view of a micro-batch is made with `Documents` instead of a mask wherever there is a kernel.

Legend: B batch, T time, H heads, G key/value heads, K head size, N tokens of all rows (B T).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch

from engine.logs import logger

Kernel = Literal["varlen", "flex", "mask"]

LARGEST_HEAD = 256
"""Largest head size of flash attention, which takes multiples of 8."""

_log = logger(__name__)


@dataclass(frozen=True, eq=False)
class Documents:
    """Visibility in packed rows: a token sees those of its own document and, unless `bidirectional`, none behind it.

    `segments_BT` counts documents within a row, rising; padding is one, too. `reach` is the largest distance of what a
    token sees; None means no limit. Equal only to itself (`eq=False`): tensors do not compare to one truth value.
    """

    segments_BT: torch.Tensor
    bidirectional: bool
    reach: int | None = None

    @property
    def window(self) -> tuple[int, int]:
        """Numbers of tokens before and behind a token that it sees at most; -1 means no limit."""
        before = -1 if self.reach is None else self.reach
        return before, before if self.bidirectional else 0

    @cached_property
    def bounds(self) -> torch.Tensor:
        """First of the N tokens of each document of all rows, then N: (documents + 1,) int32. The host waits for it.

        Once per micro-batch: the layers share it.
        """
        # Rows [[0, 0, 1], [0, 1, 1]] give 0, 2, 3, 4, 6: column 0 always begins a document, so none crosses rows.
        first_BT = torch.ones_like(self.segments_BT, dtype=torch.bool)
        first_BT[:, 1:] = self.segments_BT[:, 1:] != self.segments_BT[:, :-1]
        starts = first_BT.flatten().nonzero().flatten()
        return torch.cat((starts, starts.new_tensor([first_BT.numel()]))).int()

    @cached_property
    def block_mask(self) -> Any:
        """The block mask of flex attention."""
        from torch.nn.attention.flex_attention import create_block_mask

        segments_BT, bidirectional, reach = self.segments_BT, self.bidirectional, self.reach

        def sees(b: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            seen = segments_BT[b, query] == segments_BT[b, key]
            if reach is not None:
                seen = seen & (query - key <= reach) & (key - query <= reach)
            return seen if bidirectional else seen & (query >= key)

        num_rows, length = segments_BT.shape
        # One mask for all heads (None), of whole blocks that are all seen, all hidden, or mixed.
        return create_block_mask(sees, num_rows, None, length, length, device=segments_BT.device)


@lru_cache(maxsize=16)
def kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel:
    """Return the kernel of attention inside documents; on a GPU log the choice once."""
    if device.type != "cuda":
        return "mask"
    found, why = _kernel(device, dtype, head_size)
    _log.info("attention inside documents on %s, %s, head size %d: %s (%s)", device, dtype, head_size, found, why)
    return found


def _kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[Kernel, str]:
    if dtype not in (torch.bfloat16, torch.float16):
        return "mask", "other kernels are for bf16 and fp16"
    if torch.cuda.get_device_capability(device) < (8, 0) or torch.version.cuda is None:
        return "mask", "other kernels need an NVIDIA GPU of compute capability 8.0 or higher"
    if _varlen_attn() is not None and head_size % 8 == 0 and head_size <= LARGEST_HEAD:
        return "varlen", "flash attention, no mask in memory"
    if head_size >= 16 and head_size & (head_size - 1) == 0:  # flex compiles for powers of 2 from 16 on
        return "flex", f"torch {torch.__version__} has no varlen_attn for this"
    return "mask", "no kernel for this head size"


def packed_attention(
    q_BTHK: torch.Tensor,
    k_BTGK: torch.Tensor,
    v_BTGK: torch.Tensor,
    documents: Documents,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute softmax attention inside documents, out_BTHK, by the kernel of the queries' device (never "mask")."""
    by = kernel(q_BTHK.device, q_BTHK.dtype, q_BTHK.size(-1))
    return (varlen if by == "varlen" else flex)(q_BTHK, k_BTGK, v_BTGK, documents, scale)


def varlen(
    q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, documents: Documents, scale: float | None
) -> torch.Tensor:
    """Compute out_BTHK by flash attention over all documents as one long row."""
    attend, (num_rows, length) = _varlen_attn(), q_BTHK.shape[:2]
    assert attend is not None, "kernel() has looked"
    bounds = documents.bounds
    out_NHK = attend(
        *(x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK)),
        bounds,
        bounds,
        length,  # no document is longer than its row; the exact maximum would cost another wait of the host
        length,
        scale=scale,
        window_size=documents.window,
        enable_gqa=q_BTHK.size(2) != k_BTGK.size(2),
    )
    return out_NHK.unflatten(0, (num_rows, length))


def flex(
    q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, documents: Documents, scale: float | None
) -> torch.Tensor:
    """Compute out_BTHK by flex attention, compiled on a GPU. On a CPU forward only, which is enough for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Callable[..., Any] = _compiled_flex() if q_BTHK.is_cuda else flex_attention
    out_BHTK = attend(
        *(x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK)),
        block_mask=documents.block_mask,
        scale=scale,
        enable_gqa=q_BTHK.size(2) != k_BTGK.size(2),
    )
    return out_BHTK.transpose(1, 2)


@lru_cache(maxsize=1)
def _varlen_attn() -> Callable[..., Any] | None:
    """Return torch's `varlen_attn`, or None if it lacks windows and shared heads (before torch 2.12 or so)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
