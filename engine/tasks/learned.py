"""Models of runs of tasks: of a run folder the one that `palimpsest finetune` measures and exports."""

from __future__ import annotations

from pathlib import Path

from engine.config.load import load_run
from engine.config.save import FILE
from engine.serve.source import Trained, open_trained
from engine.train.best import chosen_checkpoint


def open_learned(source: Path) -> Trained:
    """Open the best checkpoint of a run folder, where the run keeps it, else its newest; or the checkpoint that is
    named.

    Raises as `open_trained`.
    """
    if not (source / FILE).is_file():  # a checkpoint, or whatever else `open_trained` refuses
        return open_trained(source)
    return open_trained(chosen_checkpoint(source, load_run(source / FILE).checkpoint) or source)
