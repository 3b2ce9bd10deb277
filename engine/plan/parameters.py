"""Parameters of a model as names and shapes, by stage and by tensor rank, without building it.

`engine.models` builds the modules; this is the same list as numbers, so that a login node can count them. The two
are held together by a test. Names are logical names; a tied head has none of its own but is held twice when the
first and last stage are different.
"""

from __future__ import annotations

from dataclasses import replace

from engine.config.schema.model import ModelConfig
from engine.plan.families import figures, layer_kinds
from engine.plan.parts import Entry


def model_entries(model: ModelConfig) -> list[Entry]:
    """Every parameter of the whole model, each name once."""
    return stage_entries(model, range(model.num_layers), is_first=True, is_last=True)


def stage_entries(model: ModelConfig, layers: range, is_first: bool, is_last: bool) -> list[Entry]:
    """Parameters of one pipeline stage, each name once."""
    entries = figures(model).entries(model, layers, is_first, is_last)
    # A dictionary keeps the order of the first occurrence, and one entry of a tied matrix.
    return list({entry.name: entry for entry in entries}.values())


def counted_entries(model: ModelConfig, layers: range, is_first: bool, is_last: bool) -> list[Entry]:
    """Return the same parameters as a family's `entries`, with one entry for those of all layers that are equal."""
    family = figures(model)
    found = family.entries(model, layers, is_first, is_last, inner=False)
    for kind in layer_kinds(model, layers):
        found += [replace(entry, count=kind.count) for entry in family.layer_entries(model, kind.example)]
    return found


def num_parameters(model: ModelConfig, padded: bool = False) -> int:
    """Parameters of the whole model; the tied matrix counts once, padding rows only if `padded`."""
    entries = {entry.name: entry for entry in counted_entries(model, range(model.num_layers), True, True)}.values()
    return sum((entry.numel - (0 if padded else entry.padding)) * entry.count for entry in entries)
