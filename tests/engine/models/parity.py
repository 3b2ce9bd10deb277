"""What the parity tests of all families share: nearness, gradients of both sides, and models cut into stages.

Tolerance: a dot product of n terms in fp32 is off by about sqrt(n) roundings (2**-24) of its size, n is at most
256 here; about 20 of them follow one another through 4 layers forward and as many backward, with norms between
them that keep sizes near 1, and independent errors add up in squares: sqrt(40) x sqrt(256) x 2**-24 = 6e-6 of the
largest value of a tensor.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn

from engine.checkpoint.interchange.huggingface import from_huggingface
from engine.config.schema.model import ModelConfig
from engine.models.families import family
from engine.models.materialize import fill, whole_model
from engine.plan.cut import ModelChunk

TOLERANCE = 40**0.5 * 256**0.5 * 2**-24


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def their_gradients(theirs) -> dict[str, torch.Tensor]:
    """The gradients of a transformers model by our names."""
    as_gradients = copy.deepcopy(theirs)
    for target, source in zip(as_gradients.parameters(), theirs.parameters(), strict=True):
        target.data = gradient_of(source)
    return from_huggingface(as_gradients)[1]


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    bound = TOLERANCE * expected.abs().max().item()
    distance = (found - expected).abs().max().item()
    assert distance <= bound, f"{what}: {distance:.2e} > {bound:.2e}"


def cut(config: ModelConfig, num_stages: int) -> list[ModelChunk]:
    """Chunks of about as many layers each."""
    bounds = [round(i * config.num_layers / num_stages) for i in range(num_stages + 1)]
    return [
        ModelChunk(range(start, end), first=i == 0, last=i == num_stages - 1)
        for i, (start, end) in enumerate(itertools.pairwise(bounds))
    ]


def build_stages(config: ModelConfig, weights: dict[str, torch.Tensor], num_stages: int) -> list[nn.Module]:
    """The stages of a model with these (stored) weights, whose parameters share nothing."""
    whole = whole_model(config, weights)
    values = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    stages = []
    for chunk in cut(config, num_stages):
        with torch.device("meta"):
            stage = family(config).build(config, chunk)
        renamed = family(config).ties(config) if not (chunk.first and chunk.last) else {}
        fill(stage, lambda name, renamed=renamed: values[renamed.get(name, name)].clone())
        stages.append(stage)
    return stages


def gradients_of(stages: list[nn.Module], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The stages' gradients by logical name; those of a tied parameter added up."""
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            logical = family(config).ties(config).get(name, name)
            gradients[logical] = gradients.get(logical, torch.zeros(())) + gradient_of(parameter)
    return gradients
