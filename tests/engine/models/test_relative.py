"""Relative positions against the published code, and against a table looked up entry by entry."""

from __future__ import annotations

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from engine.config.schema.model import T5Config
from engine.models.relative import RelativePositions, buckets, masked


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "longest"), [(32, 128), (16, 32), (8, 20), (64, 1000), (4, 9)])
def test_buckets_are_those_of_the_published_code(bidirectional, num_buckets, longest):
    distances = torch.arange(-3000, 3001)
    expected = T5Attention._relative_position_bucket(distances, bidirectional, num_buckets, longest)
    assert torch.equal(buckets(distances, bidirectional, num_buckets, longest), expected)
    nowhere = {num_buckets // 2} if bidirectional else set()  # "behind the query" at a distance of 0
    assert set(expected.tolist()) == set(range(num_buckets)) - nowhere


@pytest.mark.parametrize("bidirectional", [True, False])
def test_bias_and_gradient_are_those_of_a_look_up_for_each_pair(bidirectional):
    config = T5Config(
        family="t5", vocab_size=9, num_layers=2, hidden_size=6, num_heads=3, relative_buckets=8, relative_distance=9
    )
    positions = RelativePositions(config, bidirectional)
    torch.nn.init.normal_(positions.weight, generator=torch.Generator().manual_seed(0))
    bias_1HTT = positions(20)
    table = positions.weight.detach().requires_grad_(True)
    places_T = torch.arange(20)
    found = buckets(places_T[None, :] - places_T[:, None], bidirectional, 8, 9)
    expected = table[found].permute(2, 0, 1)[None]
    assert torch.equal(bias_1HTT, expected)
    weights = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    (bias_1HTT * weights).sum().backward()
    (expected * weights).sum().backward()
    # at most 400 terms of size 1 in fp32, added in another order
    assert positions.weight.grad is not None
    assert table.grad is not None
    torch.testing.assert_close(positions.weight.grad, table.grad, rtol=0, atol=400 * 2**-24 * 20**0.5)


@pytest.mark.parametrize("causal", [True, False])
def test_only_what_a_query_must_not_see_is_masked(causal):
    bias_1HTT = torch.randn(1, 2, 6, 6)
    segments_BT = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    found = masked(bias_1HTT, segments_BT, causal)
    for row, query, key in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(6)).tolist():
        sees = segments_BT[row, query] == segments_BT[row, key] and (key <= query or not causal)
        expected = bias_1HTT[0, :, query, key] if sees else torch.full((2,), -torch.inf)
        assert torch.equal(found[row, :, query, key], expected)
    assert torch.equal(masked(bias_1HTT, None, causal)[0], found[1])
