"""The other side of a cell: transformers' Trainer as its own examples use it, rows padded to the longest of a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from bench.finetune.ours import BETA2, CLIP, EPSILON, WARMUP_SHARE, WEIGHT_DECAY
from bench.finetune.sets import Row, TaskSet
from engine.tasks.measures import of_labels


class _Encoded(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


def train_theirs(task: TaskSet, start: str, files: tuple[str, str], folder: Path, seed: int) -> dict[str, Any]:
    """Fine-tune from a Hugging Face folder on a file of rows; return the measures on the other file."""
    torch.manual_seed(seed)  # of the head's initial weights
    train, test = ([json.loads(line) for line in Path(file).read_text("utf-8").splitlines()] for file in files)
    tokenizer = AutoTokenizer.from_pretrained(start)
    labels = sorted({row["label"] for row in train})
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=len(labels))
    trainer = Trainer(
        model,
        arguments(task, folder, seed),
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        train_dataset=_encoded(train, tokenizer, labels, task.length),
        processing_class=tokenizer,
    )
    trainer.train()
    found = trainer.predict(_encoded(test, tokenizer, labels, task.length))  # type: ignore[arg-type]
    trainer.save_model(str(folder / "model"))
    predicted = np.asarray(found.predictions).argmax(1)
    return of_labels(np.asarray(found.label_ids), predicted, tuple(map(str, labels)))


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


def _encoded(rows: list[Row], tokenizer: Any, labels: list[Any], length: int) -> _Encoded:
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=length)
    return _Encoded(
        [
            {name: values[number] for name, values in encoded.items()} | {"labels": labels.index(row["label"])}
            for number, row in enumerate(rows)
        ]
    )
