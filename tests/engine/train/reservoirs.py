"""Runs of two stages that keep a reservoir, and what their checkpoints name of it."""

from pathlib import Path
from typing import Any

from engine.checkpoint.folder import committed
from engine.checkpoint.load import read_state
from engine.checkpoint.named_files import FOLDER
from engine.train.admission import Admission
from tests.distributed.runs import Tree, run_tree

BORDER, LAST = 4, 9


def admitting_tree(corpus: Path, folder: Path, **reservoir: Any) -> Tree:
    """A run of two stages over one data set, which keeps a reservoir."""
    tree = run_tree(corpus, folder)
    [stage] = tree["stages"]
    one = stage | {"name": "one", "duration": {"steps": BORDER}}
    two = stage | {"name": "two", "global_batch_size": 6, "duration": {"steps": LAST - BORDER}}
    saves = {"every_steps": 2, "keep_last": 9}
    kept = {"rows": 1000, "span_tokens": 16} | reservoir
    return tree | {"stages": [one, two], "reservoir": kept, "checkpoint": tree.get("checkpoint", {}) | saves}


def sections(folder: Path) -> dict[int, Any]:
    checkpoints = folder / "checkpoints"
    return {
        int(path.name.split("-")[1]): read_state(path).sections["reservoir"]
        for path in reversed(committed(checkpoints))
    }


def bytes_of(folder: Path, step: int) -> bytes:
    (name,) = sections(folder)[step]["chain"]
    return (folder / "checkpoints" / FOLDER / name).read_bytes()


def hook_of(trainer: Any) -> Admission:
    return next(hook for hook in trainer.hooks._hooks if isinstance(hook, Admission))


def replaying_tree(corpus: Path, folder: Path, **changes: Any) -> Tree:
    """A run of two stages over different data sets, of which the second one replays the run's own reservoir."""
    tree = run_tree(corpus, folder)
    [stage] = tree["stages"]
    one = stage | {"name": "one", "duration": {"steps": BORDER}}
    data = stage["data"] | {"train": str(corpus / "validation")}
    two = stage | {"name": "two", "data": data, "global_batch_size": 6, "duration": {"steps": LAST - BORDER}}
    two |= {"replay": {"ratio": 0.5, "loss_weight": 0.5}} | changes
    saves = {"every_steps": 2, "keep_last": 9}
    return tree | {
        "stages": [one, two],
        "reservoir": {"rows": 1000, "span_tokens": 16},
        "checkpoint": tree.get("checkpoint", {}) | saves,
    }
