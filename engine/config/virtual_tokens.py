"""Numbers of the trained vectors that an adapter puts in front of a row. Pure."""

from __future__ import annotations

from engine.config.schema.adapter import PrefixConfig, PromptConfig
from engine.config.schema.model import ModelConfig

METHODS_WITHOUT = "lora, adalora, ia3 or bottleneck"
"""Methods that put nothing in front of a row, for messages."""


def prompt_length(model: ModelConfig) -> int:
    """Return the number of embeddings in front of those of a row's tokens: hidden states are longer by it."""
    return model.adapter.virtual_tokens if isinstance(model.adapter, PromptConfig) else 0


def prefix_length(model: ModelConfig) -> int:
    """Return the number of keys and values in front of those of a row's tokens: attention sees so many more."""
    return model.adapter.virtual_tokens if isinstance(model.adapter, PrefixConfig) else 0


def num_virtual_tokens(model: ModelConfig) -> int:
    """Return the number of positions in front of those of a row's tokens, of either method."""
    return prompt_length(model) + prefix_length(model)


def text_positions(model: ModelConfig) -> int:
    """Return the number of a row's positions that its tokens can have."""
    return model.longest_row - num_virtual_tokens(model)
