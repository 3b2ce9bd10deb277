"""Verdicts over outcomes and exit codes."""

from dataclasses import replace

import pytest

from engine.outcome import Outcome
from launcher.verdict import End, Lost, NodeReport, judge

ALL_WELL = (End("rank-0", 0), End("rank-1", 0))


def failed(end: End) -> NodeReport:
    return NodeReport((end,), end)


@pytest.mark.parametrize(
    ("outcome", "gone", "words"),
    [
        (Outcome("job", 0, 1, 3, 0, "bad shard"), (), "failed at step 3: rank 0 first: bad shard"),
        (Outcome("job", 0, 1, 3, 0, "bad shard"), (0,), "failed at step 3: rank 0 first: bad shard"),
        (
            Outcome("job", 0, 1, 3, 0, "closed"),
            (2, 1),
            "failed at step 3: rank 1, 2 was gone already, without a word; rank 0 then: closed",
        ),
        (Outcome("job", 0, 1, 3, 0, "rank 1: bad shard"), (1,), "failed at step 3: rank 1: bad shard"),
        (Outcome("job", 0, 2, 0, None, "typo"), (), "failed at step 0: typo"),
    ],
)
def test_failures_that_were_said(outcome: Outcome, gone: tuple[int, ...], words: str) -> None:
    verdict = judge(outcome, NodeReport(ALL_WELL, gone=frozenset(gone)), "job")
    assert (verdict.code, verdict.words) == (outcome.code, words)


def test_exit_codes_come_second() -> None:
    verdict = judge(Outcome("job", 0, 85, 3), failed(End("launcher", 1)), "job")
    assert verdict.code == 85
    assert judge(Outcome("job", 0, 0, 3), NodeReport((End("launcher", -15),)), "job").words == (
        "done at step 3; after that launcher was killed by SIGTERM"
    )


@pytest.mark.parametrize(
    ("said", "whose"),
    [
        (Outcome("13", 0, 0, 40), "attempt 0 of this job"),
        (Outcome("13", 2000, 85, 40), "attempt 2000 of this job"),
        (Outcome("14", 1000, 0, 40), "job 14"),
    ],
)
def test_an_outcome_of_another_job_or_attempt_says_nothing(said: Outcome, whose: str) -> None:
    killed = failed(End("rank-0", -9))
    verdict = judge(said, killed, "13", attempt=1000)
    assert verdict.code == 1
    assert verdict.words.startswith(
        f"failed: rank-0 was killed by SIGKILL; the outcome in the run folder belongs to {whose}"
    )
    lost = Lost(frozenset((0,)), "rank 0 was killed by SIGKILL", 3, "killed by SIGKILL")
    assert judge(said, replace(killed, lost=lost), "13", attempt=1000).lost == {0}


@pytest.mark.parametrize("code", [0, 1, 2, 85, -9])
def test_a_launchers_exit_code_alone_is_never_success(code: int) -> None:
    verdict = judge(None, NodeReport((End("launcher", code),)), "job")
    assert verdict.code == 1
    assert "no rank has said how the run ended" in verdict.words


def test_a_rank_that_lost_a_neighbour_is_not_the_one_that_was_lost() -> None:
    """As the trainer words it (`engine.train.failures`): it must not read like an error that all ranks agreed on."""
    from engine.train.failures import translate_error

    told = str(translate_error(RuntimeError("Connection closed by peer"), global_rank=0, step=3))
    verdict = judge(Outcome("job", 0, 1, 3, 0, told), NodeReport((End("launcher", 1),), gone=frozenset((1,))), "job")
    assert verdict.lost == {1}
    assert verdict.words.startswith("failed at step 3: rank 1 was gone already, without a word; rank 0 then: lost a")
