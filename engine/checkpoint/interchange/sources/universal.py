"""A universal checkpoint of DeepSpeed's: one folder per parameter with a file of each state, whole tensors of fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.interchange.sources.deepspeed import RECORDS
from engine.checkpoint.interchange.sources.pickles import open_torch_file, stored_tensor, unusable
from engine.checkpoint.interchange.sources.unnamed import Parts, Unnamed, read_facts
from engine.checkpoint.manifest import WEIGHT
from engine.checkpoint.storage import Location
from engine.errors import CheckpointError

LATEST = "latest_universal"
"""File that names the checkpoint in a folder that DeepSpeed loads; written last."""
FOLDER = "zero"
"""Folder with a folder for each parameter."""
_FILES = {"fp32": WEIGHT, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def open_universal(folder_or_parent: Location) -> Unnamed:
    """Open a universal checkpoint: its folder, or the folder above, whose `latest_universal` names it.

    Raises:
        CheckpointError: it is none, a parameter lacks its weights, or a file cannot be used.
    """
    folder = _tag(folder_or_parent)
    parameters = folder / FOLDER
    if not parameters.is_dir():
        raise CheckpointError(
            f"{folder} holds no folder {FOLDER}/", "a universal checkpoint of DeepSpeed's", "check the path"
        )
    states: dict[str, Parts] = {state: {} for state in _FILES.values()}
    step = None
    for path in sorted(parameters.iterdir(), key=lambda path: path.name):
        if not path.is_dir():
            continue
        if not (path / "fp32.pt").is_file():
            raise CheckpointError(f"{path} holds no fp32.pt", "the weights of every parameter", "copy it again")
        for file, state in _FILES.items():
            if (path / f"{file}.pt").is_file():
                states[state][path.name] = [stored_tensor(path / f"{file}.pt", _tensor(path / f"{file}.pt"))]
        if step is None and (path / "step.pt").is_file():
            step = _number(path / "step.pt")
    held = {state: parts for state, parts in states.items() if parts or state == WEIGHT}
    facts = read_facts(folder, folder_or_parent)
    return Unnamed(str(folder), "a universal checkpoint of DeepSpeed's", held, step, facts)


def _tensor(path: Location) -> torch.Tensor:
    content = open_torch_file(path, records=RECORDS)
    found = content.get("param") if isinstance(content, dict) else content
    if not isinstance(found, torch.Tensor):
        raise unusable(path, "it holds no tensor named param")
    return found


def _number(path: Location) -> int:
    """Return the step, a tensor or a number."""
    found: Any = open_torch_file(path)
    if isinstance(found, torch.Tensor):
        with path.open("rb") as file:
            found = torch.load(file, map_location="cpu", weights_only=True)
    return int(found)


def _tag(folder_or_parent: Location) -> Location:
    latest = folder_or_parent / LATEST
    if not latest.is_file():
        return folder_or_parent
    name = latest.read_text(encoding="utf-8").strip()
    # text from a file: it may not lead out of the folder
    if not name or Path(name).name != name:
        raise unusable(folder_or_parent, f"its file {LATEST} names {name!r}")
    return folder_or_parent / name
