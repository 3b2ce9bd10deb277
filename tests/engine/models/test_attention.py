"""Masks and positions against their definitions, written out in loops."""

from __future__ import annotations

import math

import pytest
import torch

from engine.models.attention import document_mask, local_mask, positions_in_document
from engine.parallel.functions import Band, attention
from tests.engine.models.parity import gradient_of

SEGMENTS_BT = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 1], [3, 3, 4, 4, 5, 6]], dtype=torch.int32)


def test_a_query_sees_the_earlier_tokens_of_its_document():
    mask_B1TT = document_mask(SEGMENTS_BT)
    assert mask_B1TT.shape == (3, 1, 6, 6)
    for row in range(3):
        for query in range(6):
            for key in range(6):
                expected = key <= query and SEGMENTS_BT[row, query] == SEGMENTS_BT[row, key]
                assert mask_B1TT[row, 0, query, key] == expected


def local_pairs(segments: torch.Tensor, reach: int, bidirectional: bool = True) -> torch.Tensor:
    """The definition, (B, 1, T, T), in loops."""
    num_rows, length = segments.shape
    seen = torch.zeros(num_rows, 1, length, length, dtype=torch.bool)
    for row in range(num_rows):
        for query in range(length):
            behind = reach if bidirectional else 0
            for key in range(max(query - reach, 0), min(query + behind + 1, length)):
                seen[row, 0, query, key] = segments[row, query] == segments[row, key]
    return seen


def long_rows(length: int) -> torch.Tensor:
    """Documents of many lengths, one longer than any window among them."""
    ends_BT = torch.rand(3, length, generator=torch.Generator().manual_seed(length)) > 0.85
    ends_BT[0] = False
    return ends_BT.int().cumsum(1, dtype=torch.int32)


def test_a_short_row_s_local_mask_is_that_of_its_pairs():
    for length, reach in ((6, 2), (9, 3), (5, 7)):
        for bidirectional in (True, False):
            mask = local_mask(long_rows(length), reach, bidirectional, in_blocks=False)
            assert isinstance(mask, torch.Tensor)
            assert torch.equal(mask, local_pairs(long_rows(length), reach, bidirectional))
        assert isinstance(local_mask(long_rows(length), reach), torch.Tensor)
    assert isinstance(local_mask(long_rows(40), 2, in_blocks=False), torch.Tensor)


@pytest.mark.parametrize("bidirectional", [True, False], ids=["both-ways", "causal"])
@pytest.mark.parametrize(("length", "reach"), [(7, 2), (24, 4), (25, 4), (29, 4), (40, 13), (5, 1)])
def test_attention_in_blocks_is_that_of_the_pairs(length: int, reach: int, bidirectional: bool):
    """Lengths that blocks divide and do not; grouped heads; gradients, too. Sums of at most 27 terms are near 1e-6."""
    generator = torch.Generator().manual_seed(reach)
    rows = long_rows(length)
    band, pairs = local_mask(rows, reach, bidirectional), local_pairs(rows, reach, bidirectional)
    assert isinstance(band, Band)
    assert band.mask_BNRS.shape == (3, -(-length // reach), reach, (3 if bidirectional else 2) * reach)
    made = []
    for mask in (band, pairs):
        generator.manual_seed(reach)
        q, (k, v) = (
            torch.randn(3, length, 4, 8, generator=generator),
            torch.randn(2, 3, length, 2, 8, generator=generator),
        )
        given = (q.requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_())
        out = attention(*given, mask)
        (out * torch.linspace(0, 1, out.numel()).view_as(out)).sum().backward()
        made.append((out.detach(), *(gradient_of(x) for x in given)))
    for found, expected in zip(*made, strict=True):
        assert (found - expected).abs().max() < 2e-6 * expected.abs().max().clamp(min=1)


def test_positions_start_again_with_each_document():
    expected = [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4], [0, 1, 0, 1, 0, 0]]
    assert positions_in_document(SEGMENTS_BT).tolist() == expected


def test_grouped_queries_share_their_key_and_value_heads():
    generator = torch.Generator().manual_seed(2)
    q_BTHK = torch.randn(2, 7, 4, 8, generator=generator)
    k_BTGK, v_BTGK = torch.randn(2, 2, 7, 2, 8, generator=generator)
    out_BTHK = attention(q_BTHK, k_BTGK, v_BTGK, None)
    for head in range(4):
        k, v = k_BTGK[:, :, head // 2], v_BTGK[:, :, head // 2]
        scores = q_BTHK[:, :, head] @ k.transpose(1, 2) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        # two sums of 8 terms and a softmax of values near 1
        torch.testing.assert_close(out_BTHK[:, :, head], scores.softmax(-1) @ v, rtol=0, atol=2e-6)
