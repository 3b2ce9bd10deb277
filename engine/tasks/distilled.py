"""Distillation in a task: whether the start of the run predicts the task's labels already, and which ones."""

from __future__ import annotations

from typing import Any

from engine.checkpoint.folder import find
from engine.checkpoint.interchange.huggingface import read_configuration
from engine.checkpoint.interchange.initial import format_of
from engine.checkpoint.load import read_state
from engine.checkpoint.storage import location_of
from engine.config.load import Tree
from engine.config.objectives import OBJECTIVES
from engine.config.rules.regularization import nothing_to_distil
from engine.config.schema.model import TaskHead
from engine.config.schema.objective import ObjectiveName
from engine.errors import ConfigError
from engine.tasks.start import Start, section_of

KEY = "stages.0.regularization.distillation"


def set_head(tree: Tree, stage: Tree, name: ObjectiveName, before: TaskHead | None, start: Start) -> None:
    """Note in `init_from` that the head of a task which distils is new, where the start has none (`before`).

    Raises:
        ConfigError: the head is new, and no text is replayed whose tokens could be distilled.
    """
    if not _distils(stage) or not OBJECTIVES[name].has_head:
        return
    if start.begun is not None and start.begun.init_from is not None:
        # what the start had is gone, and noted
        tree["init_from"] = {"head": start.begun.init_from.head} | section_of(tree["init_from"])
        return
    if stage.get("replay") is None and (before is None or name == "regression"):
        raise nothing_to_distil(KEY, name)
    if before is None:
        tree["init_from"] = section_of(tree["init_from"]) | {"head": "new"}


def check_labels(stage: Tree, labels: tuple[str, ...], init_from: str) -> None:
    """Raise `ConfigError` where a task distils the labels of its start, and these have other names or another order."""
    if not _distils(stage) or not labels:
        return
    theirs = _labels_of(init_from)
    if theirs and theirs != labels:
        raise ConfigError(
            f"{KEY}: the labels of {init_from} are {', '.join(theirs)}, and those of the task {', '.join(labels)}",
            "the same labels in the same order",
            "write the start's labels as objective.labels where the task has them, or begin a new head "
            "(init_from.head = new), beside which replayed text alone is distilled",
        )


def _distils(stage: Tree) -> bool:
    return bool((stage.get("regularization") or {}).get("distillation"))


def _labels_of(init_from: str) -> tuple[str, ...]:
    """Return the names of the labels that a start predicts, in the order of their numbers; none where it has no names
    for them."""
    location = location_of(init_from)
    found = format_of(location)
    if found == "huggingface":
        named: dict[Any, str] = read_configuration(location).id2label or {}
        # LABEL_0 and so on is what transformers calls those without a name
        is_named = any(name != f"LABEL_{number}" for number, name in named.items())
        return tuple(named[number] for number in sorted(named)) if is_named else ()
    if found != "palimpsest":
        return ()
    stages = read_state(find(location)[0]).config.get("stages") or [{}]  # what `convert` wrote has none
    return tuple(stages[-1].get("objective", {}).get("labels", ()))
