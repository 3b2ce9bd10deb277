"""Activation checkpointing (Chen et al. 2016): a layer keeps little for its backward pass and runs once more there.

`full` keeps the layer's input. `selective` also keeps the results of matrix products and attention, which are most of
the arithmetic, and runs norms, activation functions, rotations and residual sums again; scores and their softmax are
kept in neither (Korthikanti et al. 2022, section 4, recompute no more than these). Values are the same bit for bit.
Collectives inside a layer run again, too, on all ranks of their group alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

Recompute = Literal["selective", "full"]

KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
}
"""Operations whose results `selective` keeps, by the names that a dispatch mode sees. Batched products are not among
them: they would be scores."""


def recompute(layers: Iterable[nn.Module], how: Recompute) -> None:
    """Make each of the `layers` recompute, in place; without gradients (evaluation) nothing changes.

    The second run ends with the last tensor that the backward pass needs: in a pre-norm layer before the last product
    and its sum over tensor ranks, in a post-norm layer with that sum.
    """
    for layer in layers:
        layer.forward = partial(_run, layer.forward, how)  # type: ignore[method-assign]


def _run(forward: Callable[..., Any], how: Recompute, *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    selective = {"context_fn": _keeping_and_reusing} if how == "selective" else {}
    return checkpoint(
        forward,
        *arguments,
        use_reentrant=False,  # the older kind has no `context_fn`, and runs the backward pass inside of another one
        preserve_rng_state=False,  # no layer draws from a generator: dropout is keyed
        **selective,
        **named,
    )


Results = deque[tuple[str, Any]]
"""(operation, its result), in the order of the first run."""


def _keeping_and_reusing() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the modes under which a layer's first and second run take place; called once per forward pass."""
    results: Results = deque()
    return _Keep(results), _Reuse(results)


class _Mode(TorchDispatchMode):
    """Base of both modes.

    torch's own contexts for this (`create_selective_checkpoint_contexts`) require every operation of the first run in
    the second, and no other. Under ZeRO-3 the second run gathers weights that the first found gathered, or none that
    it gathered ahead for the next layer; so these modes look at kept operations only.
    """

    def __init__(self, results: Results) -> None:
        super().__init__()
        self.results = results

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: compiled code (flex attention) stays compiled under the mode."""
        return True


class _Keep(_Mode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.name() in KEPT:
            # Detached, or they would hold the graph that autograd is about to hang on them.
            self.results.append((func.name(), tree_map_only(torch.Tensor, torch.Tensor.detach, made)))
        return made


class _Reuse(_Mode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() not in KEPT:
            return func(*args, **(kwargs or {}))
        # In the first run's order: kept operations are those of the layer itself, which runs the same way twice.
        name, made = self.results.popleft()
        assert name == func.name(), f"the first run computed {name} where the second computes {func.name()}"
        return made
