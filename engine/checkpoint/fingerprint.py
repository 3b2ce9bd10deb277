"""A hash of all weights and moments that no layout can change: equal states have equal fingerprints.

Each real element is mixed with its name and its index in the whole parameter by the finaliser of SplitMix64
(Steele, Lea and Flood 2014, figure 17), and the results are added modulo 2**64: a sum does not ask who holds what.
It is bitwise (0.0 and -0.0 differ) and a check against mistakes, not against malice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import xxhash

from engine.checkpoint.geometry import Box, dims, flat_boxes, flat_index, strides, to_whole
from engine.checkpoint.load import Files
from engine.checkpoint.manifest import WEIGHT, Manifest, key_of, moment_state
from engine.checkpoint.staging import stored_shards
from engine.checkpoint.writers import Writer, writers_of
from engine.parallel import collectives
from engine.parallel.groups import Groups
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard, Placement

_CHUNK = 1 << 20
"""Elements mixed at a time: 8 MiB for each of a few arrays of 64-bit numbers."""
_MASK = (1 << 64) - 1


def fingerprint(shards: list[ParameterShard], placements: list[Placement], groups: Groups) -> str:
    """Return 16 hex digits over every weight and moment of the run, each counted once. Collective over `groups.world`.

    Under ZeRO-0 the copies beyond the first data rank's are not looked at.
    """
    own = partial_sum(shards, placements, Writer.of(groups), groups.layout.tensor)
    return combine(collectives.gather_objects(own, groups.world))


def partial_sum(shards: list[ParameterShard], placements: list[Placement], writer: Writer, tensor_size: int) -> int:
    """Return one rank's share of the fingerprint: the sum over the elements that it would store."""
    total = 0
    for shard, length in stored_shards(shards, placements, writer, tensor_size):
        states = {WEIGHT: shard.weight} | {moment_state(name): values for name, values in shard.moments.items()}
        for state, values in states.items():
            flat = values[:length].detach()
            total += range_sum(state, shard.spec, shard.start, flat, writer.tensor_rank, tensor_size)
    return total & _MASK


def combine(sums: list[int]) -> str:
    """Return the fingerprint from every rank's share."""
    # Python's integers do not wrap by themselves.
    return f"{sum(sums) & _MASK:016x}"


def fingerprint_of_checkpoint(path: Path, manifest: Manifest) -> str:
    """Return the fingerprint of a checkpoint by reading all of it; equals that of the state it was saved from."""
    files, tensor_size = Files(path, manifest), manifest.layout.tensor
    sums = []
    for name, placement in manifest.placements.items():
        for writer in writers_of(placement, manifest.data_size, tensor_size):
            start, _ = manifest.range_of(name, writer)
            for state in manifest.states_of(name):
                flat = torch.from_numpy(files.values(state, name, writer))
                sums.append(range_sum(state, placement.spec, start, flat, writer.tensor_rank, tensor_size))
    return combine(sums)


def range_sum(
    state: str, spec: ParameterSpec, start: int, flat: torch.Tensor, tensor_rank: int, tensor_size: int
) -> int:
    """Sum of the mixed elements of a flat fp32 range (from `start`) of one local part, modulo 2**64."""
    key = np.uint64(xxhash.xxh3_64_intdigest(key_of(state, spec.name).encode()))
    local, shape = dims(spec.local_shape(tensor_size)), dims(spec.stored_shape)
    total = 0
    for at in range(0, flat.numel(), _CHUNK):
        bits = flat[at : at + _CHUNK].cpu().float().numpy().view(np.uint32)
        # flat range of the local part -> boxes of it -> boxes of the whole parameter, whose indices no layout changes
        for box in flat_boxes(local, start + at, bits.size):
            for part, whole in to_whole(spec, box, tensor_rank, tensor_size):
                # A box of row-major storage is a strided view: `bits` has the flat local elements from start + at on.
                # Local shape (3, 4), start + at = 2, box from (1, 0) of size (1, 4): offset 4 - 2 = 2, elements 4 to 7.
                offset = flat_index(part.start, local) - start - at
                values = np.lib.stride_tricks.as_strided(
                    bits[offset:], part.size, [stride * bits.itemsize for stride in strides(local)], writeable=False
                )
                total += int(_mix(key, _indices(whole, shape), values).sum(dtype=np.uint64))
    return total & _MASK


def _indices(box: Box, shape: tuple[int, ...]) -> np.ndarray:
    """Index in the flattened whole parameter of every element of a box, uint64, of the box's size."""
    # Sum over dimensions of index * stride, by broadcasting: (n0, 1) + (1, n1) -> (n0, n1).
    result = np.zeros((1,) * len(shape), dtype=np.uint64)
    for dim, stride in enumerate(strides(shape)):
        along = np.arange(box.start[dim], box.start[dim] + box.size[dim], dtype=np.uint64) * np.uint64(stride)
        result = result + along.reshape([-1 if other == dim else 1 for other in range(len(shape))])
    return result


def _mix(key: np.uint64, index: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash per element of (key, index, bits); arithmetic modulo 2**64."""
    # Two rounds: with one, (index + 1, bits) and (index, bits ^ 1) could have the same hash.
    return _finalise(_finalise(index + key) ^ bits.astype(np.uint64))


def _finalise(z: np.ndarray) -> np.ndarray:
    # 2**64 / golden ratio, so that 0 is not mapped to 0; arrays of uint64 wrap without a warning
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
