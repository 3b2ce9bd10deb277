"""The other side of a cell: transformers' Trainer as its own examples use it, rows padded to the longest of a batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from bench.finetune.ours import BETA2, CLIP, EPSILON, WARMUP_SHARE, WEIGHT_DECAY
from bench.finetune.relations import Row
from bench.finetune.sets import TaskSet


class Encoded(torch.utils.data.Dataset):
    """Encoded rows in memory."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


@dataclass(frozen=True)
class Prepared:
    """What a kind of task gives to Trainer, and the measures of what it predicts on the test rows."""

    model: Any
    collator: Any
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    measure: Callable[[Any], dict[str, Any]]


def train_theirs(task: TaskSet, start: str, files: tuple[str, str], folder: Path, seed: int) -> dict[str, Any]:
    """Fine-tune from a Hugging Face folder on a file of rows; return the measures on the other file."""
    from bench.finetune.their_kinds import PREPARE

    torch.manual_seed(seed)  # of the head's initial weights
    train, test = (_read(Path(file)) for file in files)
    tokenizer = AutoTokenizer.from_pretrained(start)
    prepared: Prepared = PREPARE[task.kind](task, start, tokenizer, train, test)
    trainer = Trainer(
        prepared.model,
        arguments(task, folder, seed),
        data_collator=prepared.collator,
        train_dataset=Encoded(prepared.train),
        processing_class=tokenizer,
    )
    trainer.train()
    found = trainer.predict(Encoded(prepared.test))  # type: ignore[arg-type]
    trainer.save_model(str(folder / "model"))
    return prepared.measure(found.predictions)


def arguments(task: TaskSet, folder: Path, seed: int) -> TrainingArguments:
    """Return the recipe as Trainer's arguments, without logs, checkpoints and progress bars."""
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        learning_rate=task.learning_rate,
        per_device_train_batch_size=task.batch,
        per_device_eval_batch_size=task.batch,
        num_train_epochs=task.epochs,
        weight_decay=WEIGHT_DECAY,
        adam_beta2=BETA2,
        adam_epsilon=EPSILON,
        max_grad_norm=CLIP,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_SHARE,  # below 1 it is a share of all steps
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=50,
        use_cpu=True,
    )


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
