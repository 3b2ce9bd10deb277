"""Heads: the end of a model, behind its last layer, which computes its losses. A family is built with a given head.

`VocabularyHead` is the one module that owns an output projection, for logits and for the loss. A `Head` is a value: the
modules that the last chunk gets, the data they need and the tensors they return.

Legend: B batch, T tokens of a row, D width, V vocabulary (padded; local under tensor parallelism), L losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema.model import ModelConfig
from engine.models.dropout import Dropout
from engine.parallel.boundary import ROW_LOSSES, Tensors
from engine.parallel.functions import Functions
from engine.parallel.sharding import VOCABULARY, Table

SMOOTHING = "label_smoothing_B"
"""Name of the share of each row's labels that is spread over all of them (fp32), in training alone."""


class Head(Protocol):
    """The end of a model, as a value: its modules belong to the last chunk, under their own logical names."""

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the losses, each with a denominator of its own."""
        ...

    @property
    def inputs(self) -> frozenset[str]:
        """Keywords of the last chunk that come from the data for the head."""
        ...

    @property
    def sharding(self) -> Table:
        """Sharding of the modules' parameters over the tensor axis; one that is not named is replicated."""
        ...

    def modules(self, functions: Functions) -> dict[str, nn.Module]:
        """Make the modules, by the name they get in the last chunk, on the device context that is active."""
        ...

    def outputs(
        self, chunk: nn.Module, hidden_BTD: torch.Tensor, given: Tensors, by_row: bool, dropout: Dropout | None = None
    ) -> Tensors:
        """Compute the losses, or without targets the logits, from whole rows of the last layer's hidden states.

        `chunk` has the modules as attributes; `given` are those of the `inputs` that there are; `dropout` is that of
        the micro-batch, None in evaluation. Returns `losses_L`
        (fp32, the weighted sum of each loss), with `by_row` also `row_losses_BL`.
        """
        ...


class VocabularyHead(nn.Module):
    """Projects hidden states on the vocabulary; with targets, straight to their loss, so that no logits are kept.

    `weight` is (padded_vocab_size, width); its rows from `vocab_size` on, and those of the bias, never matter.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, width: int, vocab_size: int, padded_vocab_size: int, functions: Functions, bias: bool = False
    ) -> None:
        super().__init__()
        self.vocab_size, self.functions = vocab_size, functions
        # Its own parameters, no `nn.Linear`: tensor parallelism replaces those, and communicates here in the loss.
        self.weight = nn.Parameter(torch.zeros(padded_vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(padded_vocab_size)) if bias else None

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        **options: torch.Tensor,
    ) -> torch.Tensor:
        """Return the fp32 weighted sum of the tokens' losses, or logits (..., vocab_size) where `targets` is None.

        `hidden` is (..., D); `targets` (int64) and `weights` have its shape without D. Logits are whole on one
        tensor-parallel rank only. `options` are `into` and `smoothing` of `linear_cross_entropy`.
        """
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)[..., : self.vocab_size]
        assert weights is not None, "targets come with weights"
        given = (hidden, self.weight, self.bias, targets, weights, self.vocab_size)
        return self.functions.linear_cross_entropy(*given, **options)

    def losses(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        by_row: bool,
        smoothing_B: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the sum as `forward` does, and with `by_row` each row's share of it, (B,) without a gradient;
        `smoothing_B` are the shares of the rows' targets that are spread over the vocabulary."""
        options = {}
        if smoothing_B is not None:
            # (B,) -> (B, 1) -> (B, T)
            options["smoothing"] = smoothing_B.view(-1, *[1] * (targets.dim() - 1)).expand(targets.shape)
        if not by_row:
            return self(hidden, targets, weights, **options), None
        into = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        return self(hidden, targets, weights, into=into, **options), into.flatten(1).sum(1)


@dataclass(frozen=True)
class LanguageModelHead:
    """Predicts a token at every position: the vocabulary head alone."""

    config: ModelConfig
    loss: str
    scale: float = 1.0
    """Factor of the hidden states before the projection (T5 v1.0 with a tied head)."""
    inputs: frozenset[str] = frozenset({"targets_BT", "weights_BT", SMOOTHING})
    sharding: Table = field(default_factory=lambda: {"lm_head.weight": VOCABULARY})

    @property
    def losses(self) -> tuple[str, ...]:
        """The one loss."""
        return (self.loss,)

    def modules(self, functions: Functions) -> dict[str, nn.Module]:
        """Make `lm_head`."""
        sizes = (self.config.hidden_size, self.config.vocab_size, self.config.padded_vocab_size)
        return {"lm_head": VocabularyHead(*sizes, functions)}

    def outputs(
        self, chunk: nn.Module, hidden_BTD: torch.Tensor, given: Tensors, by_row: bool, dropout: Dropout | None = None
    ) -> Tensors:
        """Compute `losses_L` (L = 1), or `logits_BTV` over the real vocabulary (on one tensor-parallel rank only)."""
        lm_head = cast(VocabularyHead, chunk.get_submodule("lm_head"))
        hidden_BTD = hidden_BTD if self.scale == 1.0 else hidden_BTD * self.scale
        if "targets_BT" not in given:
            return {"logits_BTV": lm_head(hidden_BTD)}
        loss, loss_B = lm_head.losses(
            hidden_BTD, given["targets_BT"], given["weights_BT"], by_row, given.get(SMOOTHING)
        )
        return {"losses_L": loss.reshape(1)} | ({} if loss_B is None else {ROW_LOSSES: loss_B.unsqueeze(1)})


def attach(chunk: nn.Module, head: Head, functions: Functions, ties: Mapping[str, str]) -> None:
    """Give the last chunk the modules of its head; a weight that is tied to one of this chunk becomes that one."""
    for name, module in head.modules(functions).items():
        chunk.add_module(name, module)
    held = dict(chunk.named_parameters())
    for name, logical in ties.items():
        # Without the embedding in this chunk the head keeps a parameter of its own, tied by `ParameterGroup.tied`.
        if name in held and logical in held:
            owner, _, attribute = name.rpartition(".")
            setattr(chunk.get_submodule(owner), attribute, held[logical])
