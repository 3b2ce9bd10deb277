"""Bytes per step against the closed forms, written out by hand for small cases."""

from typing import Any

import pytest

from engine.config.schema.parallel import ParallelConfig
from engine.plan.composition import BERT, Change, example
from engine.plan.parameters import num_parameters
from engine.plan.plan import Plan, make_plan
from engine.plan.traffic import all_reduce_factor, gather_factor, zero_bytes

FP32 = example().precision
BF16 = example({"precision": {"dtype": "bf16"}}).precision


@pytest.mark.parametrize(
    ("parallel", "precision", "expected"),
    [
        ({"zero_stage": 0}, FP32, (2 * 4 * 300, 0)),
        ({"zero_stage": 1}, FP32, (4 * 300, 4 * 300)),
        ({"zero_stage": 1}, BF16, (4 * 300, 2 * 300)),
        ({"zero_stage": 2}, BF16, (5 * 2 * 4 * 300, 2 * 300)),
        ({"zero_stage": 2, "reduce": "step"}, BF16, (4 * 300, 2 * 300)),
        ({"zero_stage": 3}, BF16, (5 * 4 * 300, 2 * 5 * 2 * 300)),
        ({"zero_stage": 3, "reduce": "step"}, BF16, (4 * 300, 2 * 5 * 2 * 300)),
        ({"zero_stage": 3, "gather": "step"}, BF16, (5 * 4 * 300, 2 * 300)),
        ({"zero_stage": 3, "gather": "step", "reduce": "step"}, FP32, (4 * 300, 4 * 300)),
    ],
)
def test_zero_bytes(parallel: dict, precision, expected: tuple[int, int]) -> None:
    """400 parameters on 4 data ranks: each sends 3/4 of them; 5 micro-batches."""
    assert zero_bytes(400, ParallelConfig(**parallel), 4, precision, num_micro_batches=5) == expected


@pytest.mark.parametrize("zero_stage", range(4))
def test_one_data_rank_sends_nothing(zero_stage: Any) -> None:
    assert zero_bytes(400, ParallelConfig(zero_stage=zero_stage), 1, FP32, num_micro_batches=5) == (0, 0)


def test_rings() -> None:
    """Simulated: in a ring each of n ranks sends one of n chunks in each of n-1 turns, and twice that to reduce."""
    for size in range(1, 9):
        turns = size - 1
        assert gather_factor(size) * size == turns
        assert all_reduce_factor(size) * size == 2 * turns


def plan(world_size: int, **parallel) -> Plan:
    return make_plan(example({"parallel": parallel}), world_size)


def test_one_rank_sends_nothing() -> None:
    assert plan(1).stages[0].traffic.total == 0


def test_tensor_axis() -> None:
    """24 micro-batches of 64 tokens, width 64, fp32; four layers, embedding and head; three losses per token."""
    activation = 64 * 64 * 4
    assert plan(2, tensor=2).stages[0].traffic.tensor == 24 * ((4 * 4 + 2) * activation + 3 * 64 * 4)


def test_pipe_axis() -> None:
    """Every boundary carries an activation and document numbers down and a gradient up for each micro-batch."""
    activation, segments = 64 * 64 * 4, 64 * 4
    stages = plan(4, pipe=4).stages
    assert [stage.traffic.pipe for stage in stages] == [
        24 * (activations * activation + numbers * segments)
        for activations, numbers in ((1, 1), (2, 1), (2, 1), (1, 0))
    ]


def test_chunks_per_stage_send_as_often_as_parts_meet() -> None:
    """Four parts on two stages: the first sends two chunks on and one back, the second one on and two back."""
    activation, segments = 64 * 64 * 4, 64 * 4
    stages = plan(2, pipe=2, chunks_per_stage=2).stages
    assert [stage.traffic.pipe for stage in stages] == [
        24 * (3 * activation + 2 * segments),
        24 * (3 * activation + segments),
    ]
    assert [stage.chunks for stage in stages] == [((0, 0), (2, 2)), ((1, 1), (3, 3))]


T5: Change = {
    "model": {"family": "t5", "norm": "rmsnorm", "bias": False},
    "objective": {"name": "span_corruption"},
}
"""Rows of 64 tokens; its decoder's are of 14."""


def test_sequence_axis_of_an_encoder_decoder() -> None:
    """Two layers each; a rank exchanges half of what it has of queries, keys, values and results, both ways."""
    own, cross = 2 * 4 * (64 + 14), 2 * 2 * (64 + 14)
    (stage,) = make_plan(example(T5, {"parallel": {"sequence": 2, "zero_stage": 0}}), 2).stages
    assert stage.traffic.sequence == 24 * 2 * (own + cross) // 2 * 64 * 4 // 2
    assert stage.traffic.tensor == 0


def test_norms_of_heads_are_summed_over_tensor_ranks() -> None:
    """Each of two ranks sends half of an all-reduce, twice, of two scales of 16 in each of four layers."""
    layout: Change = {"parallel": {"tensor": 2, "zero_stage": 0}}
    plain, normed = (
        make_plan(example(layout, {"model": {"norm": "rmsnorm", "qk_norm": is_normed}}), 2).stages[0].traffic.tensor
        for is_normed in (False, True)
    )
    assert normed - plain == 4 * 2 * 16 * 4


def test_sequence_parallelism_of_an_encoder_decoder() -> None:
    """A rank's halves: per encoder layer 2 entrances (gather and scatter, gather again) and 2 exits (both once); in the
    decoder 4 of the former, one of them of the encoder's rows, and 3 of the latter. Beside, two embeddings, the head's
    input and its gradient, three numbers per target, and what the tensor ranks sum of 12 norms' gradients."""
    encoder, decoder = 2 * (2 * 3 + 2 * 2) * 64, 2 * ((3 * 3 + 3 * 2) * 14 + 3 * 64)
    rest = 2 * (64 + 14) + 3 * 14
    config = example(T5, {"parallel": {"tensor": 2, "sequence_parallel": True, "zero_stage": 0}})
    (stage,) = make_plan(config, 2).stages
    activations = 24 * ((encoder + decoder + rest) * 64 * 4 // 2 + 3 * 14 * 4)
    assert stage.traffic.tensor == activations + 12 * 64 * 4


@pytest.mark.parametrize(("norm_position", "sums"), [("pre", 1), ("post", 2)])
def test_a_second_run_sums_what_the_backward_pass_wants(norm_position: str, sums: int) -> None:
    """What attention adds; where a norm follows the feed-forward part, what that adds, too."""
    form = BERT["model"] | {"norm_position": norm_position}
    once, again = (
        make_plan(example({**BERT, "model": form, "parallel": {"tensor": 2, "recompute": how}}), 2)
        for how in ("none", "full")
    )
    assert again.stages[0].traffic.tensor - once.stages[0].traffic.tensor == 24 * 4 * sums * 64 * 64 * 4


def test_zero_3_fills_up_each_parameter() -> None:
    """The next-sentence head's pooler, matrix of two rows, and bias of two numbers: that becomes four on four ranks,
    each of which sends three quarters."""
    parallel = {"data": 4, "zero_stage": 3}
    apart = {"model": BERT["model"] | {"pair_head": False}, "objective": {"name": "masked"}}
    whole, less = (
        make_plan(example(form | {"parallel": parallel}), 4).stages[0].traffic.gradients for form in (BERT, apart)
    )
    assert whole - less == 6 * (64 * 64 + 64 + 2 * 64 + 4) * 4 * 3 // 4


def test_tied_embedding() -> None:
    matrix = 512 * 64 * 4
    assert [stage.traffic.tie for stage in plan(4, pipe=4, zero_stage=0).stages] == [matrix, 0, 0, matrix]
    assert [stage.traffic.tie for stage in plan(4, pipe=2, zero_stage=1).stages] == [matrix // 2] * 2
    assert plan(2).stages[0].traffic.tie == 0, "one stage holds it once"


def test_data_axis_of_a_plan() -> None:
    traffic = plan(2, zero_stage=3).stages[0].traffic
    parameters = num_parameters(example().model, padded=True)
    assert traffic.gradients == 12 * parameters * 4 // 2
    assert traffic.weights == 2 * 12 * (parameters + 512 * 64) * 4 // 2, "the tied matrix is gathered by both its users"
    assert traffic.total == traffic.gradients + traffic.weights


def test_a_second_copy_leaves_one_gather_per_step_between_the_parts() -> None:
    """Four data ranks, six micro-batches: each parameter once over all, and every other pass between two ranks."""
    plain = plan(4, zero_stage=3).stages[0]
    near = plan(4, zero_stage=3, gather_within=2).stages[0]
    parameters = num_parameters(example().model, padded=True)
    passes = 2 * 6 * (parameters + 512 * 64)  # the tied matrix is gathered by both its users
    assert near.traffic.weights == parameters * 4 * 3 // 4
    assert near.traffic.weights_within == (passes - parameters) * 4 // 2
    assert plain.traffic.weights == passes * 4 * 3 // 4
    assert plain.traffic.weights_within == 0
    second = parameters * 4 // 2
    assert near.memory.weights - plain.memory.weights == near.memory.total - plain.memory.total == second


def test_muon_exchanges_updates_with_the_owners_of_matrices() -> None:
    """48 D x D elements in fp32, each piece to its owner and back: by all ranks together (n-1)/n of all, twice."""
    whole = 4 * 12 * 64 * 64 * 4
    for parallel, along, across in (
        ({"zero_stage": 0, "data": 4}, 0, 0),  # every rank has the whole gradient
        ({"zero_stage": 1, "data": 4}, 2 * whole * 3 // 4 // 4, 0),
        ({"zero_stage": 3, "data": 2, "sequence": 2}, 2 * whole * 3 // 4 // 4, 0),
        ({"zero_stage": 1, "tensor": 2}, 0, 2 * whole // 2 // 2),
        ({"zero_stage": 1, "tensor": 2, "data": 2}, 2 * whole // 2 // 2 // 2, 2 * whole // 2 // 2 // 2),
    ):
        world = parallel.get("data", 1) * parallel.get("tensor", 1) * parallel.get("sequence", 1)
        adam, muon = (
            make_plan(example({"parallel": parallel, "optimizer": {"name": name}}), world).stages[0].traffic
            for name in ("adamw", "muon")
        )
        assert (muon.updates, muon.updates_across) == (along, across), parallel
        assert muon.total - adam.total == along + across
