"""Rules of pipeline and ZeRO, each broken by itself."""

from typing import Any

import pytest

from engine.plan.composition import problems_of


@pytest.mark.parametrize(
    ("parallel", "wrong", "allowed"),
    [
        ({"chunks_per_stage": 2}, "parallel.chunks_per_stage = 2 with parallel.pipe = 1", "chunks_per_stage 1"),
        (
            {"pipe": 2, "chunks_per_stage": 3},
            "parallel.pipe = 2 x parallel.chunks_per_stage = 3 are more chunks than model.num_layers = 4",
            "chunks_per_stage 1 to 2",
        ),
        (
            {"pipe": 2, "chunks_per_stage": 2, "schedule": "gpipe"},
            "parallel.chunks_per_stage = 2 with parallel.schedule = gpipe",
            "schedule 1f1b",
        ),
        (
            {"pipe": 2, "schedule": "zb-h1", "zero_stage": 3},
            "parallel.schedule = zb-h1 with ZeRO-2 or 3 that reduces per micro-batch",
            "or with reduce step",
        ),
        ({"zero_stage": 2, "gather": "step"}, "parallel.gather = step with parallel.zero_stage = 2", "zero_stage 3"),
        (
            {"zero_stage": 1, "reduce": "micro_batch"},
            "parallel.reduce = micro_batch with parallel.zero_stage = 1",
            "step or micro_batch with 2 and 3",
        ),
        ({"pipe": 5}, "parallel.pipe = 5 is more than model.num_layers = 4", "1 to 4"),
        ({"pipe": 5, "chunks_per_stage": 2}, "parallel.pipe = 5 is more than model.num_layers = 4", "1 to 4"),
    ],
)
def test_each_rule(parallel: dict, wrong: str, allowed: str) -> None:
    (problem,) = problems_of({"parallel": parallel})
    assert problem.wrong.startswith(wrong)
    assert allowed in problem.allowed


def test_what_fits() -> None:
    for pipe, chunks_per_stage in ((2, 1), (2, 2), (4, 1)):
        assert not problems_of({"parallel": {"pipe": pipe, "chunks_per_stage": chunks_per_stage}})
    for zero_stage, keys in ((0, {"reduce": "step"}), (2, {"reduce": "step"}), (3, {"gather": "step"})):
        assert not problems_of({"parallel": {"zero_stage": zero_stage, **keys}})
        assert not problems_of(
            {"parallel": {"zero_stage": zero_stage, "pipe": 2, "schedule": "zb-h1", "reduce": "step"}}
        )


@pytest.mark.parametrize(
    ("parallel", "wrong", "allowed"),
    [
        ({"zero_stage": 2, "data": 4}, "weights stay whole", "gather_within with zero_stage 3"),
        ({"zero_stage": 3, "data": 4, "gather": "step"}, "each weight is gathered once", "for every micro-batch"),
        ({"zero_stage": 3, "data": 2}, "cut the 2 data x sequence ranks", "no gather_within with so few ranks"),
        ({"zero_stage": 3, "data": 3}, "cut the 3 data x sequence ranks", "no gather_within with so few ranks"),
        ({"zero_stage": 3, "data": 12, "gather_within": 5}, "cut the 12 data", "one of 2, 3, 4, 6"),
    ],
)
def test_a_second_copy_lies_between_some_of_zero_3s_ranks(parallel: dict[str, Any], wrong: str, allowed: str) -> None:
    (problem,) = problems_of({"parallel": {"gather_within": 2} | parallel})
    assert "parallel.gather_within = " in problem.wrong
    assert wrong in problem.wrong
    assert allowed in problem.allowed
    assert problem.remedy


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "sequence": 2}, {"data": 4, "tensor": 2, "pipe": 2}])
def test_a_second_copy_goes_with_every_axis(axes: dict[str, int]) -> None:
    assert not problems_of({"parallel": {"zero_stage": 3, "gather_within": 2} | axes})
