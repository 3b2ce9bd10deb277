"""A universal checkpoint of DeepSpeed 0.19, written from a stream, which its engines load under any ZeRO stage.

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

from engine.checkpoint.container import disk_errors
from engine.checkpoint.interchange.sinks.outgoing import Outgoing, own_memory
from engine.checkpoint.interchange.source_model import SourceWeights
from engine.checkpoint.interchange.sources.universal import FOLDER, LATEST
from engine.checkpoint.manifest import WEIGHT
from engine.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Moments that DeepSpeed's loader knows under ZeRO-3."""
MOST_GROUPS = 1024
"""Number of empty groups in the file: DeepSpeed skips its own groups from the first on that has no entry there."""


def write_universal(outgoing: Outgoing, output: Path) -> tuple[int, list[str]]:
    """Write weights, Adam's moments and the step into `output`, a new or empty folder.

    Returns the number of parameters on the other side, and the names of moments that are left out.

    Raises:
        CheckpointError: the source is damaged, lacks a moment of Adam's for some parameter, or the output cannot be
            written.
    """
    opened, names = outgoing.opened, outgoing.target.tensors
    check_moments(opened)
    for tensor in names:
        _check_name(opened.source.origin, tensor)
    step = opened.step or 0
    tag = f"step-{step:08d}"
    folder = output / tag
    for name in outgoing.target.parameters:
        for state, file in ((WEIGHT, "fp32"), *((moment, moment) for moment in MOMENTS)):
            for tensor, values in outgoing.tensors(name, state):
                _save({"param": own_memory(values)}, folder / FOLDER / tensor / f"{file}.pt")
                del values  # before the next one is made
    for tensor in names:
        _save(_step(step), folder / FOLDER / tensor / "step.pt")
    _save(_optimizer_state(step), folder / FOLDER / "optimizer_state.pt")
    # ZeRO-3 looks for the second name, the others for the first.
    for prefix in ("", "zero_pp_rank_0_"):
        _save(_model_states(step), folder / f"{prefix}mp_rank_00_model_states.pt")
    with disk_errors(output):
        (output / LATEST).write_text(tag, encoding="utf-8")
    return len(names), [moment for moment in opened.moments if moment not in MOMENTS]


def check_moments(opened: SourceWeights) -> None:
    """Raise `CheckpointError` unless every parameter has Adam's two moments."""
    names = opened.map.parameters
    odd = {name: held for name in names if not set(MOMENTS) <= set(held := opened.moments_of(name))}
    if odd:
        name, moments = next(iter(odd.items()))
        held = ", ".join(moments) or "no moments"
        raise CheckpointError(
            f"a universal checkpoint cannot be made of {opened.source.origin}: {name} has {held} (as {len(odd)} of "
            f"{len(names)} parameters)",
            f"{' and '.join(MOMENTS)} of every parameter: DeepSpeed loads no others",
            "convert the weights alone: --to huggingface, --to deepspeed, or --to dcp",
        )


def _check_name(origin: str, name: str) -> None:
    """Raise `CheckpointError` for a name that is no folder's: it becomes one, and may not lead elsewhere."""
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
        raise CheckpointError(
            f"{origin}: the parameter name {name!r} is not that of a folder", "names without slashes", "use another one"
        )


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


def _save(content: Any, path: Path) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # what torch makes of a write that failed
            raise OSError(str(error).splitlines()[0]) from error
