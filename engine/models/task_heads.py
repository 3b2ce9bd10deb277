"""Heads of tasks that see rows: numbers for each sequence, in place of the head over the vocabulary. Those that see
tokens are in `engine.models.token_heads`.

The modules are those of Hugging Face's classes for sequence classification, so that a fine-tuned model is one of
theirs: BERT, Megatron's BERT and RoBERTa transform the first token's state and drop out around it, ModernBERT has the
transformation that it was pretrained with, of that state or of the mean over the row's tokens, a decoder reads the
state of the row's last token.

Legend: B batch, T time, D width, C labels (or predicted numbers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema.model import BERTConfig, ModelConfig
from engine.config.virtual_tokens import prompt_length
from engine.models.dropout import EMBEDDING_OUTPUT, Dropout
from engine.models.heads import SMOOTHING
from engine.models.norms import norm
from engine.parallel.boundary import LOGITS, ROW_LOSSES, Tensors
from engine.parallel.functions import Functions
from engine.parallel.sharding import Table

LAST = "last_B"
"""Name of the position (int64) of each row's last token, among the inputs of heads that need to know where it is."""
BEFORE, BEHIND = 1, 2
"""Numbers of the head's two places of dropout, counted on from the last layer: no layer has the same masks."""


@dataclass(frozen=True)
class TaskHead:
    """Predicts a label or numbers for each row (`model.task_head`)."""

    config: ModelConfig
    sharding: Table = field(default_factory=dict)

    @property
    def losses(self) -> tuple[str, ...]:
        """The one loss, named as the task."""
        assert self.config.task_head is not None
        return (self.config.task_head.task,)

    @property
    def inputs(self) -> frozenset[str]:
        """The labels of the rows (`labels_B` int64, or `labels_BC` fp32), their weights, where a row ends for a decoder
        or a mean and, in training, the share of label smoothing, which `engine.train.feed` adds."""
        assert self.config.task_head is not None
        labels = "labels_B" if self.config.task_head.task == "classification" else "labels_BC"
        needs_end = self.config.family == "gpt" or self._reads_mean
        return frozenset({labels, "label_weights_B", SMOOTHING} | ({LAST} if needs_end else set()))

    @property
    def _reads_mean(self) -> bool:
        return self.config.task_head is not None and self.config.task_head.pooling == "mean"

    def modules(self, functions: Functions) -> dict[str, nn.Module]:
        """Make the classifier and, in an encoder, the transformation of the state."""
        assert self.config.task_head is not None
        width, num_labels = self.config.hidden_size, self.config.task_head.num_labels
        if not isinstance(self.config, BERTConfig):
            return {"classifier": nn.Linear(width, num_labels, bias=False)}
        if self.config.transforms_for_tasks:
            transform = nn.Linear(width, width, bias=self.config.bias)
            before: dict[str, nn.Module] = {"head_transform": transform, "head_norm": norm(self.config)}
        else:
            before = {"pooler": nn.Linear(width, width)}
        return before | {"classifier": nn.Linear(width, num_labels)}

    def outputs(
        self, chunk: nn.Module, hidden_BTD: torch.Tensor, given: Tensors, by_row: bool, dropout: Dropout | None = None
    ) -> Tensors:
        """Compute `losses_L` (L = 1): the sum over the rows of cross entropy, or of the squared errors' mean over the
        C numbers; in evaluation also the logits, (B, C). Without labels `logits_BC`."""
        logits_BC = self._logits(chunk, hidden_BTD, given, dropout).float()
        if "labels_B" in given:
            label_cross_entropy = cast(Any, chunk).functions.label_cross_entropy
            loss_B = label_cross_entropy(logits_BC, given["labels_B"], given["label_weights_B"], given.get(SMOOTHING))
        elif "labels_BC" in given:
            loss_B = (logits_BC - given["labels_BC"]).square().mean(1) * given["label_weights_B"]
        else:
            return {"logits_BC": logits_BC}
        outputs = {"losses_L": loss_B.sum().reshape(1)}
        if not torch.is_grad_enabled():
            # Of ranks that share a row the one that is given its token counts: the sum of theirs is its logits.
            outputs[LOGITS] = torch.where(given["label_weights_B"][:, None] > 0, logits_BC, 0.0)
        return outputs | ({ROW_LOSSES: loss_B.detach().unsqueeze(1)} if by_row else {})

    def _logits(
        self, chunk: nn.Module, hidden_BTD: torch.Tensor, given: Mapping[str, torch.Tensor], dropout: Dropout | None
    ) -> torch.Tensor:
        classifier = cast(nn.Linear, chunk.get_submodule("classifier"))
        if not isinstance(self.config, BERTConfig):
            last_B = given.get(LAST)
            if last_B is None:  # one text without padding
                return classifier(hidden_BTD[:, -1])
            return classifier(_last_states(cast(Any, chunk).functions, hidden_BTD, last_B))
        state_BD = hidden_BTD[:, 0]
        if self._reads_mean:
            last_B, before = given.get(LAST), prompt_length(self.config)
            if last_B is None:  # one text without padding
                state_BD = hidden_BTD.mean(1)
            else:  # a prompt belongs to the row, as with peft's modules around Hugging Face's class
                state_BD = _mean_states(cast(Any, chunk).functions, hidden_BTD, last_B + before)
        if self.config.transforms_for_tasks:
            transformed_BD = F.gelu(chunk.get_submodule("head_transform")(state_BD))
            return classifier(chunk.get_submodule("head_norm")(transformed_BD))
        if self.config.post_norm and self.config.token_types == 1:  # RoBERTa drops out twice
            state_BD = self._dropped(state_BD, dropout, BEFORE)
        state_BD = torch.tanh(chunk.get_submodule("pooler")(state_BD))
        return classifier(self._dropped(state_BD, dropout, BEHIND))

    def _dropped(self, state_BD: torch.Tensor, dropout: Dropout | None, number: int) -> torch.Tensor:
        if dropout is None:
            return state_BD
        # Rows are whole here, also where ranks share their positions: the one state is at position 0 on each.
        whole = replace(dropout, first_position=0)
        return whole.hidden(state_BD.unsqueeze(1), self.config.num_layers + number, EMBEDDING_OUTPUT).squeeze(1)


def _last_states(functions: Functions, hidden_BTD: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
    """Return the states of the rows' last tokens, (B, D), from those of the given tokens; `last_B` is of whole rows."""
    rows_B, length = torch.arange(len(last_B), device=last_B.device), hidden_BTD.size(1)
    own_B = (last_B - functions.sequence_slice.first(length)).clamp(0, length - 1)
    # Ranks that share a row each choose a state, and all take that of the rank which has the token: with 2 ranks of 4
    # tokens and a last token 6, rank 1 chooses its token 2, and both take the state of rank 6 // 4.
    states_BSD = functions.whole_sequence(hidden_BTD[rows_B, own_B].unsqueeze(1))
    return states_BSD[rows_B, last_B // length]


def _mean_states(functions: Functions, hidden_BTD: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
    """Return the mean of the states of the rows' tokens, (B, D), from those of the given ones; `last_B` is of whole
    rows."""
    length = hidden_BTD.size(1)
    positions_T = torch.arange(length, device=last_B.device) + functions.sequence_slice.first(length)
    is_token_BT = positions_T <= last_B[:, None]
    sums_BD = (hidden_BTD * is_token_BT.unsqueeze(2)).sum(1, dtype=torch.promote_types(hidden_BTD.dtype, torch.float32))
    # Ranks that share a row each sum their tokens, and all take the sum of theirs.
    means_BD = functions.whole_sequence(sums_BD.unsqueeze(1)).sum(1) / (last_B + 1)[:, None]
    return means_BD.to(hidden_BTD.dtype)
