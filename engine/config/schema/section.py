"""Base of the sections of a configuration: plain frozen values, and a kind per key.

A kind says what a change of the key means on resume: `meaning` (a change makes another
run), `schedule` (may change, is logged) or `execution` (free: layout, launcher, logging).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

KeyKind = Literal["meaning", "schedule", "execution"]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversion from text to number."""

    # Frozen, because a configuration that changes under a run is no record of it; defaults are validated as well, for a
    # default factory may compute one from wrong values.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    kind: ClassVar[KeyKind] = "meaning"
    """Kind of this section's keys."""
    kinds: ClassVar[dict[str, KeyKind]] = {}
    """Kinds of those keys of this section that have another one."""
    told_apart_by: ClassVar[str] = ""
    """Key that tells this section from others that may stand in its place; empty where there are none."""
