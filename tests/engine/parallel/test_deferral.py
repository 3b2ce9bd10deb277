"""Gradients that are put off are those of the plain backward pass, and nothing else waits for them."""

from __future__ import annotations

import torch
from torch import nn

from engine.parallel.deferral import Deferral, weight_gradients


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5, bias=False)).double()


def test_put_off_gradients_are_the_plain_ones() -> None:
    x_BTD = torch.randn(2, 3, 6, dtype=torch.float64)
    plain, split = model(), model()
    deferral = Deferral(split)
    inputs = [x_BTD.clone().requires_grad_(True) for _ in range(2)]
    for network, given in zip((plain, split), inputs, strict=True):
        network(given).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
    names = {parameter: name for name, parameter in split.named_parameters()}
    early = {names[parameter] for parameter in names if parameter.grad is not None}
    assert early == {"0.bias", "1.weight", "1.bias"}
    deferred = deferral.take()
    late = {names[weight]: grad for weight, grad in weight_gradients(deferred)}
    assert late.keys() == {"0.weight", "2.weight"}
    assert not deferred, "what gradients are made of is freed as they are made"
    assert deferral.take() == []
    for name, parameter in plain.named_parameters():
        found = late[name] if name in late else split.get_parameter(name).grad
        assert found is not None
        torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-12)  # one product of 6 rows in fp64


def test_without_gradients_nothing_is_put_off() -> None:
    network = model()
    deferral = Deferral(network)
    with torch.no_grad():
        network(torch.randn(1, 6, dtype=torch.float64))
    assert deferral.take() == []
