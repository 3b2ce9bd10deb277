"""The comparison of planned with measured memory at toy size: figures by rank, and a hook that counts right."""

import json

import pytest
import torch

from bench import memory, ranks_memory


@pytest.mark.parametrize(
    ("only", "worlds"),
    [
        (["bf16, pipe 2"], [2]),
        pytest.param(["BERT", "T5", "bf16, pipe 2", "offload"], [2, 1, 1, 1], marks=pytest.mark.matrix),
    ],
    ids=["one", "more"],
)
def test_cases_are_measured_and_written(tmp_path, only, worlds):
    output = tmp_path / "memory.json"
    memory.main(small=True, only=only, output=output)
    cases = json.loads(output.read_text())["cases"]
    assert [len(case["ranks"]) for case in cases.values()] == worlds
    for case in cases.values():
        for rank in case["ranks"]:
            plan, measured = rank["plan"], rank["measured"]
            held = plan["states"] + (plan["host"] if plan["master"] == 0 else 0)  # on a CPU the host is the device
            assert abs(measured["states"] / held - 1) < 0.05, "the model states are no estimate"
            assert measured["peak"] > measured["states"]
            assert measured["resident"] > measured["resident_before"] > measured["peak"]
            assert rank["plan_over_tensors"] == plan["total"] / measured["peak"]
    one, other = cases["GPT-2, ZeRO-1, bf16, pipe 2"]["ranks"]
    assert one["plan"]["logits"] == 0 < other["plan"]["logits"], "each rank is held against its own stage"


def test_the_hook_counts_what_lives():
    """A buffer of 4 MB before the mark; after it two more, of which one is freed before a third comes."""

    def work() -> torch.Tensor:
        held = torch.ones(1000, 1000)
        with torch.profiler.record_function(ranks_memory.BUILT):
            pass
        other = held + held
        second = other + held
        del other
        return second + held

    found, made = ranks_memory.hooked(work)
    assert found == (4_000_000, 12_000_000, 4_000_000)
    assert made.sum() == 4_000_000
