"""Text of a run file with one more run stage, everything else as it was: comments, order, anchors, quotes, line ends.

The new entry is inserted as text behind the last one. A round trip through a YAML library would keep comments, but not
line breaks, indentation and the spelling of numbers. YAML's own events say where the list ends, and the result is
parsed again: it has to be the old file with the stage at the end of `stages`, or nothing is returned.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.tokens import BlockEntryToken

from engine.errors import ConfigError

Tree = dict[str, Any]
_STARTS = (MappingStartEvent, SequenceStartEvent)
_ENDS = (MappingEndEvent, SequenceEndEvent)


@dataclass
class _List:
    """The list under `stages`, as positions in the text."""

    flow: bool
    """True for `[...]`."""
    in_flow: bool
    """True if the whole file is written so: JSON, for example."""
    start: int
    """Index of the first character behind the key."""
    end: int = 0
    """Index behind the last character of the last entry's content."""
    num_entries: int = field(default=0)


def appended(text: str, stage: Tree, path: Path) -> str:
    """Return the text of the run file `path` with one more run stage.

    Raises:
        ConfigError: `stages` is no list of this file, or the text cannot be changed in this one place.
    """
    # YAML counts a byte order mark as a character in some positions and not in others.
    mark, body = ("\ufeff", text[1:]) if text.startswith("\ufeff") else ("", text)
    before = _parsed(body, path)
    found = _stages(body, path)
    changed = mark + (_in_flow(body, found, stage) if found.flow else _in_block(body, found, stage, path))
    # The proof that nothing else has changed: both texts are read by the same parser as the run file.
    try:
        is_proved = YAML(typ="safe", pure=True).load(changed) == before | {"stages": [*before["stages"], stage]}
    except YAMLError:
        is_proved = False
    if not is_proved:
        raise _cannot(path, "the list under `stages` is written in a way that an entry cannot be added to as text")
    return changed


def block(stage: Tree) -> str:
    """Return a run stage as an entry of a list in block style, at the left margin."""
    out, yaml = io.StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = False, 1 << 20
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(stage, out)
    lines = out.getvalue().splitlines()
    return "\n".join(("  " if number else "- ") + line for number, line in enumerate(lines)) + "\n"


def _in_block(text: str, found: _List, stage: Tree, path: Path) -> str:
    column = _dash_column(text, found, path)
    newline = "\r\n" if "\r\n" in text else "\n"
    offset = _behind_line(text, found.end)
    # Comments that are indented further than the dash belong to the last entry; others to what comes next.
    while offset < len(text):
        line = text[offset : _behind_line(text, offset)]
        bare = line.lstrip(" ")
        if not bare.startswith("#") or len(line) - len(bare) <= column:
            break
        offset += len(line)
    gap = "" if not offset or text[offset - 1] == "\n" else newline
    added = "".join(" " * column + line + newline for line in block(stage).splitlines())
    return text[:offset] + gap + added + text[offset:]


def _in_flow(text: str, found: _List, stage: Tree) -> str:
    if found.in_flow:
        entry = json.dumps(stage, ensure_ascii=False)
    else:
        out, yaml = io.StringIO(), YAML(typ="safe", pure=True)
        yaml.default_flow_style, yaml.width = True, 1 << 20
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump(stage, out)
        entry = " ".join(out.getvalue().split("\n")).strip()
    return f"{text[: found.end]}, {entry}{text[found.end :]}"


def _stages(text: str, path: Path) -> _List:
    """Return the list under the top-level key `stages` of a text that has been parsed."""
    events = iter(YAML(typ="safe", pure=True).parse(text))
    root = next(event for event in events if isinstance(event, _STARTS))
    depth, is_key = 0, True
    for event in events:
        if depth == 0 and is_key and isinstance(event, ScalarEvent) and event.value == "stages":
            return _entries(next(events), events, event.end_mark.index, bool(root.flow_style), path)
        depth += isinstance(event, _STARTS) - isinstance(event, _ENDS)
        # Keys and values of the top level alternate; a value that is a section ends at depth 0 again.
        if depth == 0:
            is_key = not is_key
    raise _cannot(path, "`stages` does not stand in this file (a file that it includes may have it)")


def _entries(first: Any, events: Iterator[Any], start: int, in_flow: bool, path: Path) -> _List:
    """Return the list that begins with the event `first`, which follows the key `stages`."""
    if isinstance(first, AliasEvent):
        raise _cannot(path, "`stages` is an alias (*name) of another place")
    if not isinstance(first, SequenceStartEvent):
        raise _cannot(path, "`stages` is no list")
    found = _List(bool(first.flow_style), in_flow, start)
    open_ones: list[Any] = [first]
    for event in events:
        if isinstance(event, _STARTS):
            found.num_entries += len(open_ones) == 1
            open_ones.append(event)
        elif isinstance(event, _ENDS):
            ended = open_ones.pop()
            if not open_ones:
                break
            # The mark of a block's end stands at the next token, behind comments that are not the block's.
            if ended.flow_style:
                found.end = event.end_mark.index
        elif isinstance(event, ScalarEvent | AliasEvent):
            found.num_entries += len(open_ones) == 1
            # An empty value has no place of its own: its marks stand at the next token.
            if event.end_mark.index > event.start_mark.index:
                found.end = max(found.end, _end_of(event))
    if not found.num_entries:
        raise _cannot(path, "`stages` is empty")
    return found


def _end_of(event: Any) -> int:
    """Return the index behind a scalar or an alias."""
    end = event.end_mark.index
    # A literal or folded text ends where the next token begins, behind its blank lines: one back is inside of it.
    return end - 1 if isinstance(event, ScalarEvent) and event.style in ("|", ">") else end


def _dash_column(text: str, found: _List, path: Path) -> int:
    """Return the column of the dashes of a list in block style."""
    for token in YAML(typ="safe", pure=True).scan(text):
        if isinstance(token, BlockEntryToken) and token.start_mark.index >= found.start:
            return token.start_mark.column
    raise _cannot(path, "`stages` has no entry that begins with a dash")


def _behind_line(text: str, index: int) -> int:
    """Return the index behind the end of the line that holds `index`."""
    end = text.find("\n", index)
    return len(text) if end < 0 else end + 1


def _parsed(text: str, path: Path) -> Tree:
    try:
        tree = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise _cannot(path, f"it is no valid YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(tree, dict):
        raise _cannot(path, f"it holds {type(tree).__name__}, not sections")
    if not isinstance(tree.get("stages"), list):
        where = (
            "is no list" if "stages" in tree else "does not stand in this file (a file that it includes may have it)"
        )
        raise _cannot(path, f"`stages` {where}")
    return tree


def _cannot(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"no run stage can be appended to {path}: {why}",
        "a run file with its own list `stages:`, one entry or more",
        "write the new stage there by hand (--dry-run shows it), or move `stages` into this file",
    )
