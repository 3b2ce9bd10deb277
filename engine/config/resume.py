"""The meaning of a changed configuration for a run that goes on.

Only keys of kind `meaning` enter the hash that a checkpoint carries. A `schedule` key may change and is logged, an
`execution` key is free. The hash covers the run's own keys and those of the run stages up to the one in which the run
stands: what comes later may still be changed or appended, and a run stage that is completed may not change at all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from engine.config.schema.run import RunConfig
from engine.config.schema.section import KeyKind, Section
from engine.errors import ConfigError

_FINGERPRINT = "init_from.fingerprint"


@dataclass(frozen=True)
class Change:
    """One key that differs between the saved and the new configuration."""

    key: str
    kind: KeyKind
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}"


def flatten(section: Section, prefix: str = "") -> dict[str, tuple[KeyKind, Any]]:
    """Return every leaf of a configuration as dotted key -> (kind, JSON value).

    A key's kind is its section's, unless the section gives it another one.
    """
    leaves: dict[str, tuple[KeyKind, Any]] = {}
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
            # The JSON value and not the Python one, so that a path or a tuple compares equal after a load.
            leaves[path] = (section.kinds.get(name, section.kind), dumped[name])
    return leaves


def meaning_hash(config: RunConfig, run_stage: int = 0) -> str:
    """Return the hash, 16 hex digits, of the keys that make a run up to run stage number `run_stage` what it is."""
    leaves = flatten(config)
    meaning = {
        key: value for key, (kind, value) in leaves.items() if kind == "meaning" and _run_stage_of(key) <= run_stage
    }
    # One text for one meaning: the order of keys in the file and blanks do not enter the hash.
    text = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def meaning_hashes(config: RunConfig) -> list[str]:
    """Return the hash of the meaning up to each run stage, in their order."""
    return [meaning_hash(config, number) for number in range(len(config.stages))]


def compare(before: RunConfig, after: RunConfig, run_stage: int | None = None) -> list[Change]:
    """Return every key that differs, outside of the run stages that come after number `run_stage`.

    None compares all run stages.
    """
    old, new = flatten(before), flatten(after)
    # A run file need not name the hash of the weights that a run starts from: the run has noted it.
    if new.get(_FINGERPRINT, ("meaning", ""))[1] is None and _FINGERPRINT in old:
        new[_FINGERPRINT] = old[_FINGERPRINT]
    # A key that only one of them has (another family, one run stage more) takes the kind that the other side gives it.
    absent: tuple[KeyKind, Any] = ("meaning", None)
    changes = []
    for key in sorted(old.keys() | new.keys()):
        (kind, was), (kind_after, is_now) = old.get(key, absent), new.get(key, absent)
        later = run_stage is not None and _run_stage_of(key) > run_stage
        if was != is_now and not later:
            changes.append(Change(key, kind if key in old else kind_after, was, is_now))
    return changes


def refuse_new_meaning(before: RunConfig, after: RunConfig, folder: str, run_stage: int = 0) -> None:
    """Refuse a configuration that would make another run of the one in `folder`, which stands in number `run_stage`.

    Raises:
        ConfigError: naming each completed run stage that is not as it was, and every other key of kind `meaning`.
    """
    # `number` of a key of the whole run is -1, which is neither completed nor later than any run stage.
    if len(after.stages) <= run_stage:
        missing = [stage.name for stage in before.stages[len(after.stages) : run_stage + 1]]
        refused = [f"run stage {name!r} is missing, and it has been trained" for name in missing]
    else:
        refused = []
    changes = compare(before, after, min(run_stage, len(after.stages) - 1))
    completed: dict[int, list[str]] = {}
    for change in changes:
        number = _run_stage_of(change.key)
        if 0 <= number < run_stage and change.kind != "execution":
            completed.setdefault(number, []).append(str(change).removeprefix(f"stages.{number}."))
        elif change.kind == "meaning":
            refused.append(str(change))
    refused += [
        f"run stage {before.stages[number].name!r} is completed and cannot change: {', '.join(found)}"
        for number, found in sorted(completed.items())
    ]
    if refused:
        raise ConfigError(
            f"run folder {folder} belongs to another run:\n  " + "\n  ".join(refused),
            "changes of layout, launcher, logging (free), of the schedule (logged), and of run stages that have not "
            "begun",
            "restore what is named here, or start afresh with another `folder`",
        )


def _run_stage_of(key: str) -> int:
    """Return the number of the run stage that a dotted key belongs to; -1 for a key of the whole run."""
    section, _, rest = key.partition(".")
    return int(rest.partition(".")[0]) if section == "stages" else -1
