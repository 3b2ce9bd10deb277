"""Training of answers on ranks: tiny starts, and runs of their tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.config.schema.run import RunConfig
from engine.tasks.resolve import resolve_task
from tests.distributed.runs import write_sentences
from tests.engine.tasks.answer_starts import answer_tree, write_dialogues, write_folder, write_pairs

STEPS, BATCH = 6, 5


def write_start(folder: Path, form: str, data: str) -> None:
    is_t5 = form.startswith("t5")
    write_sentences(folder, "bpe", 400, "span_corruption" if is_t5 else "causal")
    write_folder(folder / "theirs", form, folder / "tokenizer", max_positions=96, num_layers=4)
    (write_pairs if data == "pairs" else write_dialogues)(folder, train=23, validation=9)


def answer_run(
    folder: Path, name: str, data: str, parallel: dict[str, Any], smoothing: float = 0.0, **stage: Any
) -> RunConfig:
    kind, _, packing = data.partition(" ")
    more: dict[str, Any] = stage | ({"data": {"packing": packing}} if packing else {})
    more["objective"] = {"name": "answer", "label_smoothing": smoothing}
    columns = {"messages": "messages"} if kind == "dialogues" else None
    # At 1e-3 torch's own losses of this T5 in fp32 and fp64 are 1.6e-4 apart within six updates, at 1e-4 7e-5 (of
    # dialogues), at 2e-5 1e-6.
    rate = 2e-5 if json.loads((folder / "theirs" / "config.json").read_text())["model_type"] == "t5" else 1e-3
    tree = answer_tree(
        folder, folder / "theirs", columns, global_batch_size=BATCH, duration={"steps": STEPS}, **more
    ) | {
        "folder": str(folder / name),
        "model": {"dropout": 0.0},
        "seed": 3,
        "optimizer": {"learning_rate": rate, "weight_decay": 0.0, "clip_norm": 0.7},
        "parallel": {"micro_batch_size": 2} | parallel,
        "logging": {"tensorboard": False, "wandb": "off", "plot": False},
        "checks": True,
    }
    return resolve_task(tree, "test task")


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
