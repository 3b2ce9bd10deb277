"""Trained vectors in front of a row: the embeddings of prompt tuning, the keys and values of prefix tuning.

Both are peft's arithmetic. Tokens count their positions on behind the vectors, which all of them see. A prompt is part
of the hidden states from the first layer to the last, so rows are longer by it there; data, labels and losses have the
tokens alone. A prefix is in attention alone.

Legend: B batch, T time, D width, P virtual tokens, G key/value heads (local under tensor parallelism), K head size.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema.model import BERTConfig, ModelConfig
from engine.config.virtual_tokens import prefix_length, prompt_length
from engine.models.embedding import Embedding


class Prompt(nn.Module):
    """Embeddings in front of a row's (Lester et al. 2021, section 2): (B, T, D) -> (B, P + T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.adapters = Embedding(prompt_length(config), config.hidden_size)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        prompt_PD = self.adapters(torch.arange(self.adapters.num_embeddings, device=x_BTD.device))
        return torch.cat((prompt_PD.expand(len(x_BTD), -1, -1), x_BTD), 1)


def prompt(config: ModelConfig) -> Prompt | None:
    """Make the prompt of a model; None where it has none."""
    return Prompt(config) if prompt_length(config) else None


def prompted_segments(config: ModelConfig, segments_BT: torch.Tensor | None) -> torch.Tensor | None:
    """Return the document numbers of rows with their prompt, which belongs to the first document."""
    length = prompt_length(config)
    if segments_BT is None or length == 0:
        return segments_BT
    return torch.cat((segments_BT[:, :1].expand(-1, length), segments_BT), 1)


def prompted_types(config: ModelConfig, types_BT: torch.Tensor) -> torch.Tensor:
    """Return the types of a row's tokens with those of its prompt, 0."""
    return F.pad(types_BT, (prompt_length(config), 0))


def without_prompt(config: ModelConfig, x_BTD: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states of a row as its head reads them: those of its tokens.

    The head of an encoder's rows reads the first state, or the mean over all, and both are with the prompt where peft's
    modules are around Hugging Face's class: it is given all of them.
    """
    reads_all = isinstance(config, BERTConfig) and config.task_head is not None and not config.task_head.sees_tokens
    return x_BTD if reads_all else x_BTD[:, prompt_length(config) :]


class Prefix(nn.Module):
    """Keys and values in front of a row's in one layer (Li and Liang 2021, section 4.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.num_kv_heads * config.head_size
        self.prefix_key = nn.Parameter(torch.empty(prefix_length(config), width))
        self.prefix_value = nn.Parameter(torch.empty(prefix_length(config), width))

    def forward(self, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values with the prefix: (B, T, G, K) -> (B, P + T, G, K), twice."""
        made = []
        for x_BTGK, prefix in ((k_BTGK, self.prefix_key), (v_BTGK, self.prefix_value)):
            prefix_PGK = prefix.unflatten(-1, x_BTGK.shape[2:])  # (P, G K), the local heads
            made.append(torch.cat((prefix_PGK.expand(len(x_BTGK), -1, -1, -1).to(x_BTGK.dtype), x_BTGK), 1))
        return made[0], made[1]


def prefixed_mask(config: ModelConfig, mask_B1TT: torch.Tensor) -> torch.Tensor:
    """Return the mask of a row's queries for keys with their prefix, which every query sees: (B, 1, T, P + T)."""
    return F.pad(mask_B1TT, (prefix_length(config), 0), value=True)
