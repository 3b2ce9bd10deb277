"""T5's relative positions: a learned number per head and bucket of distances, added to the scores of self-attention.

Raffel et al. 2020, section 2.1, with the buckets of their code (mesh_tensorflow, `_relative_position_bucket`): half of
them hold one distance each, the others ever longer ranges up to `relative_distance`, the last all beyond. Distances are
between positions of a row: inside a document they are those that it would have alone.

With 32 buckets for both directions and distance 128, distances 0 to 7 have the buckets 0 to 7, 8 to 11 bucket 8, 12 to
15 bucket 9, 91 and more bucket 15; keys behind the query have 16 more.

Legend: T time, H heads (local under tensor parallelism), R distances: 2 T - 1 of them.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema.model import T5Config
from engine.parallel.functions import PLAIN, SequenceSlice


class RelativePositions(nn.Module):
    """One table for all self-attention of a stack: `weight` is (buckets, heads).

    Tensor parallelism cuts it by heads, as it does the scores it is added to: a rank's columns get their whole gradient
    from its own heads, so nothing is communicated and no copy has to be kept equal. Ranks of the sequence axis hold the
    same columns and use those of the heads that their attention works on: ZeRO adds up the gradients.
    """

    def __init__(self, config: T5Config, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional, self.distance = bidirectional, config.relative_distance
        self.weight = nn.Parameter(torch.zeros(config.relative_buckets, config.num_heads))

    def forward(self, num_positions: int, sequence_slice: SequenceSlice = PLAIN.sequence_slice) -> torch.Tensor:
        """Return bias_1HTT of the scores in whole rows: query (first T) against key (second T).

        For the heads that this rank's attention works on.
        """
        distances_R = torch.arange(1 - num_positions, num_positions, device=self.weight.device)
        buckets_R = buckets(distances_R, self.bidirectional, len(self.weight), self.distance)
        values_HR = sequence_slice.own(F.embedding(buckets_R, self.weight)).T
        # Row i is the window of T distances that begins with -i: T x T numbers are never looked up one by one.
        return values_HR.unfold(1, num_positions, 1).flip(1).unsqueeze(0)


def buckets(distances: torch.Tensor, bidirectional: bool, num_buckets: int, longest: int) -> torch.Tensor:
    """Return the bucket (int64, from 0) of each distance from a query to a key, negative for keys before it.

    Bidirectional: the upper half of the buckets is for keys behind the query; else those are all in bucket 0.
    """
    if bidirectional:
        num_buckets //= 2
        first = (distances > 0) * num_buckets
        far = distances.abs()
    else:
        first = torch.zeros_like(distances)
        far = (-distances).clamp(min=0)
    single = num_buckets // 2
    # fp32 as in the published code: a distance on the edge of a bucket falls on the same side. Clamped, since both
    # sides of `where` are computed and the logarithm of 0 has no integer.
    ranges = torch.log(far.clamp(min=1).float() / single) / math.log(longest / single) * (num_buckets - single)
    ranged = (single + ranges.long()).clamp(max=num_buckets - 1)
    return first + torch.where(far < single, far, ranged)


def masked(bias_1HTT: torch.Tensor, segments_BT: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """Return the bias with minus infinity where a query must not see a key: BHTT, or 1HTT if all rows see the same.

    `segments_BT` numbers the documents of a row, None: each row is one. Every query sees itself.
    """
    num_positions = bias_1HTT.size(-1)
    hidden = torch.zeros((1, 1, num_positions, num_positions), dtype=torch.bool, device=bias_1HTT.device)
    if segments_BT is not None:
        hidden = (segments_BT[:, :, None] != segments_BT[:, None, :])[:, None]
    if causal:
        hidden = hidden | torch.ones_like(hidden[:1]).triu(1)
    return bias_1HTT.masked_fill(hidden, -torch.inf)
