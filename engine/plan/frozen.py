"""Parameters that a run stage freezes, and how far back gradients flow; problems with patterns of names.

A frozen parameter has its weight alone. Layers in front of which nothing is trained, and that train nothing themselves,
keep no activations; nothing is sent back to a chunk that has only such layers.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from functools import lru_cache

from engine.config.parameter_patterns import matches
from engine.config.schema.model import ModelConfig
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError, PalimpsestError
from engine.plan.cut import ModelChunk, layers_of
from engine.plan.families import figures
from engine.plan.parameters import model_entries
from engine.plan.parts import Entries

NOTHING = Entries(())
REMEDY = "correct the pattern: `layers.0.*` means the first layer"


@lru_cache(maxsize=1024)
def frozen_entries(model: ModelConfig, chunks: tuple[ModelChunk, ...], patterns: tuple[str, ...]) -> Entries:
    """Return the frozen parameters among those of a pipeline stage with these chunks, one entry for each."""
    if not patterns:
        return NOTHING
    # layer by layer, not by kind: a pattern may name some of several equal layers
    held = (entry for c in chunks for entry in figures(model).entries(model, c.layers, c.first, c.last))
    return Entries(tuple({entry.name: entry for entry in held if matches(entry.name, patterns)}.values()))


@lru_cache(maxsize=1024)
def first_trained_layer(model: ModelConfig, patterns: tuple[str, ...]) -> int:
    """Return the global number of the first layer through which gradients flow.

    It is the number of layers where the head alone is trained.
    """
    if not patterns:
        return 0
    for layer in range(model.num_layers):
        # with what stands in front of the layer: embeddings, and T5's relative positions
        held = figures(model).entries(model, range(layer, layer + 1), is_first=layer == 0, is_last=False)
        if not all(matches(entry.name, patterns) for entry in held):
            return layer
    return model.num_layers


@lru_cache(maxsize=1024)
def front_entries(model: ModelConfig, chunks: tuple[ModelChunk, ...], patterns: tuple[str, ...]) -> Entries:
    """Return the parameters of a pipeline stage through whose modules no gradients flow, for every use of each."""
    first = first_trained_layer(model, patterns)
    if first == 0:
        return NOTHING
    held = []
    for c in chunks:
        if c.layers.start < first:
            layers = range(c.layers.start, min(c.layers.stop, first))
            held += figures(model).entries(model, layers, c.first, is_last=False)
    return Entries(tuple(held))


def receives_gradients(model: ModelConfig, layer: int, patterns: tuple[str, ...]) -> bool:
    """Return True if a parameter in front of a layer is trained, so that its input has a gradient."""
    return first_trained_layer(model, patterns) < layer


def layers_kept(model: ModelConfig, chunks: Sequence[ModelChunk], patterns: tuple[str, ...]) -> Sequence[int]:
    """Return the layers of a pipeline stage that keep activations for a backward pass."""
    layers, first = layers_of(chunks), first_trained_layer(model, patterns)
    return layers if first == 0 else tuple(layer for layer in layers if layer >= first)


def check_patterns(config: RunConfig) -> list[PalimpsestError]:
    """Return a problem for each pattern that matches no parameter, and for each run stage that trains none."""
    names = [entry.name for entry in model_entries(config.model)]
    problems: list[PalimpsestError] = []
    for number, run_stage in enumerate(config.stages):
        by_key = {"learning_rate_factors": tuple(run_stage.learning_rate_factors), "freeze": run_stage.freeze}
        problems += [
            ConfigError(
                f"stages.{number}.{key}: the pattern {pattern!r} matches no parameter",
                f"patterns of parameters' names, such as {names[0]}, {names[-1]}",
                REMEDY,
            )
            for key, patterns in by_key.items()
            for pattern in patterns
            if not fnmatch.filter(names, pattern)
        ]
        if all(matches(name, run_stage.freeze) for name in names):
            problems.append(
                ConfigError(
                    f"stages.{number}.freeze = {list(run_stage.freeze)}: every parameter is frozen",
                    "patterns that leave a parameter to train",
                    "remove a pattern; to evaluate only, use `palimpsest evaluate`",
                )
            )
    return problems
