"""Published files whose tensors have older names: a source under the names that a form's table has."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.checkpoint.interchange.sources.source import Source
from engine.parallel.sharding import Shape

_SUFFIXES = {".gamma": ".weight", ".beta": ".bias"}
"""Names of a norm's parameters in files that were converted from TensorFlow (BERT)."""


class Renamed:
    """A source whose tensors have other names: `names` is new -> old, for every tensor."""

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    @property
    def origin(self) -> str:
        return self._source.origin

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    @property
    def shapes(self) -> Mapping[str, Shape]:
        held = self._source.shapes
        return {new: held[old] for new, old in self._names.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._names[name])

    def read(self, name: str, first: int, end: int, dim: int = 0) -> torch.Tensor:
        return self._source.read(self._names[name], first, end, dim)


def renamed(source: Source, prefix: str, heads: tuple[str, ...], spellings: Mapping[str, str]) -> Source:
    """Return a source under the names of a form, whose parameters begin with `prefix`, but for those of its heads.

    Files of a model without heads lack the prefix (`wte.weight` of GPT-2). `spellings` are other beginnings of names ->
    those of the form.
    """
    held = source.shapes
    bare = bool(prefix) and not any(name.startswith(prefix) for name in held)

    def new(name: str) -> str:
        for old, suffix in _SUFFIXES.items():
            if name.endswith(old):
                name = name.removesuffix(old) + suffix
        for other, beginning in spellings.items():
            if name.startswith(other):
                return beginning + name.removeprefix(other)
        return prefix + name if bare and not name.startswith(heads) else name

    names = {new(name): name for name in held}
    # two tensors of one name would hide one of them: then names stay, and the unknown one is told
    return Renamed(source, names) if len(names) == len(held) and any(a != b for a, b in names.items()) else source
