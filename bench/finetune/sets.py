"""Task sets of the benchmark, read from the data folder, and the recipe of each."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bench.finetune.relations import Row, relations_of
from engine.config.schema.objective import ObjectiveName
from engine.errors import DataError

TRAIN_SHARE = 0.8
"""Share of the contexts of XQuAD, which has no training half, that are trained on."""
FEWEST_STEPS = 60
"""Steps of a cell with few examples, which three passes would not come to."""


@dataclass(frozen=True)
class TaskSet:
    """A task set and the recipe that both sides train it with."""

    name: str
    kind: ObjectiveName
    train: str
    """File below the data folder."""
    test: str | None
    """None means that `train` is split by context."""
    measure: str
    """Key of the measures that is reported."""
    length: int
    """Tokens of a row at most."""
    has_bar: bool = True
    has_relations: bool = False
    """True if the rows are relations, derived from the entities of the files (`bench.finetune.relations`)."""
    epochs: int = 3
    batch: int = 32
    learning_rate: float = 5e-4
    """Peak rate. Of 5e-4, 1e-3 and 2e-3 the best on the development rows of WNUT17, of 2.5e-4, 5e-4 and 1e-3
    the best on those of SST-2."""

    def rows(self, data: Path) -> tuple[list[Row], list[Row]]:
        """Return (training rows, test rows). Raises `DataError` where a file is missing or damaged."""
        rows = _read(data / self.train)
        if self.test is not None:
            test = _read(data / self.test)
            return relations_of(rows, test) if self.has_relations else (rows, test)
        contexts = sorted({row["context"] for row in rows})
        random.Random(0).shuffle(contexts)
        trained = {*contexts[: round(TRAIN_SHARE * len(contexts))]}
        return [row for row in rows if row["context"] in trained], [
            row for row in rows if row["context"] not in trained
        ]

    def for_rows(self, num_rows: int) -> TaskSet:
        """Return the recipe for so many training rows: few are one batch, and are passed over more often."""
        batch = min(self.batch, num_rows)
        return replace(self, batch=batch, epochs=max(self.epochs, -(-FEWEST_STEPS * batch // num_rows)))


def _task(name: str, kind: ObjectiveName, measure: str, length: int, **recipe: Any) -> TaskSet:
    return TaskSet(name, kind, f"tasks/{name}/train.jsonl", f"tasks/{name}/test.jsonl", measure, length, **recipe)


def _xquad(language: str) -> TaskSet:
    file = f"tasks/xquad/{language}.jsonl"
    return TaskSet(f"xquad_{language}", "question_answering", file, None, "f1", 256, has_bar=False, epochs=4, batch=16)


SETS = (
    # two passes by the development rows: 81.1 % of three seeds, three passes 80.8 %
    _task("sst2", "classification", "accuracy", 64, epochs=2),
    _task("ag_news", "classification", "accuracy", 96),
    _task("chnsenticorp", "classification", "accuracy", 128),
    _task("wikigold", "token_classification", "f1", 96, epochs=8),
    _task("wnut17", "token_classification", "f1", 96, has_bar=False, epochs=5),
    replace(
        _task("wikigold", "classification", "accuracy", 224, epochs=8, has_bar=False, has_relations=True),
        name="relations",
    ),
    _xquad("en"),
    _xquad("zh"),
)


def few(rows: Sequence[Row], number: int, seed: int) -> list[Row]:
    """Return so many rows, drawn with a seed: of each label equally many, and at least one with each tag."""
    drawn = list(rows)
    random.Random(seed).shuffle(drawn)
    if "tags" in drawn[0]:
        return _with_all_tags(drawn)[:number]
    by_label = defaultdict(list)
    for row in drawn:
        by_label[str(row.get("label"))].append(row)
    groups = [group for _, group in sorted(by_label.items())]
    in_turn = [row for one_of_each in zip_longest(*groups) for row in one_of_each if row is not None]
    return in_turn[:number]


def _with_all_tags(rows: list[Row]) -> list[Row]:
    """Return the rows in an order in which the first ones have all tags between them."""
    missing, first, others = {tag for row in rows for tag in row["tags"]}, [], []
    for row in rows:
        (first if missing & {*row["tags"]} else others).append(row)
        missing -= {*row["tags"]}
    return first + others


def _read(path: Path) -> list[Row]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "a data folder with tasks/ and corpus/", "name it by --data"
        ) from error
