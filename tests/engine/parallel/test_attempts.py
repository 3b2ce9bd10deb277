"""Numbers of attempts under torchrun: threads for ranks, over a store that outlives them as that of an agent does."""

import threading
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore

from engine.errors import EnvironmentProblem
from engine.parallel.attempts import agree_on_attempt

WAIT_SECONDS = 60


@pytest.fixture
def store() -> HashStore:
    made = HashStore()
    made.set_timeout(timedelta(seconds=WAIT_SECONDS))
    return made


def attempts(store: HashStore, *counts: int) -> list[int]:
    """Return the attempt that each rank of a world is told, where its agent has counted so many restarts."""
    found = [-1] * len(counts)

    def one(rank: int) -> None:
        found[rank] = agree_on_attempt(store, rank, len(counts), counts[rank], WAIT_SECONDS)

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()
    return found


def test_all_ranks_have_one_number_and_it_grows(store: HashStore) -> None:
    assert attempts(store, 0, 0) == [0, 0]
    # The agent of rank 1 has restarted it, that of rank 0 has only seen that it is waited for.
    assert attempts(store, 0, 1) == [1, 1]
    assert attempts(store, 1, 1) == [2, 2], "each agent has begun one restart: its count alone says 1 again"
    assert attempts(store, 7, 0, 2) == [7, 7, 7], "a newer attempt has saved in the run folder: rank 0 says so"
    assert attempts(store, 0) == [8]


def test_questions_of_ranks_that_have_ended_are_of_no_account(store: HashStore) -> None:
    # Two ranks asked while there was no rank 0, and were ended with their attempt.
    for _ in range(2):
        store.add("asked", 1)
    assert attempts(store, 0, 0, 0) == [0, 0, 0]


def test_a_rank_that_hears_twice_counts_once(store: HashStore) -> None:
    """A process whose agent was killed may ask beside its successor, and rank 0 must still wait for the others."""
    found: dict[str, int] = {}

    def started(name: str, rank: int) -> threading.Thread:
        def one() -> None:
            found[name] = agree_on_attempt(store, rank, 3, 0, WAIT_SECONDS)

        thread = threading.Thread(target=one, daemon=True)
        thread.start()
        return thread

    first = started("rank 0", 0)
    for thread in (started("orphan of rank 1", 1), started("rank 1", 1)):
        thread.join(WAIT_SECONDS)
    for thread in (started("rank 2", 2), first):
        thread.join(WAIT_SECONDS)
    assert found == dict.fromkeys(("rank 0", "orphan of rank 1", "rank 1", "rank 2"), 0)


def test_a_rank_whose_agent_ended_meanwhile_leaves_unheard(store: HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its successor asks, too: rank 0 must not leave before that one has its answer."""
    store.set("answer/1", "5")
    parents = iter([4321, 1])
    monkeypatch.setattr("os.getppid", lambda: next(parents))
    with pytest.raises(EnvironmentProblem, match="torchrun's agent of rank 1 has ended"):
        agree_on_attempt(store, 1, 2, 0, WAIT_SECONDS)
    assert store.add("heard/5", 0) == 0


def test_ranks_that_do_not_come_are_counted(store: HashStore) -> None:
    with pytest.raises(EnvironmentProblem, match="1 of 3 ranks have come after 0 s"):
        agree_on_attempt(store, 0, 3, 0, limit_seconds=0.2)
