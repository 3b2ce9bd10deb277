"""A damaged shard as an error that says which one it is, so that ranks can agree to do without it."""

from __future__ import annotations

from typing import NamedTuple

from engine.errors import DataError


class Damage(NamedTuple):
    """A shard that a run does without: its samples are left out wherever they come."""

    source: int
    """Number of the source in the mixture; 0 while there is but one."""
    shard: int
    counted: bool
    """True if its rows could be counted: then they keep their addresses and are passed over. Where not, because packing
    needs offsets that are damaged, the shard counts as empty in every window that begins from now on."""


class DamagedShard(DataError):
    """A file of a shard is missing, or its bytes are not those that were written."""

    number: int = -1
    """Number of the shard in its data set, once that is known."""
    damage: Damage | None = None
    """The damage, if a loader could do without the shard; None if it cannot (validation data)."""

    def __reduce__(self):
        return type(self), (self.wrong, self.allowed, self.remedy), self.__dict__
