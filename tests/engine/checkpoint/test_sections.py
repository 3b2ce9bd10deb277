from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.checkpoint.sections import Sections
from engine.errors import CheckpointError


@dataclass
class Counter:
    """A section whose state is one number."""

    value: int = 0
    restored: list[Any] = field(default_factory=list)

    def state(self) -> dict[str, int]:
        return {"value": self.value}

    def restore(self, state: dict[str, int]) -> None:
        self.restored.append(state)
        self.value = state["value"]


def sections(**parts: Counter) -> Sections:
    """Sections of these names; those whose name begins with "new" may be absent."""
    made = Sections()
    for name, part in parts.items():
        made.register(name, part, begins_anew=name.startswith("new"))
    return made


def test_each_section_gets_its_own_state_again():
    saved = sections(loader=Counter(3), ema=Counter(5)).state()
    assert saved == {"loader": {"value": 3}, "ema": {"value": 5}}
    ema, loader, told = Counter(), Counter(), []
    sections(ema=ema, loader=loader).restore(saved, "step-9", told.append)  # the order of registration means nothing
    assert (loader.value, ema.value) == (3, 5)
    assert told == []


def test_a_section_that_an_older_checkpoint_lacks_begins_anew_and_is_told():
    told: list[str] = []
    loader, replay = Counter(), Counter(7)
    sections(loader=loader, new_replay=replay).restore({"loader": {"value": 3}}, "step-9", told.append)
    assert (loader.value, replay.value, replay.restored) == (3, 7, [])
    assert told == ["step-9 has no section new_replay: that part of the run begins anew"]


def test_a_section_that_is_needed_and_absent_is_an_error_before_anything_is_restored():
    loader = Counter()
    with pytest.raises(CheckpointError, match="step-9 has no section progress") as caught:
        sections(loader=loader, progress=Counter()).restore({"loader": {"value": 3}}, "step-9", print)
    assert caught.value.allowed == "a checkpoint with the sections loader, progress"
    assert loader.restored == []


def test_a_section_that_nobody_registered_is_told():
    told: list[str] = []
    sections(loader=Counter()).restore({"loader": {"value": 3}, "fisher": {}}, "step-9", told.append)
    assert told == ["step-9 has a section fisher that no part of this run keeps: it is dropped"]


def test_two_sections_of_one_name_are_a_programmers_error():
    made = sections(loader=Counter())
    with pytest.raises(AssertionError, match="two parts of the run keep the section 'loader'"):
        made.register("loader", Counter())
