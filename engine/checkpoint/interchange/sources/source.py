"""The interface of a source of weights, and the strict comparison of what it holds with what a model needs.

Nothing is invented: a tensor that is missing, unknown or of another shape is an error by name, and so is a tensor that
repeats another one (a tied head) with other values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import torch

from engine.checkpoint.interchange.mapping import ModelMap, ParameterMap
from engine.errors import ConfigError
from engine.parallel.sharding import Shape

SHOWN = 3
"""Largest number of names that an error lists."""
BLOCK_BYTES = 16 << 20
"""Bytes of two tensors that are compared at a time."""


class Source(Protocol):
    """Tensors by name. `read` returns memory of its own."""

    @property
    def bytes_read(self) -> int:
        """Bytes of all that was read so far."""
        ...

    @property
    def origin(self) -> str:
        """Path or URL, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of each tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is stored."""
        ...

    def read(self, name: str, first: int, end: int, dim: int = 0) -> torch.Tensor:
        """Return the indices [first, end) along `dim` (0 or 1) of a tensor, all of its other dimension.

        Raises:
            ConfigError, CheckpointError: the file cannot be read.
        """
        ...


def read_parameter(source: Source, one: ParameterMap, first: int = 0, end: int | None = None) -> torch.Tensor:
    """Return the rows [first, end) of a parameter of ours in fp32, and contiguous.

    Raises:
        ConfigError: a value is not finite; or as `Source.read`.
    """
    values = one.ours(source.read, first, end).float().contiguous()
    if not all_finite(values):
        raise not_finite(source.origin, one.tensors)
    return values


def all_finite(values: torch.Tensor) -> bool:
    """Return True if no element is NaN or infinite. Makes no copy of the values, as `torch.isfinite` does."""
    if not values.numel():
        return True
    # NaN is the least and the largest of whatever it is among
    return all(map(math.isfinite, torch.stack(torch.aminmax(values)).tolist()))


def check_source(
    source: Source, model_map: ModelMap, unused: Iterable[str] = (), described_by: str = "its config.json"
) -> None:
    """Check that a source holds the tensors of a model, and no others but copies of them.

    `unused` are patterns of tensors that mean nothing; `described_by` says in words where the model is described. Reads
    the copies and what they repeat.

    Raises:
        ConfigError: names the tensors that are missing, unknown, of another shape, or no copies.
    """
    held, wanted = source.shapes, model_map.tensors
    missing, strange = [name for name in wanted if name not in held], unknown(source, model_map, unused)
    wanted = dict(wanted) | {copy: wanted[of] for copy, of in model_map.copies.items() if of in wanted}
    misshapen = [name for name, shape in wanted.items() if name in held and tuple(held[name]) != tuple(shape)]
    problems = [f"no file holds {listed(missing)}"] if missing else []
    if strange:
        problems.append(f"the model has no place for {listed(strange)}")
    if misshapen:
        told = [f"{name} has shape {tuple(held[name])} and not {tuple(wanted[name])}" for name in misshapen]
        problems.append(listed(told, "; "))
    if not problems:
        copies = model_map.copies.items()
        problems = [
            _contradiction(copy, of, described_by)
            for copy, of in copies
            if copy in held and not _equal(source, copy, of)
        ]
    if problems:
        where = described_by.removeprefix("its ")
        raise ConfigError(
            f"the weights in {source.origin} are not those of {described_by}: {'; '.join(problems)}",
            f"exactly the tensors of the model, in the shapes that {where} says",
            f"complete the folder, or mend {where} (model_type, architectures, number of layers, tied embeddings; "
            "vocab_size counts the rows of a padded vocabulary, too)",
        )


def unknown(source: Source, model_map: ModelMap, unused: Iterable[str] = ()) -> list[str]:
    """Return the tensors of a source that a model has no place for, sorted; `unused` are patterns of some that mean
    nothing."""
    known = model_map.tensors.keys() | model_map.copies.keys()
    pattern = re.compile("|".join(f"(?:{one})" for one in unused) or "(?!)")
    return sorted(name for name in source.shapes if name not in known and not pattern.fullmatch(name))


def _contradiction(copy: str, of: str, described_by: str) -> str:
    return f"{copy} is not {of}, although {described_by.removeprefix('its ')} ties them"


def _equal(source: Source, copy: str, of: str) -> bool:
    """Compare two tensors of one shape bit for bit, some rows at a time."""
    shape = source.shapes[copy]
    row_bytes = 4 * max(1, int(torch.Size(shape[1:]).numel()))
    block = max(1, BLOCK_BYTES // row_bytes)
    return all(
        torch.equal(
            source.read(copy, first, min(first + block, shape[0])), source.read(of, first, min(first + block, shape[0]))
        )
        for first in range(0, shape[0], block)
    )


def not_finite(origin: str, names: Collection[str]) -> ConfigError:
    """Return the error for weights that are NaN or infinite, of which nothing can be computed."""
    return ConfigError(
        f"weights in {origin} are not finite: {listed(list(names))}",
        "numbers",
        "take a checkpoint from before they became NaN or infinite",
    )


def listed(names: list[str], separator: str = ", ") -> str:
    """Return the first few of some names as text, with the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more
