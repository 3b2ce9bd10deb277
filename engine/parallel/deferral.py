"""Deferred weight gradients of linear layers, so that a backward pass hands on the gradient of its input sooner.

In every linear layer (tensor-parallel ones are such) the product with the weight becomes one whose backward pass
computes the gradients of its input and bias, and keeps the operands of the weight's gradient. `gradients` computes it
later: the same products of the same numbers. Other parameters (norms, embeddings, the fused head, whose gradient the
forward pass computed) get theirs at once. For the zero-bubble schedule (Qi et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

DeferredGradients = list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]]
"""(weight, input, gradient of the output) of each product of a backward pass."""


class Deferral:
    """Defers the weight gradients of the linear layers of a module, in place."""

    def __init__(self, module: nn.Module) -> None:
        self._deferred: DeferredGradients = []
        mode = _Products(lambda *product: self._deferred.append(product))
        for layer in module.modules():
            # Wrapped, not replaced: a tensor-parallel layer communicates around the product, in its own `forward`.
            if isinstance(layer, nn.Linear):
                layer.forward = partial(_run, mode, layer.forward)

    def take(self) -> DeferredGradients:
        """Return what was deferred since the last call."""
        taken, self._deferred = self._deferred, []
        return taken


class _Products(TorchFunctionMode):
    """Replaces `F.linear` by `_Linear`, whatever a layer does before and after it."""

    def __init__(self, deferred: Callable[..., None]) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # a frozen weight has no gradient to defer
        if func is F.linear and torch.is_grad_enabled() and args[1].requires_grad:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _Linear.apply(input, weight, bias, self._deferred)  # type: ignore[no-any-return]


def _run(mode: TorchFunctionMode, forward: Callable[[torch.Tensor], torch.Tensor], input: torch.Tensor) -> torch.Tensor:
    with mode:
        return forward(input)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None, deferred: Callable[..., None]
    ) -> torch.Tensor:
        ctx.save_for_backward(input)
        # The parameter itself: ZeRO-3 frees its values after the forward pass and gathers them again before the
        # backward pass.
        ctx.weight, ctx.deferred = weight, deferred
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (input,), (grad,) = ctx.saved_tensors, grads
        ctx.deferred(ctx.weight, input, grad)
        # (..., O) x (O, I) -> (..., I). None for the weight: its hooks run all the same and find no gradient, which
        # `zero.gradients` allows for and DeepSpeed's own do not.
        grad_input = grad @ ctx.weight if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad_input, None, grad_bias, None


@torch.no_grad()
def weight_gradients(deferred: DeferredGradients) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Yield (weight, its gradient) of each product; the weights' values are not needed. Empties the list."""
    while deferred:
        weight, input, grad = deferred.pop()  # so that both operands are freed before the next product
        # (O, tokens) x (tokens, I) -> (O, I)
        yield weight, grad.flatten(0, -2).T @ input.flatten(0, -2)
