"""A checkpoint that DeepSpeed itself wrote (ZeRO 1 to 3, pipeline and tensor ranks, too), read without running it.

How a rank's flat buffers hold the parameters follows DeepSpeed 0.19's `utils/zero_to_fp32.py`: under ZeRO-1 and 2 the
ranks' buffers of a group joined hold its parameters one after the other, under ZeRO-3 each rank holds the ceiling of
its share of each. The optimizer's moments lie in buffers of the same layout. Nothing but headers is read to open it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.interchange.sources.pickles import Record, open_torch_file, stored_tensor, unusable
from engine.checkpoint.interchange.sources.stored import Extent, StoredTensor, cut, whole
from engine.checkpoint.interchange.sources.unnamed import Parts, Unnamed, read_facts
from engine.checkpoint.manifest import WEIGHT
from engine.checkpoint.storage import Location
from engine.errors import CheckpointError
from engine.logs import logger
from engine.parallel.sharding import Shape

log = logger(__name__)

ALLOWED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""All that the restricted unpickler may build beside tensors and plain containers."""
RECORDS = r"argparse\.Namespace|(megatron|deepspeed)\.[\w.]+|numpy\.(core|_core)\.multiarray\._reconstruct|numpy\.\w+"
"""Names that inert stand-ins are built for: arguments and random states of Megatron's kin."""
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")

Pieces = dict[str, StoredTensor]


def open_deepspeed(folder_or_parent: Location) -> Unnamed:
    """Open a checkpoint: the folder of one, or the folder above, whose `latest` names one.

    Raises:
        CheckpointError: it is none, it is not whole, or a file holds what may not be built.
    """
    folder = _tag(folder_or_parent)
    optimizers, models = _by_rank(folder, _OPTIMIZER), _by_rank(folder, _MODEL)
    if not models:
        raise _not_whole(folder, "no file of model states")
    states: dict[str, Parts] = {WEIGHT: {}}
    step, settings = None, {}
    try:
        for model_rank in sorted(models):
            model_files = models[model_rank]
            content = {rank: _open(path) for rank, path in sorted(model_files.items())}
            first = content[min(content)]
            _check_model_ranks(folder, models, first)
            settings = settings or _settings(first)
            if not optimizers and first.get("param_shapes"):
                log.warning("%s holds no optimizer states: the weights are those of its model states, rounded", folder)
            step = step if step is not None else first.get("global_steps")
            held = (
                _of_zero(folder, content, model_files, optimizers.get(model_rank, {}))
                if optimizers
                else _of_module(first, model_files)
            )
            for state, pieces in held.items():
                target = states.setdefault(state, {})
                for name, tensor in pieces.items():
                    target.setdefault(name, []).append(tensor)
        if not states[WEIGHT]:
            states[WEIGHT] = _of_layers(folder)
    except CheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _not_whole(folder, f"{type(error).__name__}: {error}") from error
    # What stages of a pipeline share (a tied embedding) is in the files of each of them: the first one's parts are all.
    fewest = min(map(len, states[WEIGHT].values()))
    states = {state: {name: held[:fewest] for name, held in parts.items()} for state, parts in states.items()}
    return Unnamed(
        origin=str(folder),
        kind="a checkpoint of DeepSpeed's",
        states=states,
        step=None if step is None else int(step),
        facts=read_facts(folder, folder_or_parent),
        settings=settings,
    )


def _check_model_ranks(folder: Location, found: Iterable[int], content: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where files of model-parallel ranks are missing: what they hold would be."""
    size = content.get("mp_world_size")
    if isinstance(size, int) and not set(range(size)) <= set(found):
        raise _not_whole(folder, f"model states of the model-parallel ranks {sorted(found)}, it was saved by {size}")


def _of_zero(
    folder: Location, models: Mapping[int, Any], model_files: Mapping[int, Location], files: Mapping[int, Location]
) -> dict[str, Pieces]:
    """Return the states of one model-parallel rank from the buffers of all its data ranks."""
    ranks = [_open(files[rank])["optimizer_state_dict"] for rank in sorted(files)]
    count = ranks[0]["partition_count"] if ranks else 0
    # one number per parameter group under ZeRO-1 and 2
    count = max(count) if isinstance(count, list | tuple) else int(count)
    # A missing rank's range would shift everything behind it in a joined buffer, in silence.
    if not files or sorted(files) != list(range(count)):
        raise _not_whole(folder, f"optimizer states of ranks {sorted(files)}, it was saved by {count}")
    paths = [files[rank] for rank in sorted(files)]
    model = models[min(models)]
    shapes = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
    is_sliced = "single_partition_of_fp32_groups" in ranks[0]
    buffers = _buffers(ranks, is_sliced)
    found: dict[str, Pieces] = {}
    for state, by_rank in buffers.items():
        # by_rank[rank][group]: a flat tensor
        extents = [[_extents(path, flat) for flat in flats] for path, flats in zip(paths, by_rank, strict=True)]
        dtype = by_rank[0][0].dtype
        paddings = ranks[0].get("param_alignment_paddings")
        made = _joined(shapes, extents, paddings, dtype) if is_sliced else _interleaved(shapes, extents, dtype)
        found[state] = dict(made)
    found[WEIGHT] |= _frozen(models, model_files)
    for alias, name in dict(model.get("shared_params") or {}).items():
        found[WEIGHT][alias] = found[WEIGHT][name]
    return found


def _buffers(ranks: Sequence[Any], is_sliced: bool) -> dict[str, list[list[torch.Tensor]]]:
    """Return the flat buffers of each state: of each rank, for each group."""
    key = "single_partition_of_fp32_groups" if is_sliced else "fp32_flat_groups"
    found: dict[str, list[list[torch.Tensor]]] = {WEIGHT: [list(rank[key]) for rank in ranks]}
    inner = [rank.get("base_optimizer_state" if is_sliced else "optimizer_state_dict") for rank in ranks]
    by_group = [_states_of_groups(one, is_sliced, len(found[WEIGHT][0])) for one in inner]
    if not all(by_group):
        return found  # weights alone
    for moment in sorted({name for group in by_group[0] for name in group} - {"step"}):
        flats = [[group.get(moment) for group in groups] for groups in by_group]
        if all(isinstance(flat, torch.Tensor) and flat.dim() == 1 for each in flats for flat in each):
            found[moment] = flats  # pyright: ignore[reportArgumentType]
    return found


def _states_of_groups(inner: Any, is_sliced: bool, number: int) -> list[dict[Any, Any]]:
    """Return the optimizer's states of each group: of torch's dictionary, or of an elastic checkpoint's list."""
    if isinstance(inner, list):
        return [dict(group) for group in inner]
    if not isinstance(inner, dict) or not isinstance(inner.get("state"), dict):
        return []
    ids = [group["params"][0] for group in inner["param_groups"]] if is_sliced else range(number)
    return [dict(inner["state"].get(index, {})) for index in ids]


def _extents(path: Location, flat: torch.Tensor) -> Extent:
    (part,) = stored_tensor(path, flat).boxes
    return part.find()[0]


def _joined(
    shapes: list[dict[str, Shape]], extents: list[list[Extent]], paddings: Any, dtype: torch.dtype
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of ZeRO-1 and 2: a group's buffers of all ranks, joined, hold its parameters in order."""
    for number, group in enumerate(shapes):
        flat, at = [rank[number] for rank in extents], 0
        for index, (name, shape) in enumerate(group.items()):
            numel = math.prod(shape)
            yield name, whole(shape, dtype, cut(flat, at, numel, dtype.itemsize))
            at += numel + (int(paddings[number][index]) if paddings is not None else 0)


def _interleaved(
    shapes: list[dict[str, Shape]], extents: list[list[Extent]], dtype: torch.dtype
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of ZeRO-3: a rank's joined buffers hold an equal share of each parameter, padded at the end."""
    at = 0
    for group in shapes:
        for name, shape in group.items():
            numel = math.prod(shape)
            # 10 elements on 4 ranks: shares of 3, and the last rank holds 1 and 2 of padding, which `cut` leaves off.
            share = -(-numel // len(extents))
            parts = [piece for rank in extents for piece in cut(rank, at, share, dtype.itemsize)]
            yield name, whole(shape, dtype, cut(parts, 0, numel, dtype.itemsize))
            at += share


def _frozen(models: Mapping[int, Any], files: Mapping[int, Location]) -> Pieces:
    """Return the parameters without an optimizer: whole under ZeRO-1 and 2, a share of each rank's under ZeRO-3."""
    found: Pieces = {}
    for name, shape in dict(models[min(models)].get("frozen_param_shapes") or {}).items():
        fragments = {rank: models[rank]["frozen_param_fragments"][name] for rank in sorted(models)}
        parts = [_extents(files[rank], fragment.view(-1)) for rank, fragment in fragments.items()]
        dtype = fragments[min(fragments)].dtype
        found[name] = whole(tuple(shape), dtype, cut(parts, 0, math.prod(shape), dtype.itemsize))
    return found


def _of_module(content: Mapping[str, Any], files: Mapping[int, Location]) -> dict[str, Pieces]:
    """Return the weights of a checkpoint without ZeRO: the module's own, in the dtype that it was trained in."""
    module, path = content.get("module"), files[min(files)]
    held = module.items() if isinstance(module, dict) else ()
    buffers = set(content.get("buffer_names") or ())
    tensors = {name: value for name, value in held if isinstance(value, torch.Tensor) and name not in buffers}
    return {WEIGHT: {name: stored_tensor(path, value) for name, value in tensors.items()}}


def _of_layers(folder: Location) -> Parts:
    """Return the weights of a pipeline whose ranks wrote one file per layer, and no optimizer's state."""
    found: Parts = {}
    for path in _files(folder):
        match = _LAYER.fullmatch(path.name)
        if match is None:
            continue
        for name, value in _open(path).items():
            if isinstance(value, torch.Tensor):
                found.setdefault(f"{int(match.group(1))}.{name}", []).append(stored_tensor(path, value))
    return found


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of Megatron's kin: a namespace, or GPT-NeoX's dictionary."""
    args = content.get("args")
    return dict(vars(args)) if isinstance(args, Record) else dict(args) if isinstance(args, dict) else {}


def _open(path: Location) -> dict[str, Any]:
    content = open_torch_file(path, ALLOWED, RECORDS)
    if not isinstance(content, dict):
        raise unusable(path, "it holds no dictionary")
    return content


def _tag(folder_or_parent: Location) -> Location:
    latest = folder_or_parent / "latest"
    if not latest.is_file():
        return folder_or_parent
    name = latest.read_text(encoding="utf-8").strip()
    # text from a file: it may not lead out of the folder
    if not name or Path(name).name != name:
        raise _not_whole(folder_or_parent, f"its file `latest` names {name!r}")
    return folder_or_parent / name


def _by_rank(folder: Location, pattern: re.Pattern[str]) -> dict[int, dict[int, Location]]:
    """Return files by model-parallel rank and data rank."""
    found: dict[int, dict[int, Location]] = {}
    for path in _files(folder):
        if match := pattern.fullmatch(path.name):
            found.setdefault(int(match.group(2)), {})[int(match.group(1) or 0)] = path
    return found


def _files(folder: Location) -> list[Location]:
    return sorted(folder.iterdir(), key=lambda path: path.name) if folder.is_dir() else []


def _not_whole(path: Location, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as DeepSpeed's checkpoint: {what}",
        "every rank's files of one checkpoint of ZeRO 1 to 3",
        "name the folder that `save_checkpoint` was given, or one of its tags",
    )
