"""Sources of any format as sides of a comparison and as members of a merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from engine.checkpoint.interchange.initial import format_of, open_source
from engine.checkpoint.interchange.source_model import CONVERTED, SourceModel
from engine.checkpoint.interchange.sources import unknown
from engine.checkpoint.manifest import WEIGHT, CheckpointState, moment_state
from engine.checkpoint.merge import Member
from engine.checkpoint.storage import location_of
from engine.config.schema.model import ModelConfig
from engine.parallel.sharding import ParameterSpec, Shape


def is_foreign(text: str) -> bool:
    """Return True for a folder of another format than ours."""
    return format_of(location_of(text)) not in (None, "palimpsest")


class ForeignSide:
    """A model of another format for a comparison, by our names; what fits nowhere stands under its own name."""

    def __init__(self, opened: SourceModel) -> None:
        self._opened = opened
        self._strange = set(unknown(opened.source, opened.map, opened.unused))

    @property
    def names(self) -> Mapping[str, bool]:
        found, parameters = self._opened.source.shapes, self._opened.map.parameters
        names = {name: one.tensors.keys() <= found.keys() for name, one in parameters.items()}
        return names | dict.fromkeys(self._strange, True)

    def states(self, name: str) -> Sequence[str]:
        moments = () if name in self._strange else self._opened.moments_of(name)
        return (WEIGHT, *map(moment_state, moments))

    def shape(self, name: str) -> Shape:
        """Return the shape of a parameter; of one whose files have another shape that of the first tensor of theirs."""
        held = self._opened.source.shapes
        if name in self._strange:
            return tuple(held[name])
        one = self._opened.map.parameters[name]
        odd = [tensor for tensor, shape in one.tensors.items() if tuple(held[tensor]) != tuple(shape)]
        return tuple(held[odd[0]]) if odd else one.shape

    def rows(self, name: str, state: str, first: int, end: int) -> torch.Tensor:
        source = self._opened.source if state == WEIGHT else self._opened.moments[state.removeprefix("optim.")]
        return self._opened.map.parameters[name].ours(source.read, first, end).float()


def member_of(opened: SourceModel) -> Member:
    """Return a model of another format as a source of a merge."""
    shapes = {name: one.shape for name, one in opened.map.parameters.items()}

    def fill(spec: ParameterSpec, start: int, into: torch.Tensor) -> None:
        width = math.prod(spec.shape[1:])
        first, end = start // width, -(-(start + into.numel()) // width)
        found = opened.map.parameters[spec.name].ours(opened.source.read, first, end).float().reshape(-1)
        into.copy_(found[start - first * width :][: into.numel()])

    state = CheckpointState(
        step=opened.step or 0,
        tokens=0,
        zero_stage=0,
        config_hash="",
        config={"model": opened.model.model_dump(mode="json")},
        sections={CONVERTED: {"kind": "merge", "source": opened.source.origin, "dtype": "fp32"}},
    )
    return Member(opened.source.origin, state, shapes, fill)


def open_checked(text: str, model: ModelConfig | None) -> SourceModel:
    """Open a source of another format that has exactly the tensors of its model, or of `model` where it names none.

    Raises:
        ConfigError, CheckpointError: it has not, or cannot be read.
    """
    return open_source(text, model=model).check()
