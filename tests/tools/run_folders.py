"""Run folders as a run leaves them, written without one: configuration and records."""

import json
from pathlib import Path

from engine.config import save
from engine.config.load import load_run
from engine.train.records import METRICS
from tests.readme import REPOSITORY


def make_run(folder: Path, num_steps: int = 6, *changes: str, losses: dict[int, float] | None = None) -> Path:
    """Write a run of 10 steps of 4 x 128 tokens, of which `num_steps` are done, at 512 tokens per second.

    The loss of step k is 1/k but where `losses` has another; step 4 is evaluated, for 0.5 seconds.
    """
    folder.mkdir(parents=True)
    keys = ["stages.0.duration.steps=10", "stages.0.global_batch_size=4", "stages.0.sequence_length=128"]
    smoke = REPOSITORY / "configs/smoke/gpt2.yaml"
    config = load_run(smoke, [*keys, f"folder={folder}", f"name={folder.name}", *changes])
    save.save_run(config, folder)
    records = []
    for step in range(1, num_steps + 1):
        numbers = {"step": step, "loss": (losses or {}).get(step, 1 / step), "gradient_norm": 1.0, "learning_rate": 0.1}
        numbers |= {"samples": 4 * step, "tokens": 512 * step, "step_seconds": 1.0, "tokens_per_second": 512.0}
        records.append(numbers)
        if step == 4:
            records.append({"step": 4, "validation_loss": 0.5, "validation_seconds": 0.5})
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder
