"""The chunked loss against logits and `F.cross_entropy`: values, gradients, and the memory that it is for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from engine.parallel.cross_entropy import linear_cross_entropy
from engine.plan import logits
from tests.engine.parallel.whole_logits import BATCH, LENGTH, PADDED, REAL, WIDTH, inputs, with_logits


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 rows in seven chunks, the last of them smaller."""
    monkeypatch.setattr(logits, "ROW_MULTIPLE", 32)
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 32 * PADDED)
    assert logits.rows_at_a_time(PADDED) == 32


def loss_and_gradients(function, arguments, scale: float) -> tuple[torch.Tensor, ...]:
    loss = function(*arguments, REAL)
    parameters = [argument for argument in arguments if argument is not None and argument.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss * scale, parameters)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_equals_logits_and_cross_entropy_in_double_precision(chunks, with_bias, scale):
    hidden_BTD, weight_VD, bias_V, *rest = inputs(torch.float64)
    arguments = (hidden_BTD, weight_VD, bias_V if with_bias else None, *rest)
    expected = loss_and_gradients(with_logits, arguments, scale)
    found = loss_and_gradients(linear_cross_entropy, arguments, scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found[2][REAL:].count_nonzero() == 0, "padded rows learn nothing"


def test_smoothed_targets_are_those_of_torch(chunks):
    """Rows of two shares, so that a share meets its own row."""
    hidden_BTD, weight_VD, bias_V, targets_BT, weights_BT = inputs(torch.float64)
    parameters, weights_BT = (hidden_BTD, weight_VD, bias_V), weights_BT.double()
    shares = torch.tensor([0.0, 0.3], dtype=torch.float64)
    smoothing_BT = shares[torch.arange(LENGTH) % 2].expand(BATCH, -1)
    into_BT = torch.zeros(BATCH, LENGTH, dtype=torch.float64)
    found = linear_cross_entropy(*parameters, targets_BT, weights_BT, REAL, into=into_BT, smoothing=smoothing_BT)
    logits_NV = F.linear(*parameters)[..., :REAL].flatten(0, 1)
    plain_BT, smoothed_BT = (
        F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="none", label_smoothing=share).view(BATCH, LENGTH)
        for share in shares.tolist()
    )
    terms_BT = torch.where(smoothing_BT == 0, plain_BT, smoothed_BT) * weights_BT
    torch.testing.assert_close((found, into_BT), (terms_BT.sum(), terms_BT.detach()), rtol=1e-12, atol=1e-12)
    made, expected = (torch.autograd.grad(loss * 0.37, parameters) for loss in (found, terms_BT.sum()))
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    assert made[1][REAL:].count_nonzero() == 0, "padded rows learn nothing"


def test_bf16_sums_the_weight_gradient_in_fp32(chunks):
    """Products of 32 rows are rounded to bf16 (2^-9 of a term), their sum once at the end; a sum in bf16 would round
    at each of the seven chunks. A gradient's terms go through four roundings (logit, its gradient, product, result),
    so it stays within 4 x 2^-9 of the largest."""
    arguments = inputs(torch.bfloat16)
    exact = [argument.detach().double().requires_grad_() for argument in arguments[:3]]
    expected = loss_and_gradients(with_logits, (*exact, *arguments[3:]), 0.37)
    found = loss_and_gradients(linear_cross_entropy, arguments, 0.37)
    assert [tensor.dtype for tensor in found] == [torch.float32] + 3 * [torch.bfloat16]
    assert abs(found[0].item() / expected[0].item() - 1) < 2**-9
    for tensor, exactly in zip(found[1:], expected[1:], strict=True):
        assert (tensor.double() - exactly).abs().max() < 4 * 2**-9 * exactly.abs().max()


def test_same_inputs_give_the_same_bits(chunks):
    first, second = (loss_and_gradients(linear_cross_entropy, inputs(torch.float32), 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradients_none_are_computed(chunks):
    arguments = inputs(torch.float32)
    with Largest() as seen, torch.no_grad():
        loss = linear_cross_entropy(*arguments, REAL)
    torch.testing.assert_close(loss, with_logits(*arguments, REAL).detach())
    assert not loss.requires_grad
    assert "aten.addmm_.default" not in seen.operations
    assert "aten.scatter_add_.default" not in seen.operations


def test_a_second_backward_is_refused(chunks):
    loss = linear_cross_entropy(*inputs(torch.float32), REAL)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Largest(TorchDispatchMode):
    """The largest number of elements of any storage that an operation returned, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operations = 0, set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.add(str(func))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_logits_of_the_batch_never_exist(chunks):
    """No operation, forward or backward, makes a tensor of more than 32 rows of logits, the weight or the input."""
    for function, expected in ((with_logits, BATCH * LENGTH * PADDED), (linear_cross_entropy, BATCH * LENGTH * WIDTH)):
        arguments = inputs(torch.float32)
        with Largest() as seen:
            function(*arguments, REAL).backward()
        assert seen.elements == expected


def test_head_without_targets_gives_logits_over_the_real_vocabulary():
    from engine.models.heads import VocabularyHead
    from engine.parallel.functions import PLAIN

    hidden_BTD, weight_VD, bias_V, targets_BT, weights_BT = inputs(torch.float32)
    head = VocabularyHead(WIDTH, REAL, PADDED, PLAIN, bias=True)
    head.weight, head.bias = nn.Parameter(weight_VD.detach()), nn.Parameter(bias_V.detach())
    logits_BTV = head(hidden_BTD)
    torch.testing.assert_close(logits_BTV, F.linear(hidden_BTD, weight_VD, bias_V)[..., :REAL])
    expected = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")
    torch.testing.assert_close(head(hidden_BTD, targets_BT, weights_BT), (expected * weights_BT).sum())
