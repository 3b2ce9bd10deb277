"""Comparison of a form's map with the tensors of their class."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from engine.checkpoint.interchange.forms import Form
from engine.config.schema.model import ModelConfig


def shapes_of_theirs(form: Form, theirs: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of their class by the names of its files, without memory for them."""
    with torch.device("meta"):
        model = getattr(transformers, form.architecture)(theirs)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        for other, beginning in form.spellings.items():
            name = name.replace(other, beginning, 1) if name.startswith(other) else name
        shapes[name] = tuple(tensor.shape)
    return shapes


def check_shapes(form: Form, theirs: Any, model: ModelConfig) -> int:
    """Holds the map of a model to the tensors of their class; returns the number of elements of ours."""
    model_map, expected = form.mapping(model, theirs.pad_token_id), shapes_of_theirs(form, theirs)
    assert {name: expected.get(name) for name in model_map.tensors} == model_map.tensors
    assert expected.keys() - model_map.tensors.keys() <= model_map.copies.keys(), "tensors that ours would drop"
    return sum(int(torch.Size(one.shape).numel()) for one in model_map.parameters.values())
