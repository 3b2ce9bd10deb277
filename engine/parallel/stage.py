"""One pipeline stage: its parameters, its inputs and outputs, and its chunks as one module.

An engine drives one module; here that module holds every chunk of the stage and runs one of them per call. Inside it a
parameter's name begins with the chunk's number, so `StageModule.logical_names` gives the name in the whole model.
A weight that several chunks of a stage use is one `Parameter`: one gradient, one optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from engine.config.schema.stage import RunStage
from engine.parallel.boundary import Boundary, MicroBatchShape, Tensors
from engine.parallel.functions import Functions
from engine.parallel.sharding import ParameterSpec
from engine.plan.cut import ModelChunk


@dataclass(frozen=True)
class Ports:
    """Tensors that go into and out of one chunk."""

    inputs: frozenset[str]
    """Keywords of the chunk that come from the data."""
    incoming: Boundary
    """Tensors received from the chunk before; empty for the model's first chunk."""
    outgoing: Boundary
    """Tensors sent to the next chunk, including those passed on unchanged; empty for the last, which has losses."""


@dataclass(frozen=True)
class PipelineStageSpec:
    """Specification of one pipeline stage during one run stage, shared by engine, pipeline and feed.

    Only `run_stage`, `rows`, what is `frozen` and the boundaries of the `ports` differ between the run stages of a run.
    """

    run_stage: RunStage
    rows: MicroBatchShape
    chunks: tuple[ModelChunk, ...]
    """Chunks of the stage in the model's order."""
    ports: tuple[Ports, ...]
    """Ports of each chunk."""
    parameters: Mapping[str, ParameterSpec]
    """Every parameter of the whole model, by logical name."""
    aliases: Mapping[str, str]
    """Name inside a chunk -> logical name, where the two differ: tied weights."""
    tied_stages: Mapping[str, tuple[int, ...]]
    """Pipeline stages (ascending) of each parameter that several of them hold, by logical name."""
    losses: tuple[str, ...]
    """Names of the last chunk's losses."""
    modules: Callable[[ModelChunk, Functions], nn.Module]
    """Function that builds the modules of a chunk, with the model's head on the last one."""
    frozen: frozenset[str] = frozenset()
    """Parameters of the whole model that are frozen, by logical name."""

    @property
    def inputs(self) -> frozenset[str]:
        """Keywords of all chunks that come from the data; empty if the stage reads none."""
        return frozenset[str]().union(*(ports.inputs for ports in self.ports))

    @property
    def has_head(self) -> bool:
        """True on the stage whose last chunk makes the losses."""
        return any(chunk.last for chunk in self.chunks)


class StageModule(nn.Module):
    """The chunks of one pipeline stage, in the model's order."""

    def __init__(self, chunks: Sequence[nn.Module], aliases: Mapping[str, str]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)
        self.logical_names = {
            f"chunks.{number}.{name}": aliases.get(name, name)
            for number, chunk in enumerate(chunks)
            for name, _ in chunk.named_parameters(remove_duplicate=False)
        }
        """Logical name of every parameter, by each name that it has in this module."""
        self._share()

    def forward(self, *, chunk: int, inputs: Tensors) -> Tensors:
        """Run one chunk on one micro-batch; `inputs` are its keywords, and it returns tensors by name."""
        outputs: Tensors = self.chunks[chunk](**inputs)
        return outputs

    def _share(self) -> None:
        """Make parameters of one logical name one `Parameter`: the first one."""
        # Such as embedding and tied head in the first and last chunk of one stage: their gradients then add up by
        # themselves, and ZeRO sees one parameter.
        found: dict[str, nn.Parameter] = {}
        for name, logical in self.logical_names.items():
            owner_name, _, attribute = name.rpartition(".")
            owner = self.get_submodule(owner_name)
            owner._parameters[attribute] = found.setdefault(logical, owner.get_parameter(attribute))
