"""The BERT family in numbers (see `engine.plan.families`)."""

from __future__ import annotations

from engine.config.lengths import RowLengths
from engine.config.schema import ModelConfig, Recompute
from engine.plan import gpt, parts
from engine.plan.gpt import (
    EMBEDDING,
    HEAD,
    boundary,
    carried_bytes,
    entered,
    exchanged,
    mask,
    reduced,
    reduced_again,
)  # equal in both families
from engine.plan.parts import Entry

__all__ = ["boundary", "carried_bytes", "entered", "exchanged", "mask", "reduced", "reduced_again"]

PAIR_KINDS = 2


def entries(model: ModelConfig, layers: range, is_first: bool, is_last: bool) -> list[Entry]:
    """Parameters of consecutive layers, with the embeddings if first, and the heads if last."""
    found = _embeddings(model) if is_first else []
    for layer in layers:
        found += layer_entries(model, layer)
    return found + (_heads(model) if is_last else [])


def layer_entries(model: ModelConfig, layer: int) -> list[Entry]:
    """Parameters of a layer; the first of a pre-norm encoder has no norm before its attention."""
    found = gpt.layer_entries(model, layer)
    if layer > 0 or model.norm_position == "post":
        return found
    return [entry for entry in found if ".attention_norm." not in entry.name]


def _embeddings(model: ModelConfig) -> list[Entry]:
    found = [parts.vocabulary(model, EMBEDDING)]
    if model.position == "learned":
        found.append(Entry("embed_positions.weight", (model.max_positions, model.hidden_size), split=False))
    if model.token_types:
        found.append(Entry("embed_types.weight", (model.token_types, model.hidden_size), split=False))
    return found + parts.norm(model, "embed_norm")


def _heads(model: ModelConfig) -> list[Entry]:
    width = model.hidden_size
    found = parts.norm(model, "final_norm") if model.norm_position == "pre" else []
    found += parts.linear("head_transform", width, width, bias=model.bias, split=False)
    found += parts.norm(model, "head_norm")
    found += [
        parts.vocabulary(model, EMBEDDING if model.tie_embeddings else HEAD),
        parts.vocabulary(model, "lm_head.bias", width=0),
    ]
    if model.pair_head:
        found += parts.linear("pooler", width, width, bias=True, split=False)
        found += parts.linear("pair_head", PAIR_KINDS, width, bias=True, split=False)
    return found


def layer_operations(model: ModelConfig, layer: int, lengths: RowLengths) -> int:
    """Projections, scores and weighted values."""
    return gpt.layer_operations(model, layer, lengths)


def embedding_operations(model: ModelConfig, lengths: RowLengths) -> int:
    """Lookups and their sums."""
    return gpt.embedding_operations(model, lengths) + lengths.tokens * model.hidden_size * (model.token_types > 0)


def head_operations(model: ModelConfig, lengths: RowLengths, vocab_size: int) -> int:
    """Transform and projection of the masked tokens; of pairs one token of a row."""
    width = model.hidden_size
    pairs = 2 * width * (width + PAIR_KINDS) if model.pair_head else 0
    return lengths.predicted * 2 * width * (width + vocab_size) + pairs


def saved(
    model: ModelConfig,
    layer: int,
    lengths: RowLengths,
    tensor_size: int,
    time_size: int = 1,
    recompute: Recompute = "none",
) -> int:
    """As in a GPT, but that a post-norm layer keeps no input beside its norm's output (4 D and not 5 D whole)."""
    kept = gpt.saved(model, layer, lengths, tensor_size, time_size, recompute)
    if recompute != "none" or model.norm_position == "pre":
        return kept
    return kept - lengths.tokens * model.hidden_size // time_size


def sees_whole_rows(name: str) -> bool:
    """The heads': what they read is gathered before them."""
    return name.startswith(("head_", "pooler.", "pair_head."))
