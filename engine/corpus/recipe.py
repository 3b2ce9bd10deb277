"""`prepare.json`: the recipe and the counts of an output, and what a second preparation does with a first one's.

Invariant: `prepare.json` is written last, so a folder that has one is complete. An unfinished output has `PLAN_FILE`
in its working folder instead; only the same command goes on with it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from engine.atomic import write_atomically
from engine.corpus.statistics import Statistics
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.folders import PARTS
from engine.data.shards.index import FILE as INDEX_FILE
from engine.errors import DataError

RECIPE_FILE = "prepare.json"
VERSION = 1
WORK = ".unfinished"
"""Folder in which a preparation keeps what is finished of it."""
PLAN_FILE = "plan.json"
_OF_A_DISK = "lost+found"

Recipe = dict[str, Any]


def write_recipe(output: Path, recipe: Recipe, parts: dict[str, Statistics]) -> None:
    """Make an output complete. Raises `OSError`."""
    report = {name: statistics.to_json() for name, statistics in parts.items()}
    tree = {"version": VERSION, "recipe": recipe, "report": report}
    write_atomically(output / RECIPE_FILE, json.dumps(tree, indent=1) + "\n")


def complete_before(output: Path, recipe: Recipe) -> dict[str, Statistics] | None:
    """Return the counts of a complete output of the same recipe, verified; None where there is no complete one.

    Raises `DataError` where another output is in the way, or this one is damaged.
    """
    path = output / RECIPE_FILE
    if not path.exists():
        others = [name for name in PARTS if any((output / name).glob(f"**/{INDEX_FILE}"))]
        if others and not (output / WORK / PLAN_FILE).exists():
            raise _in_the_way(output, f"token shards without a {RECIPE_FILE} in {', '.join(others)}")
        return None
    try:
        tree = json.loads(path.read_bytes())
        before = tree["recipe"]
        parts = {name: Statistics.from_json(item) for name, item in tree["report"].items()}
        differences = _differences(before, recipe)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _in_the_way(output, f"a {RECIPE_FILE} that cannot be read ({error})") from error
    if differences:
        raise _in_the_way(output, "token shards made otherwise:\n  " + "\n  ".join(differences))
    for name in parts:
        TokenDataset(output / name).verify()
    return parts


def refuse_foreign(output: Path) -> None:
    """Raise `DataError` where a folder holds files and nothing that a preparation wrote: it is someone else's."""
    if not output.is_dir() or any((output / name).exists() for name in (RECIPE_FILE, f"{WORK}/{PLAN_FILE}")):
        return
    if parts_before(output):
        return
    try:
        found = [path.name for path in output.iterdir()]
    except OSError:
        return  # cannot be written to either, which is told then
    names = sorted(name for name in found if not name.startswith(".") and name != _OF_A_DISK)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise DataError(
            f"{output} holds {', '.join(names[:3])}{more}, which no preparation wrote",
            "a new or empty folder, or one that `palimpsest prepare` wrote",
            "name another --output, for example a folder in it",
        )


def parts_before(output: Path) -> list[str]:
    """Return the folders of shards in an output, complete or not, relative to it."""
    found = [path.parent for name in PARTS for path in (output / name).glob(f"**/{INDEX_FILE}")]
    return sorted(str(path.relative_to(output)) for path in found)


def begin(output: Path, recipe: Recipe, overwrite: bool) -> Path:
    """Return the working folder, new or that of the same command. Raises `DataError` for another one's, and `OSError`.

    Sources count by name here: one that was mended since has parts of its own, and those of the others are kept.
    """
    work = output / WORK
    path = work / PLAN_FILE
    # by name alone: the parts of sources that have not changed are found by content in their folders
    plan = recipe | {"sources": [[item["domain"], item["name"]] for item in recipe["sources"]]}
    del plan["tokenizer"]  # the hash tells
    if path.exists():
        try:
            before = json.loads(path.read_bytes())
        except (OSError, ValueError):
            before = {}
        differences = [f"{key}: {before.get(key)} -> {plan[key]}" for key in plan if before.get(key) != plan[key]]
        if not differences:
            return work
        if not overwrite and any(work.glob("*/*.part")):  # nothing is lost where nothing is finished
            raise DataError(
                f"{output} holds an unfinished output of another command:\n  " + "\n  ".join(differences),
                "the command that began it",
                f"run that one again, name another --output, or --overwrite (drops {work})",
            )
        remove_tree(work)
    elif work.exists():
        remove_tree(work)  # a removal that was killed behind the plan: nobody knows what the finished parts are of
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(plan, indent=1) + "\n")
    return work


def remove_tree(folder: Path) -> None:
    """Remove a working folder, the file that identifies its command first. Raises `OSError`."""
    (folder / PLAN_FILE).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _differences(before: Recipe, recipe: Recipe) -> list[str]:
    return [
        f"{key}: {_shown(before.get(key, _unset(value)))} -> {_shown(value)}"
        for key, value in recipe.items()
        if _compared(key, before.get(key, _unset(value))) != _compared(key, value)
    ]


def _unset(value: Any) -> Any:
    """Return the value that a recipe without a key stands for: the key's default."""
    return "none" if value in ("none", "exact", "near", "zstd") else None


def _compared(key: str, value: Any) -> Any:
    """Return the part of a recipe's value that is compared: contents, not names and locations."""
    if key == "tokenizer":
        return None  # the hash tells
    if key == "order":
        return None  # a whole output in an older order holds the same documents, and runs may depend on its bytes
    if key == "sources" and isinstance(value, list):
        return [(item.get("domain", ""), item.get("xxh3")) for item in value]
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        names = [Path(item["name"]).name for item in value]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return repr(value)


def _in_the_way(output: Path, what: str) -> DataError:
    return DataError(
        f"{output} holds {what}",
        "a new or empty folder, or one made from the same",
        "name another --output, or --overwrite",
    )
