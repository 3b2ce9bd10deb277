"""Rules of pipeline and ZeRO, each broken by itself."""

import pytest

from engine.plan.composition import problems_of


@pytest.mark.parametrize(
    ("parallel", "wrong", "allowed"),
    [
        ({"virtual_stages": 2}, "parallel.virtual_stages = 2 with parallel.pipe = 1", "virtual_stages 1"),
        (
            {"pipe": 2, "virtual_stages": 3},
            "parallel.pipe = 2 x parallel.virtual_stages = 3 are more parts than model.num_layers = 4",
            "virtual_stages 1 to 2",
        ),
        (
            {"pipe": 2, "virtual_stages": 2, "schedule": "gpipe"},
            "parallel.virtual_stages = 2 with parallel.schedule = gpipe",
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
        ({"pipe": 5, "virtual_stages": 2}, "parallel.pipe = 5 is more than model.num_layers = 4", "1 to 4"),
    ],
)
def test_each_rule(parallel: dict, wrong: str, allowed: str) -> None:
    (problem,) = problems_of({"parallel": parallel})
    assert problem.wrong.startswith(wrong)
    assert allowed in problem.allowed


def test_what_fits() -> None:
    for pipe, virtual_stages in ((2, 1), (2, 2), (4, 1)):
        assert not problems_of({"parallel": {"pipe": pipe, "virtual_stages": virtual_stages}})
    for zero_stage, keys in ((0, {"reduce": "step"}), (2, {"reduce": "step"}), (3, {"gather": "step"})):
        assert not problems_of({"parallel": {"zero_stage": zero_stage, **keys}})
        assert not problems_of(
            {"parallel": {"zero_stage": zero_stage, "pipe": 2, "schedule": "zb-h1", "reduce": "step"}}
        )
