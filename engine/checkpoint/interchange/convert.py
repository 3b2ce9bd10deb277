"""Conversion as a stream: source -> mapping -> sink, one parameter at a time, and the comparison of what was written.

Invariant: never more than one parameter of ours and one tensor of theirs in memory, whatever the formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import numpy as np
import torch

from engine.checkpoint.interchange.mapping import ModelMap, ParameterMap
from engine.checkpoint.interchange.source_model import SourceWeights
from engine.checkpoint.interchange.sources import Source
from engine.checkpoint.interchange.sources.source import all_finite, not_finite
from engine.errors import CheckpointError

Verify = Literal["full", "sample", "none"]
BLOCK_BYTES = 16 << 20
"""Bytes of a parameter that are read at a time where a part of it suffices."""
SAMPLED_ROWS = 64
"""Rows at the beginning and at the end of each parameter that `--verify sample` compares."""
Progress = Callable[[int], None]
"""Function that is called with the number of bytes done since the last call."""


class Sink(Protocol):
    """A file format that is written tensor by tensor."""

    def lacks(self, name: str) -> bool:
        """Return False for a tensor that an earlier, unfinished conversion has written."""
        ...

    def write(self, name: str, values: torch.Tensor) -> None:
        """Write a tensor of the planned shape, in any dtype and order in memory."""
        ...


def no_progress(num_bytes: int) -> None:
    """Show nothing."""


def export_weights(source: Source, model_map: ModelMap, sink: Sink, progress: Progress = no_progress) -> None:
    """Write our parameters into a sink as the tensors of another format.

    Raises:
        ConfigError: a weight is not finite.
        CheckpointError: the source is damaged, or the sink cannot be written.
    """
    for name, one in model_map.parameters.items():
        if not any(map(sink.lacks, one.tensors)):
            continue
        value = source.read(name, 0, one.shape[0])
        if not all_finite(value):
            raise not_finite(source.origin, list(one.tensors))
        for tensor in one.tensors:
            sink.write(tensor, one.theirs(tensor, value))
        progress(value.nbytes)


def blocks(one: ParameterMap, read: Callable[[int, int], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield a parameter of ours some rows at a time; `read` gives the rows [first, end)."""
    for first, end in _block_ranges(one):
        yield read(first, end)


def _block_ranges(one: ParameterMap) -> Iterator[tuple[int, int]]:
    row_bytes = 4 * max(1, int(np.prod(one.shape[1:], dtype=np.int64)))
    # A transposed matrix is read by its columns, which takes the whole file's pages: at once, then.
    rows = one.shape[0] if one.transposed else max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, one.shape[0], rows):
        yield first, min(first + rows, one.shape[0])


def compare_weights(
    ours: Source, model_map: ModelMap, written: Source, dtype_of: Callable[[str], torch.dtype], verify: Verify
) -> int:
    """Compare each of our parameters with what the written tensors make of it, bit for bit; return their number.

    `dtype_of` gives the dtype in which a tensor of theirs was written. With `sample` some rows of each are compared.

    Raises:
        CheckpointError: names the first parameter that differs.
    """
    for name, one in model_map.parameters.items():
        dtype = dtype_of(next(iter(one.tensors)))
        for first, end in _ranges(one, verify):
            expected = ours.read(name, first, end).to(dtype)
            # contiguous first: torch transposes a whole matrix by blocks, but compares strided ones element by element
            if not torch.equal(one.ours(written.read, first, end).contiguous(), expected):
                raise CheckpointError(
                    f"{written.origin} is not the model of {ours.origin}: {name} has other values",
                    "the checkpoint's, bit for bit",
                    "convert again; if it happens again, look at the disk",
                )
    return len(model_map.parameters)


def compare_moments(written: SourceWeights, source: SourceWeights, verify: Verify) -> int:
    """Compare the moments that were written with those of their source, as `compare_weights` does; return their number.

    Raises:
        CheckpointError: names the first parameter that differs.
    """
    count = 0
    for moment, values in written.moments.items():
        held = {name: one for name, one in source.map.parameters.items() if moment in written.moments_of(name)}
        theirs = source.moments[moment]
        count += compare_weights(values, ModelMap(held), theirs, theirs.dtype, verify)
    return count


def _ranges(one: ParameterMap, verify: Verify) -> Iterator[tuple[int, int]]:
    rows = one.shape[0]
    if verify == "full":
        yield from _block_ranges(one)
    elif verify == "sample":
        yield 0, min(SAMPLED_ROWS, rows)
        yield max(0, rows - SAMPLED_ROWS), rows
