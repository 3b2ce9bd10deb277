"""Gives a model that was built on the meta device its values, in one process that holds whole tensors.

For conversion, serving and tests. Ranks that hold parts fill theirs one parameter at a time, in `engine.train`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from engine.config.schema.model import ModelConfig
from engine.models.families import family
from engine.parallel.functions import PLAIN, Functions


def whole_model(config: ModelConfig, stored: Mapping[str, torch.Tensor], functions: Functions = PLAIN) -> nn.Module:
    """The whole model with the values of a checkpoint: `stored` has each parameter's real rows by logical name."""
    by_name = {spec.name: spec for spec in family(config).specs(config)}
    with torch.device("meta"):
        model = family(config).build(config, functions=functions)

    def padded(name: str) -> torch.Tensor:
        value = stored[name]
        assert tuple(value.shape) == by_name[name].stored_shape, f"{name}: {tuple(value.shape)}"
        full = value.new_zeros(by_name[name].shape)
        full[: len(value)] = value
        return full

    fill(model, padded)
    return model


def fill(stage: nn.Module, value: Callable[[str], torch.Tensor]) -> None:
    """Gives every parameter of a stage, built on any device, the tensor `value(its name in the stage)`.

    Parameters that several modules share stay shared.
    """
    made: dict[int, nn.Parameter] = {}
    for prefix, module in stage.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                tensor = value(f"{prefix}.{name}" if prefix else name)
                assert tensor.shape == parameter.shape, f"{prefix}.{name}: {tensor.shape} for {parameter.shape}"
                made[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
