"""The fp32 master weights of a checkpoint that DeepSpeed itself wrote (ZeRO 1 to 3), read without running any of it.

Such files are pickles. They are opened with torch's restricted unpickler alone (`weights_only`), which builds tensors,
plain containers and the classes of `ALLOWED`, all of them plain records; anything else in a file is an error, and
nothing of it runs. How a rank's flat buffers hold the parameters follows DeepSpeed 0.19's `utils/zero_to_fp32.py`:
under ZeRO-1 and 2 the ranks' buffers of a group joined hold its parameters one after the other, under ZeRO-3 each
rank holds the ceiling of its share of each. Tensor-parallel and expert-parallel files are refused.
"""

from __future__ import annotations

import importlib
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError

ALLOWED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""All that the restricted unpickler may build beside tensors and plain containers."""
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")

Weights = dict[str, torch.Tensor]


def read_weights(folder_or_parent: Path) -> Weights:
    """Return fp32 weights by the names of the module that was saved; tied ones under each of their names.

    `place` is the folder of one checkpoint, or the folder above, whose `latest` names one.

    Raises:
        CheckpointError: it is none, it is not whole, or a file holds what may not be built.
    """
    folder = _tag(folder_or_parent)
    optimizers = _by_rank(folder, _OPTIMIZER)
    models = _by_rank(folder, _MODEL)
    if not optimizers or not models:
        raise _unusable(folder, "no file of model states, or none of optimizer states: ZeRO 1 to 3 have both")
    # Any rank's will do: shapes and names are equal in all.
    model = _open(models[min(models)])
    try:
        states = [_open(optimizers[rank])["optimizer_state_dict"] for rank in sorted(optimizers)]
        stage, count = int(states[0]["zero_stage"]), states[0]["partition_count"]
        # one number per parameter group under ZeRO-1 and 2
        count = max(count) if isinstance(count, list) else int(count)
        # A missing rank's range would shift everything behind it in a joined buffer, in silence.
        if sorted(optimizers) != list(range(count)):
            raise _unusable(folder, f"optimizer states of ranks {sorted(optimizers)}, it was saved by {count}")
        key = "single_partition_of_fp32_groups" if stage <= 2 else "fp32_flat_groups"
        buffers = [state[key] for state in states]
        shapes = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
        paddings = states[0].get("param_alignment_paddings")
        found = _joined(shapes, buffers, paddings) if stage <= 2 else _interleaved(shapes, buffers)
        weights = dict(found)
        weights |= {name: weights[shared] for name, shared in dict(model.get("shared_params") or {}).items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _unusable(folder, f"{type(error).__name__}: {error}") from error
    return weights


def _joined(shapes: list[dict[str, Any]], buffers: list[Any], paddings: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of ZeRO-1 and 2: a group's buffers of all ranks, joined, hold its parameters in order."""
    for number, group in enumerate(shapes):
        flat, at = torch.cat([rank[number].detach().float() for rank in buffers]), 0
        for index, (name, shape) in enumerate(group.items()):
            numel = math.prod(shape)
            # clone: a view would keep the whole joined buffer in memory
            yield name, flat[at : at + numel].view(shape).clone()
            at += numel + (int(paddings[number][index]) if paddings is not None else 0)


def _interleaved(shapes: list[dict[str, Any]], buffers: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of ZeRO-3: a rank's joined buffers hold an equal share of each parameter, padded at the end."""
    flats, at = [torch.cat([group.detach().float() for group in rank]) for rank in buffers], 0
    for group in shapes:
        for name, shape in group.items():
            numel = math.prod(shape)
            # 10 elements on 4 ranks: shares of 3, and the last rank holds 1 and 2 of padding, which [:numel] cuts off.
            share = -(-numel // len(flats))
            yield name, torch.cat([flat[at : at + share] for flat in flats])[:numel].view(shape)
            at += share


def _open(path: Path) -> dict[str, Any]:
    """Return the content of a file, built from tensors, plain containers and `ALLOWED` alone."""
    allowed = []
    for name in ALLOWED:
        module, _, attribute = name.rpartition(".")
        allowed.append(getattr(importlib.import_module(module), attribute))
    try:
        with torch.serialization.safe_globals(allowed):
            # mmap: of a file of optimizer states only the fp32 weights are read, not the moments
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise _unusable(path, f"it cannot be read ({str(error).splitlines()[0]})") from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {named.group(1)}" if named else "it is no plain pickle"
        raise _unusable(path, f"{what}, which is not on the list of what may be built") from error
    if not isinstance(content, dict):
        raise _unusable(path, "it holds no dictionary")
    return content


def _tag(folder_or_parent: Path) -> Path:
    latest = folder_or_parent / "latest"
    if not latest.is_file():
        return folder_or_parent
    name = latest.read_text(encoding="utf-8").strip()
    # text from a file: it may not lead out of the folder
    if not name or Path(name).name != name:
        raise _unusable(folder_or_parent, f"its file `latest` names {name!r}")
    return folder_or_parent / name


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in _files(folder):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        if int(match.group(2)) > 0:
            raise _unusable(folder, f"{path.name} is one part of a tensor-parallel or pipelined model")
        found[int(match.group(1) or 0)] = path
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _unusable(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as DeepSpeed's checkpoint: {what}",
        "ZeRO 1 to 3, of one model that is neither tensor-parallel nor pipelined, with every rank's files",
        "name the folder that `save_checkpoint` was given, or one of its tags",
    )
