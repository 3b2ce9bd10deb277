"""Sections of a checkpoint: what the parts of a run keep over a restart, as JSON, registered by name.

A part of a run (a hook, say) registers a `Section`, so that checkpoints know no part and parts no checkpoint. A save
asks every section for its state, a load hands each its own again. What a checkpoint lacks, or holds and nobody asks
for, is told: neither may pass in silence. Sharded tensors are moments of a parameter shard, no section.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from engine.errors import CheckpointError


class Section(Protocol):
    """One part of a run that keeps something in checkpoints."""

    def state(self) -> Any:
        """Return JSON, equal on every rank."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from what `state` returned when the checkpoint was saved."""
        ...


class Sections:
    """The registered sections of a run by name, in the order of registration."""

    def __init__(self) -> None:
        self._sections: dict[str, Section] = {}
        self._new: set[str] = set()

    def register(self, name: str, section: Section, begins_anew: bool = False) -> None:
        """Add a section under a name that is free.

        With `begins_anew` a checkpoint without it can be loaded: the part of the run then begins as in a new run.
        """
        assert name not in self._sections, f"two parts of the run keep the section {name!r}"
        self._sections[name] = section
        if begins_anew:
            self._new.add(name)

    def state(self) -> dict[str, Any]:
        """Return every section's state by name."""
        return {name: section.state() for name, section in self._sections.items()}

    def restore(self, saved: Mapping[str, Any], checkpoint: object, tell: Callable[[str], object]) -> None:
        """Hand every section its state.

        `checkpoint` is where `saved` is from, for messages. `tell` takes a sentence about each section that only one
        side has.

        Raises:
            CheckpointError: the checkpoint lacks sections that cannot begin anew; nothing is restored then.
        """
        # First, so that nothing is restored where something is missing.
        check_sections(saved, [name for name in self._sections if name not in self._new], checkpoint)
        for name in sorted(self._sections.keys() - saved.keys()):
            tell(f"{checkpoint} has no section {name}: that part of the run begins anew")
        for name in sorted(saved.keys() - self._sections.keys()):
            tell(f"{checkpoint} has a section {name} that no part of this run keeps: it is dropped")
        for name, section in self._sections.items():
            if name in saved:
                section.restore(saved[name])


def check_sections(saved: Mapping[str, Any], needed: Collection[str], checkpoint: object) -> None:
    """Raise `CheckpointError` where a checkpoint lacks a section without which no run can go on."""
    absent = [name for name in needed if name not in saved]
    if absent:
        raise CheckpointError(
            f"{checkpoint} has no section {', '.join(absent)}",
            f"a checkpoint with the sections {', '.join(needed)}",
            "use a checkpoint that `palimpsest train` has saved; one of weights alone serves convert and generate",
        )
