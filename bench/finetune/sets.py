"""Task sets of the benchmark, read from the data folder, and the recipe of each."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config.schema.objective import ObjectiveName
from engine.errors import DataError

Row = dict[str, Any]
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
    epochs: int = 3
    batch: int = 32
    learning_rate: float = 3e-4

    def rows(self, data: Path) -> tuple[list[Row], list[Row]]:
        """Return (training rows, test rows). Raises `DataError` where a file is missing or damaged."""
        rows = _read(data / self.train)
        if self.test is not None:
            return rows, _read(data / self.test)
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


SETS = (
    TaskSet("sst2", "classification", "tasks/sst2/train.jsonl", "tasks/sst2/test.jsonl", "accuracy", 64),
    TaskSet("ag_news", "classification", "tasks/ag_news/train.jsonl", "tasks/ag_news/test.jsonl", "accuracy", 96),
    TaskSet(
        "chnsenticorp",
        "classification",
        "tasks/chnsenticorp/train.jsonl",
        "tasks/chnsenticorp/test.jsonl",
        "accuracy",
        128,
    ),
)


def few(rows: Sequence[Row], number: int, seed: int) -> list[Row]:
    """Return so many rows, drawn with a seed, of each label equally many (as far as there are)."""
    by_label = defaultdict(list)
    for row in rows:
        by_label[str(row.get("label"))].append(row)
    drawn = random.Random(seed)
    for group in by_label.values():
        drawn.shuffle(group)
    # one of each label in turn
    turns = [
        row for turn in range(len(rows)) for _, group in sorted(by_label.items()) for row in group[turn : turn + 1]
    ]
    return turns[:number]


def _read(path: Path) -> list[Row]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "a data folder with tasks/ and corpus/", "name it by --data"
        ) from error
