"""Rules about memory and about ranks that share a row's time."""

from __future__ import annotations

from engine.config.resolve import check
from engine.config.schema import Duration
from engine.plan.composition import example, problems_of


def test_ranks_that_share_a_row_divide_its_length() -> None:
    config = example({"parallel": {"tensor": 4, "sequence_parallel": True}})
    assert not check(config)
    odd = config.stages[0].model_copy(update={"sequence_length": 62, "duration": Duration(steps=1)})
    (problem,) = check(config.model_copy(update={"stages": (odd,)}))
    assert "parallel.tensor = 4 with sequence_parallel does not divide stages.0.sequence_length = 62" in str(problem)


def test_one_tensor_rank_shares_with_nobody() -> None:
    assert not problems_of({"parallel": {"tensor": 1, "sequence_parallel": True}})
    assert example({"parallel": {"tensor": 1, "sequence_parallel": True}}).parallel.shared_by == 1
