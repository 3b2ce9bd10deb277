"""A fine-tuned model on files of labelled examples: the measures of its task, by `engine.tasks`' own kinds.

Rows go through transformers' class in batches of one length, so that no padding is there to be handled.

Legend: N rows, B batch, T tokens of a row, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from engine.config.schema.data import ColumnsConfig
from engine.config.schema.objective import ObjectiveConfig, ObjectiveName
from engine.data.objectives.examples import SECOND
from engine.data.shards.dataset import TokenDataset
from engine.errors import ConfigError
from engine.evaluate.domains import Domain
from engine.evaluate.subject import TASKS, Subject, require_kind
from engine.tasks.encode import encoded_folder
from engine.tasks.kind import Kind, Predictions
from engine.tasks.kinds import KINDS

_ROWS = 32


@dataclass(frozen=True)
class Evaluated:
    """The predictions on a set, and what they were made of."""

    name: str
    source: str
    kind: Kind[Any]
    objective: ObjectiveConfig
    examples: Any
    """Examples of the kind's own class."""
    predictions: Predictions

    def table(self) -> dict[str, Any]:
        """Return the set and its measures."""
        return {
            "set": self.name,
            "source": self.source,
            "task": self.objective.name,
            "measures": self.predictions.measures(),
        }


def evaluate_set(subject: Subject, given: Domain, columns: ColumnsConfig, limit: int | None = None) -> Evaluated:
    """Return a model's predictions on the first `limit` examples of a file (None: all).

    Raises:
        ConfigError: the model was fine-tuned on no task that is measured here.
        DataError: the file does not fit the task.
        EnvironmentProblem: a package of the measures is missing.
    """
    kind, objective = task_of(subject)
    kind.require_packages()
    examples = first(kind.read(given.source, columns), limit)
    predictions = predict_examples(subject, kind, objective, examples)
    return Evaluated(given.name, given.source, kind, objective, examples, predictions)


def task_of(subject: Subject) -> tuple[Kind[Any], ObjectiveConfig]:
    """Return the kind of task that a model was fine-tuned on, and its objective with the labels.

    Raises:
        ConfigError: it was fine-tuned on none.
    """
    require_kind(subject, TASKS, "labelled examples", "a model that `palimpsest finetune` made, or one of its kind")
    config = subject.model.config
    is_number = config.num_labels == 1 or config.problem_type == "regression"
    name: ObjectiveName = "regression" if is_number else "classification"
    if subject.kind == "tokens":
        name = "token_classification"
    elif subject.kind == "answers":
        name = "question_answering"
    if name not in KINDS:
        raise ConfigError(f"{subject.origin} was fine-tuned for {name}", ", ".join(KINDS), "name another model")
    has_labels = name in ("classification", "token_classification")
    labels = tuple(config.id2label[number] for number in range(config.num_labels)) if has_labels else ()
    return KINDS[name], ObjectiveConfig(name=name, labels=labels)


def first(examples: Any, limit: int | None) -> Any:
    """Return the first examples of a file: each list of the dataclass is as long as there are examples."""
    if limit is None or limit >= len(examples):
        return examples
    lists = {one.name: getattr(examples, one.name) for one in fields(examples)}
    return replace(examples, **{name: value[:limit] for name, value in lists.items() if isinstance(value, list)})


def predict_examples(subject: Subject, kind: Kind[Any], objective: ObjectiveConfig, examples: Any) -> Predictions:
    """Return the predictions on some examples.

    Raises:
        DataError: an example cannot be encoded.
    """
    framing = subject.framing
    assert framing is not None
    length = subject.longest
    with TemporaryDirectory() as folder:
        written = encoded_folder(kind, examples, objective, framing, length, Path(folder), "set")
        dataset = TokenDataset(written)
        return kind.decode(logits_of(subject, rows_of(dataset)), dataset, objective)


@dataclass(frozen=True)
class Row:
    """The tokens of a row, and how many of them are of the first text (None: all)."""

    ids_T: np.ndarray
    second: int | None = None


def rows_of(dataset: TokenDataset) -> list[Row]:
    """Return the rows of encoded examples."""
    seconds = dataset.whole_column(SECOND) if SECOND in dataset.index.columns else None
    found: list[Row] = []
    for number in range(dataset.num_shards):
        shard = dataset.shard(number)
        for begin, end in zip(shard.documents[:-1], shard.documents[1:], strict=True):
            second = None if seconds is None else int(seconds[len(found)])
            found.append(Row(np.array(shard.tokens[begin:end], np.int64), second))
    return found


@torch.inference_mode()
def logits_of(subject: Subject, rows: Sequence[Row]) -> list[np.ndarray]:
    """Return the logits of each row, fp32: (C,), or (T, C) of a model that looks at tokens."""
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: rows[number].ids_T.size)
    batch: list[int] = []
    most = rows_at_once(subject, _ROWS)
    for number in order:
        if batch and (len(batch) == most or rows[batch[0]].ids_T.size != rows[number].ids_T.size):
            _run(subject, rows, batch, found)
            batch = []
        batch.append(number)
    if batch:
        _run(subject, rows, batch, found)
    return found


def _run(subject: Subject, rows: Sequence[Row], batch: list[int], found: list[np.ndarray]) -> None:
    made = subject.model(**inputs_of(subject, [rows[number] for number in batch]))
    logits = torch.stack((made.start_logits, made.end_logits), -1) if subject.kind == "answers" else made.logits
    for number, values in zip(batch, logits.float().cpu().numpy(), strict=True):
        found[number] = values


def inputs_of(subject: Subject, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Return the model's inputs for rows of one length."""
    ids_BT = torch.from_numpy(np.stack([row.ids_T for row in rows])).to(subject.device)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    if "token_type_ids" in subject.tokenizer.model_input_names:
        # types 0 0 0 1 1: the second text begins at token 3
        second_B = torch.tensor([row.ids_T.size if row.second is None else row.second for row in rows])
        places_T = torch.arange(ids_BT.shape[1])
        inputs["token_type_ids"] = (places_T >= second_B[:, None]).long().to(subject.device)
    return inputs


def rows_at_once(subject: Subject, most: int) -> int:
    """Return the rows of a forward pass: one where transformers finds a decoder's last token by no padding token."""
    return 1 if subject.model.config.pad_token_id is None else most
