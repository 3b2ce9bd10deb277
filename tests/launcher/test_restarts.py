"""Whether to start again, and on which ranks."""

from pathlib import Path

import pytest

from engine.plan.composition import example
from launcher.commands import Node, Wanted
from launcher.restarts import Restarts, next_attempt
from launcher.verdict import Verdict

KILLED = Verdict(1, "failed", step=7, lost=frozenset((2,)), cause="killed by SIGKILL")
RAISED = Verdict(1, "failed", step=7, cause="a rank: bad shard")


def wanted(world_size: int = 4) -> Wanted:
    return Wanted(Path("RUN.yaml"), ("seed=1",), Path("run"), "local", world_size, "job", 1000)


@pytest.mark.parametrize("code", [0, 85])
def test_what_ended_well_is_not_started_again(code: int) -> None:
    assert Restarts(3).refusal(Verdict(code, "")) == ""


def test_no_restarts_unless_asked_for() -> None:
    assert Restarts(0).refusal(RAISED) == ""


def test_a_mistake_stays_one() -> None:
    assert Restarts(3).refusal(Verdict(2, "typo", cause="typo")) == "not restarted"


def test_restarts_are_counted() -> None:
    restarts = Restarts(2)
    assert restarts.refusal(Verdict(1, "", step=1, cause="a")) is None
    assert restarts.refusal(Verdict(1, "", step=2, cause="a")) is None
    assert restarts.refusal(Verdict(1, "", step=3, cause="a")) == "not restarted: all 2 restarts are used up"
    assert restarts.used == 2


def test_the_same_failure_at_the_same_step_is_the_last() -> None:
    restarts = Restarts(9)
    assert restarts.refusal(RAISED) is None
    assert restarts.refusal(KILLED) is None, "another cause"
    assert restarts.refusal(RAISED) is None, "not twice in a row"
    refusal = restarts.refusal(RAISED)
    assert refusal == "not restarted: step 7 has failed twice in the same way, and would again"


def test_a_run_that_was_asked_to_stop_is_not_started_again() -> None:
    refusal = Restarts(9).refusal(Verdict(1, "", cause="a", stopping=True))
    assert refusal == "not restarted: it was asked to stop"


def test_an_exception_loses_no_rank() -> None:
    node = Node(range(4))
    again, node_again, world = next_attempt(example(), ("seed=1",), wanted(), node, RAISED, 2000)
    assert world is None
    assert (again.world_size, again.attempt, again.master_port) == (4, 1, 2000)
    assert node_again == node
    assert again.overrides == ("seed=1",)


def test_a_killed_rank_takes_its_device_along_and_the_data_axis_shrinks() -> None:
    before, node = wanted(8), Node(range(8), num_gpus=8, devices=tuple("01234567"))
    run = example({"parallel": {"pipe": 2, "micro_batch_size": 2}})
    again, node, world = next_attempt(run, ("seed=1",), before, node, KILLED, 2000)
    assert world is not None
    assert str(world.layout) == "pipe 2 x data 3 x sequence 1 x tensor 1"
    assert (again.world_size, node.ranks) == (6, range(6))
    assert node.devices == tuple("013456"), "the lost one and one that no layout needs"
    assert again.overrides == ("seed=1", "parallel.data=3")
    once_more, node, _ = next_attempt(run, ("seed=1",), again, node, KILLED, 3000)
    assert once_more.overrides == ("seed=1", "parallel.data=2")
    assert (once_more.world_size, once_more.attempt) == (4, 2)
    assert node.devices == tuple("0145")


def test_where_no_smaller_world_is_valid_it_stays() -> None:
    run = example({"parallel": {"pipe": 4}})
    again, node, world = next_attempt(run, (), wanted(), Node(range(4)), KILLED, 2000)
    assert world is None
    assert (again.world_size, node.ranks) == (4, range(4))
