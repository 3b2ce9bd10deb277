"""Floating-point operations of a model, which the stage cut balances and model FLOPs utilisation is a share of.

A multiplication and an addition count as two. Norms, activations and softmax are left out, as everywhere such
figures are published (Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B). Padding of the
vocabulary is left out of the published kind of figure and kept in what a stage costs, because it is multiplied.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from engine.config.objectives import RowLengths
from engine.config.schema.model import ModelConfig
from engine.plan.families import figures
from engine.plan.parts import Entries

BACKWARD_FACTOR = 2
"""A backward pass multiplies twice as much as its forward: by the inputs and by the weights."""


@lru_cache
def layer_operations(model: ModelConfig, lengths: RowLengths) -> tuple[int, ...]:
    """Forward operations per row of each layer."""
    return tuple(figures(model).layer_operations(model, layer, lengths) for layer in range(model.num_layers))


@lru_cache
def layer_costs(model: ModelConfig, lengths: RowLengths) -> tuple[int, ...]:
    """Forward operations per row of each layer, with embedding and head at the ends."""
    family = figures(model)
    costs = list(layer_operations(model, lengths))
    # In units of whole layers the ends are uneven: a head over a large vocabulary costs as much as several layers.
    costs[0] += family.embedding_operations(model, lengths)
    costs[-1] += family.head_operations(model, lengths, model.padded_vocab_size)
    return tuple(costs)


def orthogonal_operations(entries: Entries) -> int:
    """Operations of Muon's update of the matrices among some parameters: five iterations of three products, of which
    two are of the matrix and one of its Gram matrix alone (Jordan et al. 2024)."""
    total = 0
    for entry in entries.linear:
        # With X (s, l), s <= l, an iteration is A = X X^T, A A, and B X: 2 s^2 l + 2 s^3 + 2 s^2 l operations.
        short, long = sorted(entry.shape)
        total += 5 * (4 * short * short * long + 2 * short**3) * entry.count
    return total


@lru_cache
def costs_before(model: ModelConfig, lengths: RowLengths) -> tuple[int, ...]:
    """Forward operations per row of all layers before each, and last of all layers, with embedding and head."""
    return (0, *accumulate(layer_costs(model, lengths)))


@lru_cache
def training_operations(model: ModelConfig, lengths: RowLengths) -> int:
    """Operations per row of forward and backward, as utilisation (MFU) counts them.

    For each token 6 per element of every matrix that multiplies it (the head over the real vocabulary included, lookups
    not) and 12 x layers x width x length for attention; recomputation does not count.
    """
    family = figures(model)
    head = family.head_operations(model, lengths, model.vocab_size)
    return (1 + BACKWARD_FACTOR) * (sum(layer_operations(model, lengths)) + head)
