"""Heads of tasks that see tokens: numbers for each token of a row, in place of the head over the vocabulary.

The modules are those of Hugging Face's classes for token classification and for question answering: a projection of
each token's state, behind dropout where tokens are classified; ModernBERT's states pass through the transformation that
it was pretrained with.

Legend: B batch, T time, D width, C labels (2 for question answering: the logits of the answer's first and last token).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema.model import ModelConfig
from engine.config.schema.model import TaskHead as TaskHeadConfig
from engine.models.dropout import EMBEDDING_OUTPUT, Dropout
from engine.models.heads import SMOOTHING, Head
from engine.models.norms import norm
from engine.models.task_heads import BEHIND, LAST, TaskHead
from engine.parallel.boundary import LOGITS, ROW_LOSSES, Tensors
from engine.parallel.functions import Functions
from engine.parallel.sharding import Table

SPANS = "label_spans_B2"
"""Name of the positions (int64) of the first and the last token of each row's answer."""


@dataclass(frozen=True)
class TokenHead:
    """Predicts a label for each token, or the first and the last token of an answer (`model.task_head`)."""

    config: ModelConfig
    sharding: Table = field(default_factory=dict)

    @property
    def _task_head(self) -> TaskHeadConfig:
        assert self.config.task_head is not None
        return self.config.task_head

    @property
    def _finds_spans(self) -> bool:
        return self._task_head.task == "question_answering"

    @property
    def losses(self) -> tuple[str, ...]:
        """The one loss, named as the task."""
        return (self._task_head.task,)

    @property
    def inputs(self) -> frozenset[str]:
        """The labels of tokens and their weights; or the answers' spans, the weights of rows and where rows end; in
        training also the share of label smoothing."""
        spans, labels = {SPANS, "label_weights_B", LAST}, {"labels_BT", "label_weights_BT"}
        return frozenset({SMOOTHING, *(spans if self._finds_spans else labels)})

    def modules(self, functions: Functions) -> dict[str, nn.Module]:
        """Make the classifier, in ModernBERT with the transformation before it."""
        width = self.config.hidden_size
        made: dict[str, nn.Module] = {}
        if self.config.transforms_for_tasks:
            made["head_transform"] = nn.Linear(width, width, bias=self.config.bias)
            made["head_norm"] = norm(self.config)
        made["classifier"] = nn.Linear(width, self._task_head.num_labels)
        return made

    def outputs(
        self, chunk: nn.Module, hidden_BTD: torch.Tensor, given: Tensors, by_row: bool, dropout: Dropout | None = None
    ) -> Tensors:
        """Compute `losses_L` (L = 1): the sum over the tokens of cross entropy; or over the rows, of the mean of those
        of the first and of the last token. Without labels `logits_BTC`, of the tokens that this rank is given."""
        logits_BTC = self._logits(chunk, hidden_BTD, dropout)
        if "labels_BT" in given:
            labels_BT, smoothing_B = given["labels_BT"], given.get(SMOOTHING)
            smoothing_BT = None if smoothing_B is None else smoothing_B[:, None].expand_as(labels_BT)
            functions = cast(Functions, cast(Any, chunk).functions)
            loss_BT = functions.label_cross_entropy(logits_BTC, labels_BT, given["label_weights_BT"], smoothing_BT)
            loss_B = loss_BT.sum(1)
        elif SPANS in given:
            loss_B = self._span_losses(chunk, logits_BTC, given)
        else:
            return {"logits_BTC": logits_BTC}
        outputs = {"losses_L": loss_B.sum().reshape(1)}
        if not torch.is_grad_enabled():  # an evaluation may measure what they predict
            outputs[LOGITS] = logits_BTC
        return outputs | ({ROW_LOSSES: loss_B.detach().unsqueeze(1)} if by_row else {})

    def _logits(self, chunk: nn.Module, hidden_BTD: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
        if self.config.transforms_for_tasks:
            transformed_BTD = F.gelu(chunk.get_submodule("head_transform")(hidden_BTD))
            hidden_BTD = chunk.get_submodule("head_norm")(transformed_BTD)
        elif dropout is not None and not self._finds_spans:
            # The head sees all tokens that its rank is given, not the slice that it holds between the blocks.
            whole = replace(dropout, first_position=dropout.first_given)
            hidden_BTD = whole.hidden(hidden_BTD, self.config.num_layers + BEHIND, EMBEDDING_OUTPUT)
        return chunk.get_submodule("classifier")(hidden_BTD).float()

    def _span_losses(
        self, chunk: nn.Module, logits_BTC: torch.Tensor, given: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return weight x the mean of both cross entropies over the positions of each row's tokens, (B,)."""
        functions = cast(Functions, cast(Any, chunk).functions)
        logits_BTC = functions.whole_sequence(logits_BTC)  # ranks that share a row need the logits of all of it
        positions_T = torch.arange(logits_BTC.size(1), device=logits_BTC.device)
        logits_BCT, spans_BC, smoothing_B = logits_BTC.transpose(1, 2), given[SPANS], given.get(SMOOTHING)
        padding_BCT = (positions_T > given[LAST][:, None])[:, None].expand_as(logits_BCT)
        weights_BC = (given["label_weights_B"] / 2)[:, None].expand_as(spans_BC)
        smoothing_BC = None if smoothing_B is None else smoothing_B[:, None].expand_as(spans_BC)
        return functions.label_cross_entropy(logits_BCT, spans_BC, weights_BC, smoothing_BC, padding_BCT).sum(1)


def task_head(config: ModelConfig) -> Head:
    """Return the head of the model's task, which sees rows or tokens."""
    assert config.task_head is not None
    return TokenHead(config) if config.task_head.sees_tokens else TaskHead(config)
