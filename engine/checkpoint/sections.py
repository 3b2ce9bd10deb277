"""Sections of a checkpoint: what the parts of a run keep over a restart, as JSON, registered by name.

A part of a run (the loader, a hook) registers a `Section`, so that checkpoints know no part and parts no checkpoint.
A save asks every section for its state, a load hands each its own again. What a checkpoint lacks, or holds and nobody
asks for, is told: neither may pass in silence. Sharded tensors are moments of a parameter shard, no section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from engine.errors import CheckpointError


class Section(Protocol):
    """One part of a run that keeps something in checkpoints."""

    name: str
    """Key in the manifest's `sections`."""
    begins_anew: bool
    """True if a checkpoint without this section can be loaded: the part then begins as in a new run."""

    def state(self) -> Any:
        """Return JSON, equal on every rank."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from what `state` returned when the checkpoint was saved."""
        ...


class Sections:
    """The registered sections of a run, in the order of registration."""

    def __init__(self, *sections: Section) -> None:
        self._sections: dict[str, Section] = {}
        for section in sections:
            self.register(section)

    def register(self, section: Section) -> None:
        """Add a section; its name must be free."""
        assert section.name not in self._sections, f"two parts of the run keep the section {section.name!r}"
        self._sections[section.name] = section

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
        absent = [name for name in self._sections if name not in saved]
        needed = [name for name in absent if not self._sections[name].begins_anew]
        if needed:
            raise CheckpointError(
                f"{checkpoint} has no section {', '.join(needed)}",
                f"a checkpoint with the sections {', '.join(self._sections)}",
                "use a checkpoint of this run and this version of palimpsest",
            )
        for name in absent:
            tell(f"{checkpoint} has no section {name}: that part of the run begins anew")
        for name in sorted(saved.keys() - self._sections.keys()):
            tell(f"{checkpoint} has a section {name} that no part of this run keeps: it is dropped")
        for name, section in self._sections.items():
            if name in saved:
                section.restore(saved[name])
