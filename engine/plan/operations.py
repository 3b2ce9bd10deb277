"""Floating-point operations of a model: what the stage cut balances and what model FLOPs utilisation divides by.

A multiplication and an addition count as two. Norms, activations and softmax are left out, as everywhere such
figures are published (Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B). Padding of the
vocabulary is left out of the published kind of figure and kept in what a stage costs, because it is multiplied.
"""

from __future__ import annotations

from engine.config.schema import ModelConfig
from engine.plan.parameters import layer_matrix_elements

BACKWARD_FACTOR = 2
"""A backward pass multiplies twice as much as its forward: by the inputs and by the weights."""


def layer_operations(model: ModelConfig, sequence_length: int) -> int:
    """Forward operations per token of one layer: projections, scores and weighted values (no causal discount)."""
    attention = 4 * sequence_length * model.num_heads * model.head_size
    return 2 * layer_matrix_elements(model) + attention


def embedding_operations(model: ModelConfig) -> int:
    """Operations per token of the embedding: a lookup, and a sum where positions are learned."""
    return model.hidden_size * (2 if model.position == "learned" else 1)


def head_operations(model: ModelConfig) -> int:
    """Forward operations per token of the output projection over the padded vocabulary."""
    return 2 * model.hidden_size * model.padded_vocab_size


def training_operations_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Operations per token of forward and backward, as utilisation (MFU) counts them.

    6 per element of every matrix that multiplies a token (the head over the real vocabulary included, lookups not)
    and 12 x layers x width x length for attention; recomputation does not count.
    """
    head = 2 * model.hidden_size * model.vocab_size
    return (1 + BACKWARD_FACTOR) * (model.num_layers * layer_operations(model, sequence_length) + head)
