from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.checkpoint.sections import Sections
from engine.errors import CheckpointError


@dataclass
class Counter:
    """A section whose state is one number."""

    name: str
    begins_anew: bool = False
    value: int = 0
    restored: list[Any] = field(default_factory=list)

    def state(self) -> dict[str, int]:
        return {"value": self.value}

    def restore(self, state: dict[str, int]) -> None:
        self.restored.append(state)
        self.value = state["value"]


def test_each_section_gets_its_own_state_again():
    saved = Sections(Counter("loader", value=3), Counter("ema", value=5)).state()
    assert saved == {"loader": {"value": 3}, "ema": {"value": 5}}
    ema, loader, told = Counter("ema"), Counter("loader"), []
    Sections(ema, loader).restore(saved, "step-9", told.append)  # the order of registration means nothing
    assert (loader.value, ema.value) == (3, 5)
    assert told == []


def test_a_section_that_an_older_checkpoint_lacks_begins_anew_and_is_told():
    old = Sections(Counter("loader", value=3)).state()
    loader, replay = Counter("loader"), Counter("replay", begins_anew=True, value=7)
    told: list[str] = []
    Sections(loader, replay).restore(old, "step-9", told.append)
    assert (loader.value, replay.value, replay.restored) == (3, 7, [])
    assert told == ["step-9 has no section replay: that part of the run begins anew"]


def test_a_section_that_is_needed_and_absent_is_an_error_before_anything_is_restored():
    loader, progress = Counter("loader"), Counter("progress")
    with pytest.raises(CheckpointError, match="step-9 has no section progress") as caught:
        Sections(loader, progress).restore({"loader": {"value": 3}}, "step-9", print)
    assert caught.value.allowed == "a checkpoint with the sections loader, progress"
    assert loader.restored == []


def test_a_section_that_nobody_registered_is_told():
    told: list[str] = []
    Sections(Counter("loader")).restore({"loader": {"value": 3}, "fisher": {}}, "step-9", told.append)
    assert told == ["step-9 has a section fisher that no part of this run keeps: it is dropped"]


def test_two_sections_of_one_name_are_a_programmers_error():
    with pytest.raises(AssertionError, match="two parts of the run keep the section 'loader'"):
        Sections(Counter("loader"), Counter("loader"))
