"""Each guard against overfitting alone, on few rows of one task set, beside a training without any.

All train for the same number of passes, but for early stopping, which sees half of the test rows; the figures of all
are those of the other half. Strengths are guesses of a user who has not searched for the best ones. Augmentation by
synonyms and by translation there and back need a dictionary or a translator, and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.special import softmax

from bench.finetune.ours import finetune, run_file
from bench.finetune.sets import SETS, TaskSet
from engine.checkpoint.folder import CHECKPOINTS
from engine.checkpoint.merge import Sources, merge
from engine.config.load import Tree
from engine.config.load import merge as merge_trees
from engine.config.schema.data import ColumnsConfig
from engine.errors import ConfigError
from engine.evaluate.domains import Domain
from engine.evaluate.labelled import evaluate_set
from engine.evaluate.subject import open_subject
from engine.serve.export import export
from engine.serve.source import open_trained
from engine.tasks.kinds.classification import LabelPredictions

SET = replace(next(task for task in SETS if task.name == "sst2"), epochs=10)
NUM_ROWS = 500
NOTHING: Tree = {"model": {"dropout": 0.0}, "optimizer": {"weight_decay": 0.0}}
"""The training without any guard."""


@dataclass(frozen=True)
class Switch:
    """Keys of a task file that differ from `NOTHING`, and which weights are measured."""

    name: str
    stage: Tree = field(default_factory=dict)
    run: Tree = field(default_factory=dict)
    num_runs: int = 1
    """Runs with seeds of their own, the mean of whose probabilities is measured."""
    num_merged: int = 1
    """Newest checkpoints, one of each pass, the mean of whose weights is measured."""
    is_averaged: bool = False
    """True if the moving average of the weights is measured."""


SWITCHES = (
    Switch("nothing"),
    Switch("dropout 0.1", run={"model": {"dropout": 0.1}}),
    Switch("weight decay 0.1", run={"optimizer": {"weight_decay": 0.1}}),
    Switch("label smoothing 0.1", stage={"objective": {"name": "classification", "label_smoothing": 0.1}}),
    Switch("layer decay 0.8", stage={"layer_decay": 0.8}),
    Switch("early stopping", run={"evaluation": {"early_stopping": {"patience": 2}}}),
    Switch("mixout 0.3", stage={"regularization": {"mixout": {"share": 0.3}}}),
    Switch("adversarial 0.1", stage={"regularization": {"adversarial": {"epsilon": 0.1}}}),
    Switch("deletion 0.1, 2 copies", stage={"data": {"augment": {"copies": 2, "deletion_rate": 0.1}}}),
    Switch("L2-SP 0.01", stage={"regularization": {"l2_sp": {"strength": 0.01}}}),
    Switch("unfreezing", stage={"unfreezing": {"layers": 1, "epochs": 2}}),
    Switch("moving average 0.95", stage={"ema": {"decay": 0.95, "every_steps": 1}}, is_averaged=True),
    Switch("mean of 3 checkpoints", num_merged=3),
    Switch("ensemble of 3", num_runs=3),
)


def switch_of(name: str) -> Switch:
    """Return a switch. Raises `ConfigError` for an unknown name."""
    found = next((switch for switch in SWITCHES if switch.name == name), None)
    if found is None:
        raise ConfigError(f"switch {name}", ", ".join(switch.name for switch in SWITCHES), "choose from these")
    return found


def train_ablated(
    task: TaskSet, start: str, files: tuple[str, str], folder: Path, seed: int, switch: Switch
) -> dict[str, Any]:
    """Fine-tune with one switch; return accuracy and loss (nats per example) on the second half of the test rows."""
    train, (seen, measured) = files[0], _halves(Path(files[1]))
    found: list[LabelPredictions] = []
    for number in range(switch.num_runs):
        run = folder.with_name(f"{folder.name}-{number}")
        tree = run_file(task, start, (train, str(seen)), run, seed + 100 * number)
        finetune(changed(tree, switch), run)
        found.append(predictions(_weights(run, switch), measured))
    return score([one.logits_NC for one in found], found[0].expected_N)


def changed(tree: Tree, switch: Switch) -> Tree:
    """Return a task file with a switch; where it needs that, each pass is evaluated and saved, as `finetune` does where
    a file says nothing."""
    (stage,) = tree["stages"]
    for above in (NOTHING, switch.run):  # copied: sections that the tree lacks are put there as they are
        merge_trees(tree, deepcopy(above))
    merge_trees(stage, deepcopy(switch.stage))
    if "early_stopping" in tree["evaluation"] or switch.num_merged > 1:
        del tree["evaluation"]["every_steps"]
    if switch.num_merged > 1:
        tree["checkpoint"] = {"keep_last": switch.num_merged}
    return tree


def predictions(source: Path, rows: Path) -> LabelPredictions:
    """Return a model's predictions on a file of labelled rows."""
    found = evaluate_set(open_subject(source), Domain("test", str(rows)), ColumnsConfig()).predictions
    assert isinstance(found, LabelPredictions)
    return found


def table(scores: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return the scores of each switch, one of each seed, as a Markdown table: means and ranges, and those of the
    differences from `NOTHING` with the same seed, and so with the same rows."""
    lines = ["| switch | accuracy | gain | loss | rise |", "| --- | --- | --- | --- | --- |"]
    without = scores[SWITCHES[0].name]
    for name, found in scores.items():
        columns = []
        for key, factor, digits in (("accuracy", 100, 1), ("loss", 1, 3)):
            values = [factor * one[key] for one in found]
            changes = [value - factor * one[key] for value, one in zip(values, without, strict=True)]
            columns += [_range(values, digits), _range(changes, digits) if found is not without else ""]
        lines.append(f"| {' | '.join([name, *columns])} |")
    return "\n".join(lines)


def _range(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def score(logits: Sequence[np.ndarray], expected_N: np.ndarray) -> dict[str, float]:
    """Return accuracy and loss of the mean probabilities of some models' (N, C) logits."""
    shares_NC = np.mean([softmax(logits_NC.astype(np.float64), axis=1) for logits_NC in logits], axis=0)
    chosen_N = np.take_along_axis(shares_NC, expected_N[:, None], axis=1)[:, 0]
    return {"accuracy": float(np.mean(shares_NC.argmax(1) == expected_N)), "loss": float(-np.log(chosen_N).mean())}


def _halves(test: Path) -> tuple[Path, Path]:
    lines = test.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = test.with_name("seen.jsonl"), test.with_name("measured.jsonl")
    for part, path in enumerate(parts):  # every other row: files are sorted by label now and then
        path.write_text("".join(lines[part::2]), encoding="utf-8")
    return parts


def _weights(run: Path, switch: Switch) -> Path:
    """Return the folder of the model that a switch measures."""
    output = run / "measured"
    if switch.num_merged > 1:
        newest = sorted((run / CHECKPOINTS).iterdir())[-switch.num_merged :]
        merge(Sources(newest), [1 / len(newest)] * len(newest), output / CHECKPOINTS)
        return output
    if switch.is_averaged:
        export(open_trained(run, averaged=True), output)
        return output
    return run / "huggingface"
