"""Norms keep fp32 inside and the input's dtype outside; the other parts are held by the twins in `test_gpt`."""

from __future__ import annotations

import pytest
import torch

from engine.models.norms import LayerNorm, RMSNorm


def layer_norm(x, weight, bias):
    deviation = x - x.mean(-1, keepdim=True)
    return deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def rms_norm(x, weight, bias):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize(("kind", "reference"), [(LayerNorm, layer_norm), (RMSNorm, rms_norm)])
def test_bf16_norm_is_the_exact_norm_rounded_once(kind, reference):
    norm = kind(64, 1e-5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    norm = norm.bfloat16()
    x_BTD = (torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)) * 30).bfloat16()
    out = norm(x_BTD)
    assert out.dtype == torch.bfloat16
    parameters = {name: parameter.double() for name, parameter in norm.named_parameters()}
    exact = reference(x_BTD.double(), parameters["weight"], parameters.get("bias"))
    # one rounding to 8 bits, plus what 64 fp32 terms lose
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)
