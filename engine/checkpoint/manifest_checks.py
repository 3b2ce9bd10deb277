"""Checks of a manifest: JSON becomes values, and every name, size and number of writers has to agree with the others.

A manifest is data from outside. After `parse` and `check`, file names cannot leave the folder, the parameters fit
into the bytes of the files, and the files are exactly those of the layout; that the files really have these
bytes is `engine.checkpoint.manifest_json.check_sizes`. Nothing here takes memory on a manifest's word.
"""

from __future__ import annotations

from typing import Any, get_args

from engine.checkpoint.container import ITEM_BYTES, FileRecord
from engine.checkpoint.geometry import real_numel
from engine.checkpoint.manifest import CheckpointState, Manifest
from engine.checkpoint.writers import Writer, data_ranks, stored_numel
from engine.config.resolve import Layout
from engine.parallel.sharding import ParameterSpec, Role, Sharding
from engine.parallel.state import Placement

MAX_RANKS = 1 << 24
"""Largest world that a manifest may claim; bounds every loop over ranks."""
_ROLES = get_args(Role)


def parse(content: dict[str, Any]) -> Manifest:
    """Return the manifest that the JSON content describes.

    Raises:
        KeyError, TypeError or ValueError: it describes none.
    """
    topology = dict(content["topology"])
    zero_stage = _whole(topology.pop("zero_stage"), "zero_stage")
    layout = Layout(**{axis: _whole(topology[axis], axis, least=1) for axis in ("pipe", "data", "sequence", "tensor")})
    state = CheckpointState(
        step=_whole(content["step"], "step"),
        tokens=_whole(content["tokens"], "tokens"),
        zero_stage=zero_stage,
        config_hash=_text(content["config_hash"], "config_hash"),
        **{name: _object(content[name], name) for name in ("config", "sections", "hyperparameters", "versions")},
    )
    parameters = _object(content["parameters"], "parameters")
    moments = tuple(_text(moment, "moments") for moment in content["moments"])
    # a moment's name is part of keys and, converted, of file names
    _require(all(moment.isidentifier() for moment in moments), f"moments {moments}")
    records = [FileRecord(_text(n, "file"), _whole(b, n), _text(h, n)) for n, b, h in content["files"]]
    files = {record.name: record for record in records}
    _require(len(files) == len(records), "a file is listed twice")
    return Manifest(
        state=state,
        layout=layout,
        placements={name: _placement(name, value, moments) for name, value in parameters.items()},
        moments=moments,
        files=files,
        job=_text(content["job"], "job"),
        attempt=_whole(content["attempt"], "attempt"),
    )


def _placement(name: str, value: dict[str, Any], moments: tuple[str, ...]) -> Placement:
    stored = tuple(_whole(size, f"{name}: shape") for size in value["shape"])
    _require(value["dtype"] == "F32", f"{name}: dtype {value['dtype']!r}")
    _require(value["role"] in _ROLES, f"{name}: role {value['role']!r}")
    shape, real_rows, dim = stored, None, value.get("dim")
    if "padded_rows" in value:
        _require(bool(stored) and dim in (None, 0), f"{name}: padded rows")
        real_rows = stored[0]
        shape = (_whole(value["padded_rows"], f"{name}: padded_rows", least=real_rows), *stored[1:])
    blocks: tuple[int, ...] = ()
    if dim is not None:
        _require(_whole(dim, f"{name}: dim") < len(shape), f"{name}: dim {dim} of {len(shape)}")
        blocks = tuple(_whole(block, f"{name}: blocks", least=1) for block in value["blocks"])
        _require(sum(blocks) == shape[dim], f"{name}: blocks {blocks} of a dimension of {shape[dim]}")
        _require(real_rows is None or len(blocks) == 1, f"{name}: padded rows of a fused parameter")
        # one block is the whole dimension, which a spec writes as ()
        blocks = blocks if len(blocks) > 1 else ()
    spec = ParameterSpec(name, shape, Sharding(value["role"], dim, blocks), real_rows)
    stages = tuple(_whole(stage, f"{name}: stages") for stage in value["stages"])
    _require(len(stages) > 0 and list(stages) == sorted(set(stages)), f"{name}: stages {stages}")
    offset = _whole(value["offset"], f"{name}: offset")
    own = tuple(value.get("moments", moments))
    _require(set(own) <= set(moments), f"{name}: moments {own} of {moments}")
    return Placement(spec, stages, offset, _whole(value["partition"], f"{name}: partition", least=1), own)


def check(manifest: Manifest) -> None:
    """Check that the parts of a manifest agree, at little cost whatever they claim. Raises `ValueError`."""
    layout, data_size = manifest.layout, manifest.data_size
    _require(layout.world_size <= MAX_RANKS, f"{layout.world_size} ranks")
    _require(len(set(manifest.moments)) == len(manifest.moments), "a moment is listed twice")
    for name in manifest.files:
        writer = Writer.parse(name)
        # each coordinate is below the size of its axis
        if writer is None or any(map(int.__ge__, writer, (layout.pipe, data_size, layout.tensor))):
            raise ValueError(f"{name!r} is no file of this layout")
    for name, placement in manifest.placements.items():
        spec = placement.spec
        _require(placement.stages[-1] < layout.pipe, f"{name}: stages {placement.stages} of {layout.pipe}")
        split = spec.sharding.dim is not None
        _require(not split or all(b % layout.tensor == 0 for b in spec.blocks()), f"{name}: {layout.tensor} ranks")
        local = spec.local_numel(layout.tensor)
        # The ranges of all data ranks together reach the end of the local part.
        _require(data_size * placement.partition - placement.offset >= local, f"{name}: partition")
        holders = data_ranks(placement, 0, max(real_numel(spec, 0, layout.tensor) - 1, 0), data_size)
        # Before `expected` goes through all writers: a tiny partition would make that loop as long as a parameter.
        _require(len(holders) <= max(len(manifest.files), 1), f"{name}: more writers than there are files")
    _check_bytes(manifest)


def _check_bytes(manifest: Manifest) -> None:
    num_states = {name: len(manifest.states_of(name)) for name in manifest.placements}
    claimed = sum(stored_numel(spec) * num_states[name] for name, spec in manifest.specs.items()) * ITEM_BYTES
    _require(claimed <= manifest.num_bytes, f"parameters of {claimed} bytes in files of {manifest.num_bytes}")
    expected = manifest.expected()
    odd = sorted(expected.keys() ^ manifest.files.keys())
    _require(not odd, f"files that are listed and those that the layout has differ: {odd[:4]}")
    for name, shards in expected.items():
        claimed = sum(length * num_states[held] for held, (_, length) in shards.items()) * ITEM_BYTES
        # < and not ==: a file also has its header
        _require(claimed < manifest.files[name].num_bytes, f"{name}: shards of {claimed} bytes")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _whole(value: Any, where: str, least: int = 0) -> int:
    # True is an int to Python.
    _require(isinstance(value, int) and not isinstance(value, bool) and value >= least, f"{where}: {value!r}")
    return value


def _text(value: Any, where: str) -> str:
    _require(isinstance(value, str), f"{where}: {value!r}")
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    _require(isinstance(value, dict), f"{where}: {value!r}")
    return value
