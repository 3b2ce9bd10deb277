"""Activation checkpointing (Chen et al. 2016): a layer keeps little for its backward pass and is run once more there.

`full` keeps the layer's input. `selective` also keeps what matrix products and attention made, which are most of the
arithmetic, and runs norms, activation functions, rotations and residual sums again; scores and their softmax are kept
in neither (Korthikanti et al. 2022, section 4, recompute no more than these). The numbers are the same bit for bit.
Collectives inside a layer are run again, too, on all ranks of their group alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["selective", "full"]

_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    *(getattr(torch.ops.aten, name).default for name in _ATTENTION if hasattr(torch.ops.aten, name)),
}
"""Operations whose results `selective` keeps. Batched products are not among them: they would be scores."""


def recompute(layers: Iterable[nn.Module], how: Recompute) -> None:
    """Makes each of the `layers` keep little, in place; nothing changes where no gradient is asked for.

    The second run ends with the last tensor that the backward pass wants: before the layer's last product and the
    product's sum over tensor ranks.
    """
    for layer in layers:
        layer.forward = partial(_run, layer.forward, how)  # type: ignore[method-assign]


def _run(forward: Callable[..., Any], how: Recompute, *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    selective = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if how == "selective" else {}
    return checkpoint(
        forward,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # no layer draws from a generator: dropout is keyed
        **selective,
        **named,
    )


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
