"""A checkpoint of ours as a universal checkpoint of DeepSpeed 0.19, which its engines load under any ZeRO stage.

One folder `zero/<parameter>/` per parameter holds whole fp32 tensors: master weight, Adam's two moments, and the step.
Beside them stand the few values that DeepSpeed asks for before it looks there: `optimizer_state.pt`, flat for ZeRO-1
and 2 and nested for ZeRO-3, and two files of model states, as each of both names them. One parameter is in memory at a
time. Everything is a tensor or a plain container, written by `torch.save`.

Hyperparameters are left to the loading side. DeepSpeed would copy those of one group of ours onto a group of its own
by number, and under ZeRO-3 those of the first onto all; empty groups leave what its optimizer was built with.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.compare import Opened
from engine.checkpoint.container import damaged, disk_errors
from engine.checkpoint.interchange.huggingface import Names
from engine.checkpoint.manifest import WEIGHT, Manifest, key_of, moment_state
from engine.checkpoint.storage import MANIFEST, Location
from engine.errors import CheckpointError
from engine.parallel.sharding import ParameterSpec

LATEST = "latest_universal"
"""File that names the checkpoint in a folder that DeepSpeed loads; written last."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Moments that DeepSpeed's loader knows under ZeRO-3."""
MOST_GROUPS = 1024
"""Number of empty groups in the file: DeepSpeed skips its own groups from the first on that has no entry there."""


def logical(spec: ParameterSpec, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a tensor under its name here."""
    return {spec.name: values}


def write_universal(path: Location, output: Path, names: Names = logical) -> tuple[int, list[str]]:
    """Write a checkpoint into `output`, a new or empty folder.

    Returns the number of parameters on the other side, and the names of moments that are left out.

    Raises:
        CheckpointError: it is damaged, lacks a moment of Adam's for some parameter, or cannot be written.
    """
    opened = Opened(path)
    check_moments(opened.manifest)
    left_out = [moment for moment in opened.manifest.moments if moment not in MOMENTS]
    folder, step, count = output / path.name, opened.manifest.state.step, 0
    for name, spec in opened.manifest.specs.items():
        states = opened.read(name)
        for key, file in ((WEIGHT, "fp32"), *((moment_state(moment), moment) for moment in MOMENTS)):
            # popped, so that each state is let go once it is written
            parts = names(spec, states.pop(key_of(key, name)))
            for theirs, part in parts.items():
                _check_name(path, theirs)
                _save({"param": _own(part)}, folder / "zero" / theirs / f"{file}.pt")
                if key == WEIGHT:
                    # once per parameter, not per state
                    _save(_step(step), folder / "zero" / theirs / "step.pt")
                    count += 1
    _save(_optimizer_state(step), folder / "zero" / "optimizer_state.pt")
    # ZeRO-3 looks for the second name, the others for the first.
    for prefix in ("", "zero_pp_rank_0_"):
        _save(_model_states(step), folder / f"{prefix}mp_rank_00_model_states.pt")
    with disk_errors(output):
        (output / LATEST).write_text(path.name, encoding="utf-8")
    return count, left_out


def check_moments(manifest: Manifest) -> None:
    """Raise `CheckpointError` unless every parameter has Adam's two moments."""
    states_of = {name: manifest.states_of(name) for name in manifest.specs}
    odd = {name: states for name, states in states_of.items() if not set(_STATES) <= set(states)}
    if odd:
        name, states = next(iter(odd.items()))
        held = ", ".join(state.removeprefix("optim.") for state in states[1:]) or "no moments"
        raise CheckpointError(
            f"a universal checkpoint cannot be made of this one: {name} has {held} (as {len(odd)} of "
            f"{len(manifest.specs)} parameters)",
            f"{' and '.join(MOMENTS)} of every parameter: DeepSpeed loads no others",
            "convert the weights alone: --to huggingface, or --to dcp for everything",
        )


def _check_name(path: Location, name: str) -> None:
    """Raise `CheckpointError` for a name that is no folder's: it becomes one, and may not lead elsewhere."""
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
        raise damaged(path / MANIFEST, f"the parameter name {name!r} is not that of a folder")


_STATES = (WEIGHT, *map(moment_state, MOMENTS))


def _step(step: int) -> torch.Tensor:
    """Return the step in the form in which torch's Adam keeps it."""
    return torch.tensor(float(step))


def _optimizer_state(step: int) -> dict[str, Any]:
    nested = {"state": {0: {"step": _step(step)}}, "param_groups": [{}]}
    groups: list[dict[str, Any]] = [{} for _ in range(MOST_GROUPS)]
    return {
        "ds_version": importlib.metadata.version("deepspeed"),
        "param_groups": groups,
        "optimizer_state_dict": nested,
    }


def _model_states(step: int) -> dict[str, Any]:
    """Return the counters; the weights are in `zero/`. DeepSpeed's learning rate schedules count steps from -1 on."""
    return {
        "module": {},
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": step,
        "skipped_steps": 0,
        "lr_scheduler": {"last_batch_iteration": step - 1},
    }


def _own(values: torch.Tensor) -> torch.Tensor:
    """Return values in memory of their own: `torch.save` writes the whole storage under a view."""
    return values if values.untyped_storage().nbytes() == values.nbytes and values.is_contiguous() else values.clone()


def _save(content: Any, path: Path) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # what torch makes of a write that failed
            raise OSError(str(error).splitlines()[0]) from error
