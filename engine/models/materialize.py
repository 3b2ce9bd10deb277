"""Values for a model that was built on the meta device, in one process that holds whole tensors.

For conversion, serving and tests. Ranks that hold parts of tensors fill them one parameter at a time, in
`engine.train`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from engine.config.schema.model import ModelConfig
from engine.models.families import family
from engine.parallel.functions import PLAIN, Functions


def whole_model(config: ModelConfig, stored: Mapping[str, torch.Tensor], functions: Functions = PLAIN) -> nn.Module:
    """Return the whole model with the values of a checkpoint: `stored` has parameters' real rows by logical name."""
    by_name = {spec.name: spec for spec in family(config).specs(config)}
    with torch.device("meta"):
        model = family(config).build(config, functions=functions)

    def padded(name: str) -> torch.Tensor:
        value = stored[name]
        assert tuple(value.shape) == by_name[name].stored_shape, f"{name}: {tuple(value.shape)}"
        # The padding rows are not stored: they are zero by contract.
        full = value.new_zeros(by_name[name].shape)
        full[: len(value)] = value
        return full

    fill(model, padded)
    return model


def fill(stage: nn.Module, value: Callable[[str], torch.Tensor]) -> None:
    """Set every parameter of a stage, built on any device, to the tensor `value(its name in the stage)`.

    Parameters that several modules share stay shared.
    """
    made: dict[int, nn.Parameter] = {}
    for prefix, module in stage.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # A new `Parameter`: one on the meta device cannot be written to.
            if id(parameter) not in made:
                tensor = value(f"{prefix}.{name}" if prefix else name)
                assert tensor.shape == parameter.shape, f"{prefix}.{name}: {tensor.shape} for {parameter.shape}"
                made[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
