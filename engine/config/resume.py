"""What a changed configuration means for a run that goes on (contract "Config on resume").

Only keys of kind `meaning` enter the hash that a checkpoint carries. A `schedule` key may change and is logged,
an `execution` key is free.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from engine.config.schema.run import RunConfig
from engine.config.schema.section import Kind, Section
from engine.errors import ConfigError


@dataclass(frozen=True)
class Change:
    """One key that differs between the saved and the new configuration."""

    key: str
    kind: Kind
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}"


def flatten(section: Section, prefix: str = "") -> dict[str, tuple[Kind, Any]]:
    """Every leaf of a configuration as dotted key -> (kind, JSON value).

    A key's kind is its section's, unless the section gives it another one.
    """
    leaves: dict[str, tuple[Kind, Any]] = {}
    dumped = section.model_dump(mode="json")
    for name in type(section).model_fields:
        value = getattr(section, name)
        path = f"{prefix}{name}"
        if isinstance(value, Section):
            leaves |= flatten(value, f"{path}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            for index, item in enumerate(value):
                leaves |= flatten(item, f"{path}.{index}.")
        else:
            leaves[path] = (section.kinds.get(name, section.kind), dumped[name])
    return leaves


def meaning_hash(config: RunConfig) -> str:
    """Hash of the keys that make a run what it is, as 16 hex digits."""
    meaning = {key: value for key, (kind, value) in flatten(config).items() if kind == "meaning"}
    text = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compare(before: RunConfig, after: RunConfig) -> list[Change]:
    """Every key that differs."""
    old, new = flatten(before), flatten(after)
    absent: tuple[Kind, Any] = ("meaning", None)
    changes = []
    for key in sorted(old.keys() | new.keys()):
        (kind, was), (kind_after, is_now) = old.get(key, absent), new.get(key, absent)
        if was != is_now:
            changes.append(Change(key, kind if key in old else kind_after, was, is_now))
    return changes


def refuse_new_meaning(changes: list[Change], folder: str) -> None:
    """Raises `ConfigError` naming every changed key that would make another run of the one in `folder`."""
    refused = [change for change in changes if change.kind == "meaning"]
    if refused:
        raise ConfigError(
            f"run folder {folder} belongs to another run:\n  " + "\n  ".join(str(change) for change in refused),
            "changes of layout, launcher, logging (free) and of the schedule (logged)",
            "restore these keys, or start afresh with another `folder`",
        )
