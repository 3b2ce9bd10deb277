"""`~` at the beginning of a path: the user's home folder, as in a shell, wherever palimpsest is given a path.

A shell replaces it only at the beginning of a word: not in a run file, in `folder=~/run` or in `--output=~/tokens`.
Where a path has to lie on a disk, a URL is refused: it would make a folder that is named `s3:`.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

KEYS = (
    "folder",
    "tokenizer",
    "init_from",
    "init_from.path",
    "checkpoint.memory.folder",
    "stages.*.data.train",
    "stages.*.data.sources.*.path",
    "stages.*.data.validation",
    "stages.*.data.validation.*",
    "stages.*.data.cache.folder",
    "stages.*.data.augment.synonyms",
    "stages.*.replay.source",
    "stages.*.replay.validation",
    "stages.*.replay.validation.*",
    "evaluation.tasks.*",
)
"""Keys of a run that are paths, or may be."""
ON_DISK = (
    "folder",
    "tokenizer",
    "checkpoint.memory.folder",
    "stages.*.data.cache.folder",
    "stages.*.data.augment.synonyms",
)
"""Keys among them whose values are never URLs."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` has taken one of the two slashes


def expand(path: str, what: str = "path") -> str:
    """Return a path with a leading `~` or `~USER` replaced by that home folder, and any other text as it is.

    Raises:
        ConfigError: there is no such user; `what` is the path's key there.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ConfigError(
            f"{what} = {path}: there is no home folder {path.split('/')[0]}",
            "~ for your own home folder, ~NAME for that of a user of this machine",
            f"write the path out; a folder of that name here is ./{path}",
        )
    return found


def disk_path(path: str, what: str) -> str:
    """Return `path`, which has to lie on a disk. Raises `ConfigError` where it is a URL."""
    if _URL.match(path):
        raise ConfigError(
            f"{what} = {path} is a URL",
            "a path on a disk",
            f"name a folder, and copy between it and the store with the store's own tool; a folder of that name here "
            f"is ./{path}",
        )
    return path


def expand_keys(tree: dict[str, Any]) -> None:
    """Expand the paths of a run's configuration, in place and before it is validated. Raises `ConfigError`."""
    for key in KEYS:
        _change_at(tree, key.split("."), "", expand)
    for key in ON_DISK:
        _change_at(tree, key.split("."), "", disk_path)


def with_homes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command that is called with its paths expanded; its signature stays."""
    if "expands_homes" in command.__dict__:
        return command

    @functools.wraps(command)
    def expanded(**arguments: Any) -> Any:
        return command(**{name: _in_argument(value, name) for name, value in arguments.items()})

    # A typer application keeps its wrapped commands: called again in one process, it is not wrapped once more.
    expanded.__dict__["expands_homes"] = True
    return expanded


def _change_at(node: Any, keys: Sequence[str], above: str, change: Callable[[str, str], str]) -> None:
    key, *deeper = keys
    if isinstance(node, list) and key == "*":
        # Before validation a node may be anything: what does not have the expected form is left to pydantic.
        names: list[Any] = list(range(len(node)))
    elif isinstance(node, dict):
        names = [name for name in node if key in ("*", name)]
    else:
        return
    for name in names:
        if deeper:
            _change_at(node[name], deeper, f"{above}{name}.", change)
        elif isinstance(node[name], str):
            node[name] = change(node[name], f"{above}{name}")


def _in_argument(value: Any, name: str) -> Any:
    if isinstance(value, Path):
        return Path(expand(disk_path(str(value), name), name))
    return [_in_argument(item, name) for item in value] if isinstance(value, list) else value
