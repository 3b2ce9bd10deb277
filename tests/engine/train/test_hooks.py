"""Hooks are called in their order, and what one of them answers is heard."""

from __future__ import annotations

from typing import Any, cast

import pytest

from engine.train.hooks import Hook, Hooks, Run, Update

RUN = cast("Run", None)
UPDATE = Update(0, 0, 1.0, 1.0, 1e-3, lambda: iter(()))


class Noted(Hook):
    """Notes its calls in a list that hooks share, and answers as it was told."""

    def __init__(self, name: str, calls: list[str], answers: bool = False, accepts: bool = True) -> None:
        self.name, self.calls, self.answers, self.accepts = name, calls, answers, accepts

    def _note(self, point: str) -> bool:
        self.calls.append(f"{point} {self.name}")
        return self.answers

    def start(self, run: Run) -> bool:
        return self._note("start")

    def begin_run_stage(self, run: Run) -> None:
        self._note("begin")

    def end_run_stage(self, run: Run) -> None:
        self._note("end")

    def before_update(self, run: Run, update: Update) -> bool:
        self._note("before")
        return self.accepts

    def after_step(self, run: Run) -> Any:
        self._note("after")
        return {self.name: 1, "last": float(ord(self.name))}

    def take_record(self, record: Any) -> None:
        self._note("take")

    def roll_back(self, run: Run) -> bool:
        return self._note("roll back")

    def after_rollback(self, run: Run) -> None:
        self._note("rolled back")

    def between_steps(self, run: Run) -> bool:
        return self._note("between")

    def close(self) -> None:
        self._note("close")


def test_every_point_calls_all_hooks_in_order_and_close_goes_backwards():
    calls: list[str] = []
    hooks = Hooks([Noted(name, calls) for name in "ab"])
    assert not hooks.start(RUN)
    hooks.begin_run_stage(RUN)
    assert hooks.before_update(RUN, UPDATE)
    assert hooks.after_step(RUN) == {"a": 1, "b": 1, "last": float(ord("b"))}
    hooks.take_record({"step": 1})
    assert not hooks.roll_back(RUN)
    hooks.after_rollback(RUN)
    assert not hooks.between_steps(RUN)
    hooks.end_run_stage(RUN)
    hooks.close()
    points = ("start", "begin", "before", "after", "take", "roll back", "rolled back", "between", "end")
    assert calls == [f"{point} {name}" for point in points for name in "ab"] + ["close b", "close a"]


def test_an_update_needs_every_hook_and_each_is_asked():
    calls: list[str] = []
    hooks = Hooks([Noted("a", calls, accepts=False), Noted("b", calls)])
    assert not hooks.before_update(RUN, UPDATE)
    assert calls == ["before a", "before b"]


@pytest.mark.parametrize("point", ["start", "roll_back", "between_steps"])
def test_a_stop_or_a_rollback_ends_the_round(point):
    calls: list[str] = []
    hooks = Hooks([Noted("a", calls, answers=True), Noted("b", calls)])
    assert getattr(hooks, point)(RUN)
    assert len(calls) == 1


class Keeps(Hook):
    section = "kept"

    def __init__(self) -> None:
        self.value = 0

    def state(self) -> dict[str, Any]:
        return {"value": self.value}

    def restore(self, state: Any) -> None:
        self.value = state["value"]


def test_a_section_comes_back_to_its_hook_and_a_checkpoint_without_it_leaves_the_hook_new():
    hook = Keeps()
    hooks = Hooks([Hook(), hook])
    hook.value = 7
    sections = hooks.sections()
    assert sections == {"kept": {"value": 7}}
    again = Keeps()
    Hooks([again]).restore(sections)
    assert again.value == 7
    Hooks([again]).restore({"other": {}})
    assert again.value == 7


def test_two_hooks_cannot_keep_the_same_section():
    with pytest.raises(AssertionError, match="kept"):
        Hooks([Keeps(), Keeps()])
