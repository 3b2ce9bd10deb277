"""The chunks that one pipeline stage holds, as one module for one engine.

An engine drives one module; here that module holds every chunk and runs the one that is asked for. Inside it a
parameter's name has the chunk's number in front, so `logical_names` says which parameter of the model each one is. A
weight that several chunks of a stage use is one `Parameter`: one gradient, one optimizer state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from engine.parallel.boundary import Tensors


class Chunks(nn.Module):
    """The chunks of one pipeline stage, in the model's order."""

    def __init__(self, chunks: Sequence[nn.Module], ties: Mapping[str, str]) -> None:
        """`ties` maps the name of a parameter inside a chunk to its logical name, where the two differ."""
        super().__init__()
        self.chunks = nn.ModuleList(chunks)
        self._share(ties)

    def forward(self, *, chunk: int, inputs: Tensors) -> Tensors:
        """What the chunk makes of one micro-batch, by name; `inputs` are its keywords."""
        made: Tensors = self.chunks[chunk](**inputs)
        return made

    def logical_names(self, ties: Mapping[str, str]) -> dict[str, str]:
        """The logical name of every parameter by each name that it has in here."""
        names = {}
        for number, chunk in enumerate(self.chunks):
            for name, _ in chunk.named_parameters(remove_duplicate=False):
                names[f"chunks.{number}.{name}"] = ties.get(name, name)
        return names

    def _share(self, ties: Mapping[str, str]) -> None:
        """Makes parameters of one logical name one parameter: the one that comes first."""
        found: dict[str, nn.Parameter] = {}
        for name, logical in self.logical_names(ties).items():
            owner_name, _, attribute = name.rpartition(".")
            owner = self.get_submodule(owner_name)
            owner._parameters[attribute] = found.setdefault(logical, owner.get_parameter(attribute))
