"""Self-attention over rows of packed documents: masks, positions and projections.

Mask and rotary tables are equal for every layer of a forward pass, so they are a `View` made once per pass. Head counts
are read from the width of the projection's output, never from the configuration, so that the same module serves a
tensor-parallel rank that holds some of the heads.

Legend: B batch, T time, D width, H heads, G key/value heads (H and G may be local), K head size, R rotated dimensions
of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engine.config.schema.model import ModelConfig
from engine.config.virtual_tokens import prefix_length
from engine.models.adapters import adapters, project
from engine.models.dropout import ATTENTION, Dropout
from engine.models.norms import norm
from engine.models.rotary import rotary_tables, rotate
from engine.models.virtual_tokens import Prefix, prefixed_mask
from engine.parallel.functions import PLAIN, Band, Drop, Functions, Mask, SequenceSlice
from engine.parallel.packed import Documents, kernel

NEIGHBOURS, CAUSAL_NEIGHBOURS = 3, 2
"""Number of blocks that a block of a band attends to: the one before it, itself and, unless causal, the one behind it.
"""


@dataclass(frozen=True)
class View:
    """Mask, rotary tables and dropout of one micro-batch, shared by its layers.

    `mask_B1TT` is true where a query (first T) sees a key (second T), or is added to the scores (then it may be BHTT);
    None for causal over whole rows; a `Band` for local layers, `Documents` where a GPU needs no mask. `cos_TR` and
    `sin_TR` (fp32) turn queries and keys; None without rotary positions. `dropout` None means that nothing is dropped.
    """

    mask_B1TT: Mask | None
    cos_TR: torch.Tensor | None
    sin_TR: torch.Tensor | None
    dropout: Dropout | None = None

    def dropped(self, x_BTD: torch.Tensor, layer: int, site: int) -> torch.Tensor:
        """Apply dropout to hidden states; `layer` is the global number."""
        return x_BTD if self.dropout is None else self.dropout.hidden(x_BTD, layer, site)

    def probability_drop(self, layer: int, first_head: int, site: int = ATTENTION) -> Drop | None:
        """Return the dropout of the probabilities of a layer's heads from the global `first_head` on; None without."""
        return None if self.dropout is None else self.dropout.probabilities(layer, first_head, site)


def view(
    config: ModelConfig,
    x_BTD: torch.Tensor,
    segments_BT: torch.Tensor | None,
    bidirectional: bool = False,
    sequence_slice: SequenceSlice = PLAIN.sequence_slice,
    dropout: Dropout | None = None,
    reach: int | None = None,
) -> View:
    """Make the view of one micro-batch with these hidden states.

    `segments_BT` counts documents within a whole row; None means one document per row. `sequence_slice` gives the
    tokens of which this rank makes queries and keys. With `bidirectional` tokens see those behind them, too, and with
    `reach` none further away than that (`ModelConfig.reach`).
    """
    length = sequence_slice.whole(x_BTD)
    if reach is not None and not bidirectional and reach >= length - 1:
        reach = None  # every token sees all before it
    # One row of zeros stands for all rows: no mask at all would mean causal over whole rows.
    prefix = prefix_length(config)
    if segments_BT is None and (bidirectional or reach is not None or prefix):
        segments_BT = torch.zeros((1, length), dtype=torch.int32, device=x_BTD.device)
    drops = dropout is not None and config.attention_dropout > 0
    mask = None if segments_BT is None else _mask(config, x_BTD, segments_BT, bidirectional, drops, reach)
    rotary = config.rotary(reach)
    if rotary is None:
        return View(mask, None, None, dropout)
    # Tokens as attention gets them, not as the hidden states between the blocks are cut.
    num_given = sequence_slice.given(x_BTD)
    first = sequence_slice.first(num_given) + prefix
    tables = rotary_tables(rotary, num_given, x_BTD.device, first, length + prefix)
    return View(mask, *tables, dropout)


def _mask(
    config: ModelConfig,
    x_BTD: torch.Tensor,
    segments_BT: torch.Tensor,
    bidirectional: bool,
    drops: bool,
    reach: int | None,
) -> Mask:
    """Return the mask that keeps attention inside documents: a tensor only where the device has no kernel without."""
    if prefix_length(config):
        return prefixed_mask(config, document_mask(segments_BT, bidirectional))
    is_whole = len(segments_BT) < len(x_BTD)  # all rows alike, each one document
    by_mask = drops or kernel(x_BTD.device, x_BTD.dtype, config.head_size) == "mask"
    if reach is not None and (bidirectional or by_mask):
        return local_mask(segments_BT, reach, bidirectional, in_blocks=not drops)
    if by_mask or (is_whole and reach is None):
        return document_mask(segments_BT, bidirectional)
    return Documents(segments_BT.expand(len(x_BTD), -1), bidirectional, reach)


def document_mask(segments_BT: torch.Tensor, bidirectional: bool = False) -> torch.Tensor:
    """Return mask_B1TT (true where the query sees the key): inside one document, and causal unless `bidirectional`.

    Every query sees itself.
    """
    num_positions = segments_BT.size(1)
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    if bidirectional:
        return same_BTT[:, None]
    causal_TT = torch.ones(num_positions, num_positions, dtype=torch.bool, device=segments_BT.device).tril()
    return (same_BTT & causal_TT)[:, None]


def local_mask(segments_BT: torch.Tensor, reach: int, bidirectional: bool = True, in_blocks: bool = True) -> Mask:
    """Return the mask inside one document and at most `reach` tokens away, before or, if `bidirectional`, behind.

    It is a `Band` where `in_blocks` and rows are long enough for that to be smaller than a boolean mask_B1TT. Beltagy
    et al. 2020, Longformer, section 3.1.
    """
    length, behind = segments_BT.size(1), reach if bidirectional else 0
    if not in_blocks or length <= (NEIGHBOURS if bidirectional else CAUSAL_NEIGHBOURS) * reach:
        # N blocks of R x 3 R against T x T: with T <= 3 R the band is no smaller.
        positions_T = torch.arange(length, device=segments_BT.device)
        return document_mask(segments_BT, bidirectional) & ((positions_T[:, None] - positions_T).abs() <= reach)
    missing = -length % reach
    filled_BT = nn.functional.pad(segments_BT, (reach, missing + behind), value=-1)  # documents count from 0
    # Windows of S tokens every R tokens, (B, R + N R + R) -> (B, N, S), without a copy; S is 3 R, or 2 R if causal.
    # The second part of each is the block itself.
    seen_BNS = filled_BT.unfold(1, 2 * reach + behind, reach)
    own_BNR = seen_BNS[..., reach : 2 * reach]
    positions_S = torch.arange(-reach, reach + behind, device=segments_BT.device)
    # Positions relative to the block's first token, the same for all blocks. R = 2: query 0 sees keys -2 to 2, query 1
    # keys -1 to 3, of the window -2 to 3.
    distances_RS = positions_S - positions_S[reach : 2 * reach, None]
    near_RS = (distances_RS.abs() <= reach) & (distances_RS <= behind)
    return Band((own_BNR[..., None] == seen_BNS[..., None, :]) & near_RS)


def positions_in_document(segments_BT: torch.Tensor) -> torch.Tensor:
    """Return the distance of each token from the start of its document, int64 of shape (B, T)."""
    # Segments 0 0 0 1 1: starts at (0 and) 3, latest starts 0 0 0 3 3, positions 0 1 2 0 1.
    indices_T = torch.arange(segments_BT.size(1), device=segments_BT.device)
    starts_BT = torch.zeros_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    latest_start_BT = torch.where(starts_BT, indices_T, 0).cummax(dim=1).values
    return indices_T - latest_start_BT


class SelfAttention(nn.Module):
    """Fused projection to queries, keys and values (blocks in this order), attention, output projection.

    Norms of queries and keys (`model.qk_norm`) have one scale for all heads. A tensor-parallel rank computes its own
    heads' part of that scale's gradient; see `engine.plan.parts.of_each_head`.
    """

    def __init__(self, config: ModelConfig, functions: Functions, layer: int) -> None:
        super().__init__()
        self.layer, self.tensor_rank = layer, functions.tensor_rank
        self.head_size = config.head_size
        self.queries_per_kv = config.num_heads // config.num_kv_heads
        self.attention, self.scale = functions.attention, config.score_scale
        query_width = config.num_heads * config.head_size
        kv_width = config.num_kv_heads * config.head_size
        self.qkv_proj = nn.Linear(config.hidden_size, query_width + 2 * kv_width, bias=config.biased_qkv)
        self.q_norm = norm(config, config.head_size) if config.normed_heads else None
        self.k_norm = norm(config, config.head_size) if config.normed_heads else None
        self.out_proj = nn.Linear(query_width, config.hidden_size, bias=config.bias)
        self.adapters = Prefix(config) if prefix_length(config) else adapters(config, "attention", layer)

    def forward(self, x_BTD: torch.Tensor, view: View) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        projected = project(self.adapters, "qkv_proj", self.qkv_proj, x_BTD, view.dropout)
        heads = projected.unflatten(-1, (-1, self.head_size))  # (B, T, H + 2 G, K)
        # H + 2 G = G (H / G + 2), and H / G is the same on every rank.
        num_kv = heads.size(2) // (self.queries_per_kv + 2)
        q_BTHK, k_BTGK, v_BTGK = heads.split((self.queries_per_kv * num_kv, num_kv, num_kv), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if view.cos_TR is not None and view.sin_TR is not None:
            q_BTHK = rotate(q_BTHK, view.cos_TR, view.sin_TR)
            k_BTGK = rotate(k_BTGK, view.cos_TR, view.sin_TR)
        if isinstance(self.adapters, Prefix):
            k_BTGK, v_BTGK = self.adapters(k_BTGK, v_BTGK)
        drop = view.probability_drop(self.layer, first_head=self.tensor_rank * q_BTHK.size(2))
        out_BTHK = self.attention(q_BTHK, k_BTGK, v_BTGK, view.mask_B1TT, self.scale, drop)
        return project(self.adapters, "out_proj", self.out_proj, out_BTHK.flatten(2), view.dropout)
