"""One description of a parameter serves all directions: whole, back, and for any rows alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.mapping import ParameterMap, mapped, unchanged
from engine.checkpoint.interchange.sources import MemorySource
from engine.models.families import family
from engine.parallel.sharding import ParameterSpec, column
from tests.engine.models.tiny import BERT_FORMS, FORMS, T5_FORMS, random_weights

ALL = FORMS | BERT_FORMS | T5_FORMS
QKV = ParameterSpec("qkv.weight", (12, 3), column(4, 4, 4))
WHOLE = torch.arange(36.0).reshape(12, 3)


def check_both_ways(one: ParameterMap, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Their tensors, from which every range of rows of ours comes back, and no other row is read."""
    theirs = {name: one.theirs(name, value) for name in one.tensors}
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == dict(one.tensors)
    row = value[0].numel()
    for first, end in itertools.combinations(range(len(value) + 1), 2):
        source = MemorySource(theirs, "here")
        assert torch.equal(one.ours(source.read, first, end), value[first:end])
        assert source.bytes_read == 4 * row * (end - first)
    return theirs


def test_blocks_become_tensors_of_their_own():
    theirs = check_both_ways(mapped(QKV, ("q", "k", "v")), WHOLE)
    assert torch.equal(theirs["k"], WHOLE[4:8])


def test_a_fused_matrix_may_be_transposed_and_a_bias_has_no_orientation():
    theirs = check_both_ways(mapped(QKV, ("c_attn",), transposed=True), WHOLE)
    assert torch.equal(theirs["c_attn"], WHOLE.t())
    bias = mapped(ParameterSpec("qkv.bias", (12,), column(4, 4, 4)), ("b",), transposed=True)
    assert torch.equal(check_both_ways(bias, torch.arange(12.0))["b"], torch.arange(12.0))


def test_rows_that_ours_lacks_are_zero():
    theirs = check_both_ways(mapped(ParameterSpec("positions", (4, 3)), ("p",), skipped=2), WHOLE[:4])
    assert torch.equal(theirs["p"], torch.cat((torch.zeros(2, 3), WHOLE[:4])))


def test_heads_may_come_one_after_the_other():
    theirs = check_both_ways(mapped(QKV, ("qkv",), per_head=2), WHOLE)
    # two heads of two rows: q0 k0 v0 q1 k1 v1
    assert torch.equal(theirs["qkv"], WHOLE[[0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]])


@pytest.mark.parametrize("form", ALL)
def test_every_form_covers_each_row_once(form):
    config, weights = ALL[form], random_weights(ALL[form])
    model_map = form_of(config).mapping(config, padding_id=1)
    assert model_map.parameters.keys() == weights.keys()
    for name, value in weights.items():
        one = model_map.parameters[name]
        rows = sorted(row for run in one.runs for row in range(run.ours, run.ours + run.length))
        assert rows == list(range(len(value)))
        theirs = MemorySource({tensor: one.theirs(tensor, value) for tensor in one.tensors}, "here")
        low, high = len(value) // 3, max(len(value) // 3 + 1, 2 * len(value) // 3)
        assert torch.equal(one.ours(theirs.read, low, high), value[low:high])


def test_our_own_names_map_to_themselves():
    config, weights = FORMS["gpt2"], random_weights(FORMS["gpt2"])
    model_map = unchanged(family(config).specs(config))
    assert dict(model_map.parts("final_norm.weight", weights["final_norm.weight"])).keys() == {"final_norm.weight"}
    assert model_map.tensors == {name: tuple(value.shape) for name, value in weights.items()}
