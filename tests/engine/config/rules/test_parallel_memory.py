"""Rules about memory and about ranks that share a row's time."""

from __future__ import annotations

from engine.config.resolve import check
from engine.config.schema.stage import Duration
from engine.plan.composition import example, problems_of


def test_ranks_that_share_a_row_divide_its_length() -> None:
    config = example({"parallel": {"tensor": 4, "sequence_parallel": True}})
    assert not check(config)
    odd = config.stages[0].model_copy(update={"sequence_length": 62, "duration": Duration(steps=1)})
    (problem,) = check(config.model_copy(update={"stages": (odd,)}))
    assert "stages.0.sequence_length = 62 does not divide by the 4 ranks that share the time of a row" in str(problem)


def test_every_family_shares_the_time_of_its_rows() -> None:
    t5 = {"family": "t5", "norm": "rmsnorm", "bias": False}
    for parallel in ({"tensor": 2, "sequence_parallel": True}, {"sequence": 4}):
        assert not problems_of({"model": t5, "objective": {"name": "span_corruption"}, "parallel": parallel})
        assert not problems_of({"model": {"family": "bert"}, "objective": {"name": "masked"}, "parallel": parallel})


def test_ranks_that_exchange_heads_divide_them() -> None:
    """Four heads: two tensor ranks leave two each; three ranks divide neither the heads nor the rows of 64."""
    assert not problems_of({"parallel": {"tensor": 2, "sequence": 2}})
    heads, length = problems_of({"parallel": {"sequence": 3}})
    assert "tensor 1 x sequence 3 does not divide the 4 key/value heads" in str(heads)
    assert "stages.0.sequence_length = 64 does not divide by the 3 ranks" in str(length)
    (grouped,) = problems_of({"parallel": {"sequence": 4}, "model": {"num_kv_heads": 2}})
    assert "does not divide the 2 key/value heads" in str(grouped)


def test_one_tensor_rank_shares_with_nobody() -> None:
    assert not problems_of({"parallel": {"tensor": 1, "sequence_parallel": True}})
    assert example({"parallel": {"tensor": 1, "sequence_parallel": True}}).parallel.shared_by == 1


def test_offload_needs_what_zero_shards_and_the_host_updates() -> None:
    offload = {"parallel": {"offload": "optimizer"}}
    assert not problems_of(offload)
    (whole,) = problems_of(offload, {"parallel": {"offload": "optimizer", "zero_stage": 0}})
    assert "parallel.offload = optimizer with parallel.zero_stage = 0" in whole.wrong
    assert "parallel.zero_stage=1" in whole.remedy
    (muon,) = problems_of(offload, {"optimizer": {"name": "muon"}})
    assert "parallel.offload = optimizer with optimizer.name = muon" in muon.wrong
    assert muon.allowed == "offload with adamw"
