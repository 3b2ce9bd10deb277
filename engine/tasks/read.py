"""The examples that a task file names, with their labels."""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.config.load import Tree, parse_section
from engine.config.schema.data import AugmentConfig, ColumnsConfig
from engine.config.schema.objective import ObjectiveConfig, ObjectiveName
from engine.errors import ConfigError
from engine.tasks.augment import augmented
from engine.tasks.examples import TextExamples
from engine.tasks.kind import Examples, Kind
from engine.tasks.kinds import KINDS


class Task(NamedTuple):
    """A kind of task, its objective with the names of all labels, and its examples by their part of `data` (`train`,
    `validation`)."""

    kind: Kind[Any]
    objective: ObjectiveConfig
    parts: dict[str, Examples]


def read_task(stage: Tree, name: ObjectiveName, source: str, seed: int) -> Task:
    data, kind = stage["data"], KINDS[name]
    columns = parse_section(ColumnsConfig, data.get("columns", {}), ("stages", 0, "data", "columns"), source)
    objective = parse_section(ObjectiveConfig, stage["objective"], ("stages", 0, "objective"), source)
    parts = {part: kind.read(str(data[part]), columns) for part in ("train", "validation") if data.get(part)}
    if data.get("augment"):
        config = parse_section(AugmentConfig, data["augment"], ("stages", 0, "data", "augment"), source)
        parts["train"] = _augmented(parts["train"], config, name, seed)
    if labels := kind.labels(parts, objective.labels):
        objective = objective.model_copy(update={"labels": labels})
    return Task(kind, objective, parts)


def _augmented(examples: Examples, config: AugmentConfig, name: ObjectiveName, seed: int) -> Examples:
    if not isinstance(examples, TextExamples):
        raise ConfigError(
            f"stages.0.data.augment with objective {name}, whose labels are of parts of a text",
            "an objective with a label for each text: classification or regression",
            "leave data.augment out, or prepare a larger file of examples",
        )
    if examples.needed is not None:
        raise ConfigError(
            "stages.0.data.augment with data.columns.entities_of_relation, whose marks a variant of a text might lose",
            "texts without marks",
            "leave data.augment out, or prepare a larger file of examples",
        )
    return augmented(examples, config, seed)
