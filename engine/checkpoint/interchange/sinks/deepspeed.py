"""A checkpoint as DeepSpeed's ZeRO-1 writes it from one rank with one parameter group, written from a stream.

Its own `zero_to_fp32` reads it, and so do engines of the same module: on one rank under ZeRO-1 with one parameter group
with `load_checkpoint`, in any layout the weights alone (`load_module_only=True`). Moments for other layouts are the
matter of universal checkpoints. The files are made with empty tensors by `torch.save`, which says at which byte each
begins, and are filled in parameter by parameter.

The moments are in the form of DeepSpeed's elastic checkpoints, a list by group, because its loader then leaves the
hyperparameters as the engine's optimizer was built with them.
"""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.container import disk_errors
from engine.checkpoint.interchange.sinks.outgoing import Outgoing
from engine.checkpoint.interchange.sinks.universal import MOMENTS, check_moments
from engine.checkpoint.interchange.sources.pickles import open_torch_file, stored_tensor
from engine.checkpoint.manifest import WEIGHT

MODEL_FILE, OPTIMIZER_FILE = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
_SLICE_ROWS_BYTES = 16 << 20


def write_deepspeed(outgoing: Outgoing, output: Path) -> int:
    """Write weights, and where they are asked for Adam's moments; return the number of tensors.

    Raises:
        CheckpointError: the source is damaged or lacks moments that are wanted, or the output cannot be written.
    """
    if outgoing.with_moments:
        check_moments(outgoing.opened)
    step = outgoing.opened.step or 0
    folder = output / f"global_step{step}"
    shapes = outgoing.target.tensors
    starts, total = {}, 0
    for name, shape in shapes.items():
        starts[name] = total
        total += math.prod(shape)
    states = (WEIGHT, *(MOMENTS if outgoing.with_moments else ()))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        module = _ModelFile(folder / MODEL_FILE, shapes, step)
        flats = _OptimizerFile(folder / OPTIMIZER_FILE, total, states[1:], step)
        for name in outgoing.target.parameters:
            for state in states:
                for tensor, values in outgoing.tensors(name, state):
                    flats.write(state, starts[tensor], values)
                    if state == WEIGHT:
                        module.write(tensor, values)
                    del values  # before the next one is made
        # last: a folder without it is no checkpoint to DeepSpeed
        (output / "latest").write_text(folder.name, encoding="utf-8")
    return len(shapes)


class _ModelFile:
    """File of model states: the module's weights one by one, and what says which ones there are."""

    def __init__(self, path: Path, shapes: dict[str, Any], step: int) -> None:
        self._path = path
        _save_empty(
            lambda empty: {
                "module": {name: empty(shape) for name, shape in shapes.items()},
                "buffer_names": [],
                "optimizer": None,
                "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
                "frozen_param_shapes": None,
                "frozen_param_fragments": None,
                "shared_params": {},
                "lr_scheduler": None,
                "global_steps": step,
                "global_samples": 0,
                "skipped_steps": 0,
                "dp_world_size": 1,
                "mp_world_size": 1,
                "ds_version": importlib.metadata.version("deepspeed"),
            },
            path,
        )
        held = open_torch_file(path)["module"]
        self._starts = {name: _start(path, held[name]) for name in shapes}

    def write(self, tensor: str, values: torch.Tensor) -> None:
        _write_at(self._path, self._starts[tensor], values)


class _OptimizerFile:
    """File of optimizer states: flat buffers of the weights and of each moment."""

    def __init__(self, path: Path, numel: int, moments: tuple[str, ...], step: int) -> None:
        self._path = path

        def content(empty: Any) -> dict[str, Any]:
            group = {moment: empty((numel,)) for moment in moments}
            return {
                "optimizer_state_dict": {
                    "zero_stage": 1,
                    "partition_count": [1],
                    "single_partition_of_fp32_groups": [empty((numel,))],
                    "base_optimizer_state": [group | {"step": float(step)}] if moments else [{}],
                    "base_optimizer_state_step": float(step),
                    "group_paddings": [0],
                    "clip_grad": 0.0,
                    "overflow": False,
                    "ds_version": importlib.metadata.version("deepspeed"),
                },
                "ds_version": importlib.metadata.version("deepspeed"),
            }

        _save_empty(content, path)
        held = open_torch_file(path)["optimizer_state_dict"]
        self._starts = {WEIGHT: _start(path, held["single_partition_of_fp32_groups"][0])}
        self._starts |= {moment: _start(path, held["base_optimizer_state"][0][moment]) for moment in moments}

    def write(self, state: str, first: int, values: torch.Tensor) -> None:
        _write_at(self._path, self._starts[state] + 4 * first, values)


def _save_empty(content: Any, path: Path) -> None:
    """Save what `content` makes of a function that gives tensors without elements; their bytes are left empty."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # costs a second to import

    with FakeTensorMode():
        made = content(lambda shape: torch.empty(shape))
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(made, path)


def _start(path: Path, tensor: torch.Tensor) -> int:
    (box,) = stored_tensor(path, tensor).boxes
    return box.find()[0].start


def _write_at(path: Path, start: int, values: torch.Tensor) -> None:
    """Write a tensor's elements, row-major, at a byte of a file, some rows at a time."""
    rows = max(1, _SLICE_ROWS_BYTES // (4 * max(1, math.prod(values.shape[1:]))))
    with path.open("r+b", buffering=0) as file:
        file.seek(start)
        for first in range(0, values.shape[0], rows):
            content = values[first : first + rows].float().contiguous().reshape(-1).numpy().view(np.uint8).data
            while len(content):
                content = content[file.write(content) or 0 :]
