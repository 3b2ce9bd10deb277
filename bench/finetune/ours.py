"""Our side of a cell: `palimpsest finetune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.contest import ContestFailed
from bench.finetune.relations import COLUMNS
from bench.finetune.sets import TaskSet
from engine.cli import main
from engine.config.load import Tree
from engine.config.save import save_tree

WEIGHT_DECAY, BETA2, EPSILON, CLIP, WARMUP_SHARE = 0.01, 0.999, 1e-8, 1.0, 0.1
"""Recipe of both sides (Devlin et al. 2019, appendix A.3); the learning rate falls linearly to 0."""

POOLING = "mean"
"""State that a text's label is read from: a pretraining without pairs makes no summary of a row's first token."""
OBJECTIVES: dict[str, Any] = {
    "question_answering": {"name": "question_answering", "stride": 128, "longest_answer": 30, "cut_answers": "cover"}
}
"""Objectives of the other side's settings (`bench.finetune.their_kinds`); the rest has none."""


def train_ours(task: TaskSet, start: str, files: tuple[str, str], folder: Path, seed: int) -> dict[str, Any]:
    """Fine-tune from a Hugging Face folder on a file of rows; return the measures on the other file."""
    finetune(run_file(task, start, files, folder, seed), folder)
    return json.loads((folder / "measures.json").read_text(encoding="utf-8"))


def run_file(task: TaskSet, start: str, files: tuple[str, str], folder: Path, seed: int) -> Tree:
    """Return the task file of a cell."""
    train, test = files
    columns = {"columns": COLUMNS} if task.has_relations else {}
    return {
        "name": task.name,
        "folder": str(folder),
        "seed": seed,
        "init_from": start,
        "model": {"task_head": {"pooling": POOLING}} if task.kind == "classification" else {},
        "stages": [
            {
                "objective": OBJECTIVES.get(task.kind, task.kind),
                "data": {"train": train, "validation": test, **columns},
                "sequence_length": task.length,
                "global_batch_size": task.batch,
                "duration": {"epochs": task.epochs},
            }
        ],
        "optimizer": {"learning_rate": task.learning_rate, "beta2": BETA2, "weight_decay": WEIGHT_DECAY},
        "precision": {"dtype": "fp32"},
        "parallel": {"micro_batch_size": task.batch},
        "evaluation": {"every_steps": 1_000_000},  # at the end alone, as the other side
        "logging": {"every_steps": 50, "tensorboard": False, "wandb": "off", "plot": False},
    }


def finetune(tree: Tree, folder: Path) -> None:
    """Run `palimpsest finetune`. Raises `ContestFailed`."""
    file = folder.with_suffix(".yaml")
    save_tree(tree, file)
    code = main(["finetune", str(file)])
    if code:
        raise ContestFailed(f"palimpsest finetune ended with exit code {code}", remedy=f"run it by hand: {file}")
