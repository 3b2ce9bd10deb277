"""Attention that stays inside the documents of packed rows, on a GPU, without a mask of every pair of tokens.

`kernel` says what a device can do: "varlen" (flash attention over the documents, one behind the other), "flex"
(torch's compiled block masks, where torch is too old for the first), or "mask" (scaled dot products under a boolean
mask, `engine.models.attention.document_mask`): a CPU has neither of the others with a gradient, fp32 on a GPU is there
for comparisons, and dropout and T5's biases need the scores one by one. Who makes the view of a micro-batch asks once
and hands out `Documents` instead of a mask.

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
"""Of flash attention, in multiples of 8."""

_log = logger(__name__)


@dataclass(frozen=True, eq=False)
class Documents:
    """Which tokens see each other: those of one document and, unless `bidirectional`, not those behind.

    `segments_BT` counts documents within a row, rising; padding is one, too.
    """

    segments_BT: torch.Tensor
    bidirectional: bool

    @cached_property
    def bounds(self) -> torch.Tensor:
        """(documents + 1,) int32: first of the N tokens of each document of all rows, then N. The host waits for it."""
        first_BT = torch.ones_like(self.segments_BT, dtype=torch.bool)
        first_BT[:, 1:] = self.segments_BT[:, 1:] != self.segments_BT[:, :-1]
        starts = first_BT.flatten().nonzero().flatten()
        return torch.cat((starts, starts.new_tensor([first_BT.numel()]))).int()

    @cached_property
    def block_mask(self) -> Any:
        """The same for flex attention."""
        from torch.nn.attention.flex_attention import create_block_mask

        segments_BT, bidirectional = self.segments_BT, self.bidirectional

        def sees(b: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            same = segments_BT[b, query] == segments_BT[b, key]
            return same if bidirectional else same & (query >= key)

        num_rows, length = segments_BT.shape
        return create_block_mask(sees, num_rows, None, length, length, device=segments_BT.device)


@lru_cache(maxsize=16)
def kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel:
    """What attention inside documents is computed by; on a GPU says so once."""
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
    if head_size >= 16 and head_size & (head_size - 1) == 0:
        return "flex", f"torch {torch.__version__} has no varlen_attn for this"
    return "mask", "no kernel for this head size"


def packed_attention(
    q_BTHK: torch.Tensor,
    k_BTGK: torch.Tensor,
    v_BTGK: torch.Tensor,
    documents: Documents,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention inside documents, out_BTHK, by the kernel of the queries' device; that is not "mask"."""
    by = kernel(q_BTHK.device, q_BTHK.dtype, q_BTHK.size(-1))
    return (varlen if by == "varlen" else flex)(q_BTHK, k_BTGK, v_BTGK, documents, scale)


def varlen(
    q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, documents: Documents, scale: float | None
) -> torch.Tensor:
    """By flash attention over all documents as one long row; out_BTHK."""
    attend, (num_rows, length) = _varlen_attn(), q_BTHK.shape[:2]
    assert attend is not None, "kernel() has looked"
    bounds = documents.bounds
    out_NHK = attend(
        *(x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK)),
        bounds,
        bounds,
        length,  # no document is longer than its row: exact would cost another wait
        length,
        scale=scale,
        window_size=(-1, -1) if documents.bidirectional else (-1, 0),
        enable_gqa=q_BTHK.size(2) != k_BTGK.size(2),
    )
    return out_NHK.unflatten(0, (num_rows, length))


def flex(
    q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, documents: Documents, scale: float | None
) -> torch.Tensor:
    """By flex attention, compiled on a GPU; out_BTHK. On a CPU forward only, which is what tests need."""
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
    """torch's, None where it is not there or knows no windows and shared heads (before torch 2.12 or so)."""
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
