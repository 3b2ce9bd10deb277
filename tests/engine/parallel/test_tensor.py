"""Tensor-parallel layers on several ranks against the plain layers: outputs and all gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from engine.config.resolve import Layout
from engine.models.heads import VocabularyHead
from engine.parallel.functions import PLAIN, Functions
from engine.parallel.groups import join
from engine.parallel.sharding import ROW, VOCABULARY, ParameterSpec, column
from engine.parallel.tensor import ColumnLinear, RowLinear, VocabularyEmbedding, shard, vocabulary_cross_entropy
from tests.distributed.ranks import run_ranks

WIDTH, INNER, ROWS, REAL, SIZE = 6, 12, 12, 7, 3
"""The first rank has four tokens of the vocabulary, the second three, the third padding alone."""
SPECS = {
    "embed.weight": ParameterSpec("embed.weight", (ROWS, WIDTH), VOCABULARY, REAL),
    "up.weight": ParameterSpec("up.weight", (INNER, WIDTH), column(INNER)),
    "up.bias": ParameterSpec("up.bias", (INNER,), column(INNER)),
    "down.weight": ParameterSpec("down.weight", (WIDTH, INNER), ROW),
    "down.bias": ParameterSpec("down.bias", (WIDTH,)),
}
TIES = {"head.weight": "embed.weight"}


class Model(nn.Module):
    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.head = VocabularyHead(WIDTH, REAL, ROWS, functions)
        self.head.weight = self.embed.weight

    def forward(self, tokens_BT, targets_BT, weights_BT):
        x_BTD = self.embed(tokens_BT)
        x_BTD = x_BTD + self.down(torch.tanh(self.up(x_BTD)))
        smoothing_B = torch.tensor([0.0, 0.2, 0.4])
        plain, smoothed = (self.head.losses(x_BTD, targets_BT, weights_BT, False, s)[0] for s in (None, smoothing_B))
        return torch.stack((plain, smoothed))


def batch():
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, REAL, (3, 5), generator=generator)
    targets_BT = torch.randint(0, REAL, (3, 5), generator=generator)
    return tokens_BT, targets_BT, torch.rand(3, 5, generator=generator)


def whole_values():
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(spec.shape, generator=generator) for name, spec in SPECS.items()}


def rank(environment):
    group = join(Layout(pipe=1, data=1, sequence=1, tensor=SIZE), environment.global_rank).tensor
    with torch.device("meta"):
        model = Model(Functions(linear_cross_entropy=partial(vocabulary_cross_entropy, group=group)))
    shard(model, SPECS, TIES, group)
    kinds = [type(layer) for layer in (model.embed, model.up, model.down, model.head)]
    assert kinds == [VocabularyEmbedding, ColumnLinear, RowLinear, VocabularyHead]
    assert model.head.weight is model.embed.weight
    model.to_empty(device="cpu")
    model.head.weight = model.embed.weight
    for name, value in whole_values().items():
        model.get_parameter(name).data.copy_(SPECS[name].part(value, group.position, SIZE))
    losses_2 = model(*batch())
    losses_2.sum().backward()
    return losses_2.tolist(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_three_ranks_equal_one():
    model = Model(PLAIN)
    for name, value in whole_values().items():
        model.get_parameter(name).data.copy_(value)
    losses_2 = model(*batch())
    losses_2.sum().backward()
    for position, (found, grads) in enumerate(run_ranks(SIZE, rank)):
        # sums of at most 15 x 12 fp32 terms of size 1: a few units of 6e-8 each
        torch.testing.assert_close(found, losses_2.tolist(), rtol=1e-6, atol=0)
        for name, grad in grads.items():
            whole = model.get_parameter(name).grad
            assert whole is not None
            torch.testing.assert_close(grad, SPECS[name].part(whole, position, SIZE), rtol=1e-5, atol=1e-6)
