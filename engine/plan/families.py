"""The families of models in numbers, by `ModelConfig.family`: the torch-free twin of `engine.models.families`.

Figures are per row (one sample) unless they say otherwise, because the parts of an encoder-decoder see rows of
different lengths, and a head may see some of a row's tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol, cast

from engine.config.objectives import RowLengths
from engine.config.schema.model import ModelConfig
from engine.config.schema.parallel import Recompute
from engine.plan import bert, gpt, t5
from engine.plan.parts import Entry


class Figures(Protocol):
    """Figures that a family's module in this package gives. `layers` and `layer` are global numbers."""

    def entries(
        self, model: ModelConfig, layers: range, is_first: bool, is_last: bool, inner: bool = True
    ) -> list[Entry]:
        """Parameters of one chunk, those of its layers among them if `inner`; a name may come twice where a tied weight
        is used twice."""
        ...

    def layer_entries(self, model: ModelConfig, layer: int) -> list[Entry]:
        """Parameters of one layer."""
        ...

    def layer_kind(self, model: ModelConfig, layer: int) -> Hashable:
        """Return the kind of a layer: layers of one kind are equal in all figures."""
        ...

    def layer_operations(self, model: ModelConfig, layer: int, lengths: RowLengths) -> int:
        """Forward operations of a layer."""
        ...

    def embedding_operations(self, model: ModelConfig, lengths: RowLengths) -> int:
        """Forward operations of what comes before the first layer."""
        ...

    def head_operations(self, model: ModelConfig, lengths: RowLengths, vocab_size: int) -> int:
        """Forward operations of what comes behind the last layer, over so many rows of the vocabulary."""
        ...

    def saved(
        self,
        model: ModelConfig,
        layer: int,
        lengths: RowLengths,
        tensor_size: int,
        sequence_size: int = 1,
        recompute: Recompute = "none",
    ) -> int:
        """Elements that a layer keeps for its backward pass, on one tensor rank.

        `sequence_size` ranks share the tokens of what tensor parallelism does not split (sequence parallelism).
        `recompute` is "full" for a layer that keeps its input, "selective" for one that keeps its matrix products and
        attention, too.
        """
        ...

    def mask(
        self, model: ModelConfig, layer: int, lengths: RowLengths, masks: bool = True, segments: bool = True
    ) -> int:
        """Elements of the attention mask that a layer keeps. `segments`: rows hold several documents or padding.

        The kernels of attention add a number to each score, and each layer makes these from truth values. `masks` is
        True if the device has no kernel that does without (`engine.plan.parts.needs_masks`)."""
        ...

    def reduced(self, model: ModelConfig, layers: range, is_first: bool, is_last: bool, lengths: RowLengths) -> int:
        """Elements of activations and their gradients that a chunk all-reduces over the tensor axis."""
        ...

    def reduced_again(self, model: ModelConfig, layer: int, lengths: RowLengths) -> int:
        """Elements that the second run of a layer that recomputes all-reduces: as its first run, but for the last."""
        ...

    def entered(self, model: ModelConfig, layer: int, lengths: RowLengths) -> int:
        """Elements that enter the parts of a layer which tensor ranks split: gathered under sequence parallelism."""
        ...

    def exchanged(self, model: ModelConfig, layer: int, lengths: RowLengths) -> int:
        """Elements of queries, keys, values and results of a layer's attention, of which ranks exchange heads for
        tokens (Jacobs et al. 2023, Ulysses)."""
        ...

    def sees_whole_rows(self, name: str) -> bool:
        """Return True if a parameter that tensor ranks hold alike sees whole rows under sequence parallelism."""
        ...

    def boundary(self, model: ModelConfig, layer: int, lengths: RowLengths) -> int:
        """Elements that the chunk which begins with `layer` receives, and sends gradients of."""
        ...

    def carried_bytes(self, model: ModelConfig, layer: int, lengths: RowLengths, segments: bool) -> int:
        """Bytes without gradients that the chunk which begins with `layer` receives: document numbers, dropout keys.

        `segments` is True if rows hold several documents."""
        ...


# Modules have the protocol's functions without `self`; the cast says what pyright cannot infer.
FAMILIES: dict[str, Figures] = {"gpt": cast(Figures, gpt), "bert": cast(Figures, bert), "t5": cast(Figures, t5)}


class LayerKind(NamedTuple):
    """Layers that are equal in all figures: the number of one of them, and their count."""

    example: int
    count: int


@lru_cache(maxsize=4096)
def layer_kinds(model: ModelConfig, layers: Sequence[int]) -> tuple[LayerKind, ...]:
    """Return the kinds of some layers, in the order of their first layers. `layers` is a range or a tuple."""
    family = figures(model)
    found: dict[Hashable, list[int]] = {}
    for layer in layers:
        found.setdefault(family.layer_kind(model, layer), []).append(layer)
    return tuple(LayerKind(alike[0], len(alike)) for alike in found.values())


def over_layers(model: ModelConfig, layers: Sequence[int], figure: Callable[[int], int]) -> int:
    """Return the sum of a figure over layers."""
    # One call per kind instead of one per layer: a ranking asks for these sums thousands of times.
    return sum(kind.count * figure(kind.example) for kind in layer_kinds(model, layers))


def figures(model: ModelConfig) -> Figures:
    """Return the figures of a configuration's family."""
    return FAMILIES[model.family]
