"""What ranks compare when they meet: threads for ranks, over the store that torch keeps in one process."""

import json
import threading
from datetime import timedelta
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore

from engine.errors import EXIT_USAGE, EnvironmentProblem
from engine.parallel import meeting
from engine.parallel.groups import Group
from engine.parallel.meeting import Disagreement, agree, agree_over, compare, told
from tests.engine.checkpoint.threads import ThreadedRanks

FACTS = {"job": "13", "step": "0", "world size": 4, "optimizer.learning_rate": 1e-3, "seed": 1}
WAIT_SECONDS = 30


@pytest.fixture(autouse=True)
def short_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "SETTLE_SECONDS", 1.0)
    monkeypatch.setattr(meeting, "POLL_SECONDS", 0.001)


def meet(*ranks: tuple[int, dict[str, Any], str], world_size: int = 4) -> list[Exception | None]:
    """How a meeting ends for each of these (global rank, facts, GPU)."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=WAIT_SECONDS))
    ends: list[Exception | None] = [None] * len(ranks)

    def one(number: int) -> None:
        global_rank, facts, gpu = ranks[number]
        try:
            agree(PrefixStore("start", store), global_rank, world_size, facts, WAIT_SECONDS, gpu)
        except Exception as error:
            ends[number] = error

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()
    return ends


def everyones(ends: list[Exception | None]) -> str:
    """What all ranks raise alike."""
    assert {type(error) for error in ends} == {Disagreement}
    (said,) = {str(error) for error in ends}
    return said


def test_ranks_that_agree_go_on() -> None:
    assert meet(*((rank, dict(FACTS), f"GPU-{rank}") for rank in range(4))) == [None] * 4
    assert meet((0, FACTS, ""), world_size=1) == [None]


def test_all_end_with_who_differs_from_rank_0_in_what() -> None:
    other = FACTS | {"optimizer.learning_rate": 2e-3}
    said = everyones(meet((0, FACTS, ""), (1, other, ""), (2, FACTS | {"step": "1"}, ""), (3, other, "")))
    assert said.splitlines()[:3] == [
        "ranks of one world were started differently:",
        "  optimizer.learning_rate: 0.001 on rank 0, 0.002 on ranks 1, 3",
        "  step: 0 on rank 0, 1 on rank 2",
    ]
    assert "allowed: one job, step, attempt" in said
    assert "to do: start all ranks by one command" in said
    assert Disagreement.exit_code == EXIT_USAGE


@pytest.mark.parametrize("name", FACTS)
def test_every_fact_counts_on_whichever_side_it_is_missing(name: str) -> None:
    without = {key: value for key, value in FACTS.items() if key != name}
    for first, second in ((FACTS, without), (without, FACTS)):
        assert f"{name}: " in everyones(meet((0, first, ""), (1, second, ""), world_size=2))


def test_ranks_of_worlds_of_two_sizes_do_not_wait_for_those_that_never_come() -> None:
    larger = FACTS | {"world size": 8}
    said = everyones(meet((0, FACTS, ""), (1, FACTS, ""), (5, larger, "")))
    assert "world size: 4 on rank 0, 8 on rank 5" in said


def test_a_rank_that_comes_twice_is_of_another_start_and_harms_nobody() -> None:
    ends = meet((0, FACTS, ""), (1, FACTS, ""), (1, FACTS, ""), world_size=2)
    (error,) = [end for end in ends if end is not None]
    assert isinstance(error, EnvironmentProblem)
    assert error.wrong.startswith("rank 1 of 2 has met the others already")
    assert ends[0] is None


def test_two_ranks_on_one_gpu_are_named() -> None:
    ranks = [(rank, FACTS, gpu) for rank, gpu in enumerate(("GPU-a", "GPU-b", "GPU-c", "GPU-d"))]
    assert meet(*ranks) == [None] * 4
    said = everyones(meet(*ranks[:2], (2, FACTS, "GPU-b"), ranks[3]))
    assert "GPU GPU-b of rank " in said
    assert ("of rank 1 is used by rank 2, too" in said) != ("of rank 2 is used by rank 1, too" in said)


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    with pytest.raises(EnvironmentProblem) as caught:
        agree(store, 0, 3, FACTS, limit_seconds=0.01)
    assert caught.value.wrong == "ranks 1, 2 of 3 have not come after 0 s"


def test_values_are_compared_as_they_travel() -> None:
    """A tuple is a list behind JSON, and numbers keep all their digits."""
    assert meet((0, {"betas": (0.9, 1 / 3)}, ""), (1, {"betas": [0.9, 1 / 3]}, ""), world_size=2) == [None, None]
    assert compare({"x": 0.1 + 0.2}, json.loads(json.dumps({"x": 0.3}))) == [("x", 0.3, 0.1 + 0.2)]


def test_a_configuration_that_differs_everywhere_is_not_printed_whole() -> None:
    said = str(told([(1, [(f"key.{number:03}", 0, 1) for number in range(100)])]))
    assert said.count("on rank 1") == meeting.SHOWN
    assert "and 80 more" in said


def test_over_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ThreadedRanks(monkeypatch)
    group = [Group((0, 1, 2), rank) for rank in range(3)]
    assert ranks.run(3, lambda rank: agree_over(group[rank], FACTS)) == [None] * 3
    errors = ranks.run(3, lambda rank: agree_over(group[rank], FACTS | {"seed": int(rank == 1)}))
    assert {type(error) for error in errors} == {Disagreement}
    assert {error.wrong for error in errors} == {
        "ranks of one world were started differently:\n  seed: 0 on rank 0, 1 on rank 1"
    }
