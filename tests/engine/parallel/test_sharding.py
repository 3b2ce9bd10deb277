import math

import pytest
import torch

from engine.parallel.sharding import REPLICATED, ROW, VOCABULARY, ParameterSpec, column, lookup

TABLE = {"layers.*.qkv.*": column(8, 4, 4), "layers.*.out.weight": ROW, "embed.weight": VOCABULARY}


def test_lookup_by_pattern():
    assert lookup(TABLE, "layers.11.qkv.bias") == column(8, 4, 4)
    assert lookup(TABLE, "layers.0.out.weight") is ROW
    assert lookup(TABLE, "layers.0.out.bias") is REPLICATED


def test_overlapping_patterns_are_a_programming_error():
    with pytest.raises(AssertionError, match="matches 2 patterns"):
        lookup({"a.*": ROW, "*.b": ROW}, "a.b")


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "spec",
    [
        ParameterSpec("qkv", (16, 6), column(8, 4, 4)),
        ParameterSpec("bias", (16,), column(8, 4, 4)),
        ParameterSpec("out", (6, 8), ROW),
        ParameterSpec("embed", (12, 5), VOCABULARY, real_rows=11),
        ParameterSpec("norm", (7,)),
    ],
    ids=lambda spec: spec.name,
)
def test_parts_put_together_are_the_whole(spec, size):
    """Rank t of T holds part t of each block: undone block by block, without `extents`."""
    whole = torch.arange(math.prod(spec.shape)).reshape(spec.shape)
    parts = [spec.part(whole, rank, size) for rank in range(size)]
    assert all(part.shape == spec.local_shape(size) for part in parts)
    dim = spec.sharding.dim
    if dim is None:
        assert all(part.equal(whole) for part in parts)
        return
    shares = [block // size for block in (spec.sharding.blocks or (spec.shape[dim],))]
    split = [part.split(shares, dim) for part in parts]
    joined = torch.cat([shard for block in zip(*split, strict=True) for shard in block], dim)
    assert joined.equal(whole)


def test_stored_shape_leaves_padding_out():
    assert ParameterSpec("embed", (12, 5), VOCABULARY, real_rows=11).stored_shape == (11, 5)
    assert ParameterSpec("norm", (7,)).stored_shape == (7,)
