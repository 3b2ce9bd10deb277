"""A rank's shard made of the rows that it asks for is the range of its part of the whole parameter."""

from __future__ import annotations

import pytest
import torch

from engine.models.families import family
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard
from engine.parallel.zero.held_state import values_of
from tests.engine.models.tiny import BERT_FORMS, FORMS, T5_FORMS

ALL = FORMS | BERT_FORMS | T5_FORMS


@pytest.mark.parametrize("form", ["gpt2", "llama", "bert", "t5-v1.1"])
@pytest.mark.parametrize("tensor_size", [1, 2])
def test_every_range_of_every_part(form, tensor_size):
    for spec in family(ALL[form]).specs(ALL[form]):
        whole = torch.arange(torch.Size(spec.shape).numel(), dtype=torch.float32).reshape(spec.shape)
        asked: list[int] = []

        def rows(spec: ParameterSpec, first: int, end: int, whole=whole, asked=asked) -> torch.Tensor:
            asked.append(end - first)
            return whole[first:end]

        for rank in range(tensor_size):
            flat = spec.part(whole, rank, tensor_size).reshape(-1)
            numel, row = flat.numel(), torch.Size(spec.local_shape(tensor_size)[1:]).numel()
            for start, length in ((0, numel), (numel // 3, numel // 2), (numel - 1, 1), (1, 1), (row, numel - row)):
                if length < 1:
                    continue
                asked.clear()
                found = values_of(ParameterShard(spec, start, torch.empty(length)), rows, rank, tensor_size)
                assert torch.equal(found, flat[start : start + length]), (spec.name, start, length)
                # no other rows than those that hold it
                assert sum(asked) == (start + length - 1) // row - start // row + 1
