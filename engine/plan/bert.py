"""The BERT family in numbers (see `engine.plan.families`)."""

from __future__ import annotations

from collections.abc import Hashable

from engine.config.objectives import RowLengths
from engine.config.schema.model import BERTConfig
from engine.config.schema.parallel import Recompute
from engine.config.virtual_tokens import prefix_length
from engine.plan import gpt, parts
from engine.plan.gpt import (
    EMBEDDING,
    HEAD,
    boundary,
    carried_bytes,
    entered,
    exchanged,
    reduced,
)  # equal in both families
from engine.plan.parts import Entry

__all__ = ["boundary", "carried_bytes", "entered", "exchanged", "reduced"]

PAIR_KINDS = 2
SEEN_BLOCKS = 3
"""Blocks of keys that a block of queries sees in a local layer: its own and both neighbours."""


def entries(model: BERTConfig, layers: range, is_first: bool, is_last: bool, inner: bool = True) -> list[Entry]:
    """Parameters of consecutive layers, with the embeddings if first, and the heads if last."""
    found = _embeddings(model) if is_first else []
    for layer in layers if inner else ():
        found += layer_entries(model, layer)
    return found + (_heads(model) if is_last else [])


def layer_entries(model: BERTConfig, layer: int) -> list[Entry]:
    """Parameters of a layer; the first of a pre-norm encoder has no norm before its attention behind that of the
    embeddings."""
    found = gpt.layer_entries(model, layer)
    if not _is_normed(model, layer):
        return found
    return [entry for entry in found if ".attention_norm." not in entry.name]


def _is_normed(model: BERTConfig, layer: int) -> bool:
    return layer == 0 and model.embedding_norm and not model.post_norm


def layer_kind(model: BERTConfig, layer: int) -> Hashable:
    """Return the kind: the first layer may lack a norm, and local layers keep and compute less."""
    return _is_normed(model, layer), model.reach(layer)


def _embeddings(model: BERTConfig) -> list[Entry]:
    found = [parts.vocabulary(model, EMBEDDING)]
    if model.position_table:
        found.append(Entry("embed_positions.weight", (model.max_positions, model.hidden_size), split=False))
    if model.token_types:
        found.append(Entry("embed_types.weight", (model.token_types, model.hidden_size), split=False))
    return found + (parts.norm(model, "embed_norm") if model.embedding_norm else []) + parts.prompt(model)


def _heads(model: BERTConfig) -> list[Entry]:
    width = model.hidden_size
    found = parts.norm(model, "final_norm") if not model.post_norm else []
    if model.has_vocabulary_head or model.transforms_for_tasks:
        found += parts.linear("head_transform", width, width, bias=model.bias, split=False)
        found += parts.norm(model, "head_norm")
    if model.has_vocabulary_head:
        found += [
            parts.vocabulary(model, EMBEDDING if model.tie_embeddings else HEAD),
            parts.vocabulary(model, "lm_head.bias", width=0),
        ]
    if model.task_head is not None:
        if not (model.transforms_for_tasks or model.task_head.sees_tokens):
            found += parts.linear("pooler", width, width, bias=True, split=False)
        return found + parts.linear("classifier", model.task_head.num_labels, width, bias=True, split=False)
    if model.pair_head:
        found += parts.linear("pooler", width, width, bias=True, split=False)
        found += parts.linear("pair_head", PAIR_KINDS, width, bias=True, split=False)
    return found


def layer_operations(model: BERTConfig, layer: int, lengths: RowLengths) -> int:
    """Forward operations of projections, scores and weighted values.

    A local layer counts the keys of a window: blocks compute half as many more, and the ends of rows fewer."""
    matrices = gpt.layer_matrices(model)
    reach, tokens = model.reach(layer), parts.held_tokens(model, lengths)
    seen = parts.seen_tokens(model, lengths) if reach is None else min(tokens, 2 * reach + 1)
    return tokens * 2 * matrices + parts.score_operations(model, tokens, seen)


def embedding_operations(model: BERTConfig, lengths: RowLengths) -> int:
    """Forward operations of lookups and their sums."""
    types = parts.held_tokens(model, lengths) * model.hidden_size * (model.token_types > 0)
    return gpt.embedding_operations(model, lengths) + types


def head_operations(model: BERTConfig, lengths: RowLengths, vocab_size: int) -> int:
    """Forward operations of transform and projection for the masked tokens, and of the pair head for one token."""
    width = model.hidden_size
    # 0 where the head over the vocabulary is not there
    masked = lengths.predicted * 2 * width * (width + vocab_size) if model.has_vocabulary_head else 0
    if model.task_head is not None:
        transformed = width if model.transforms_for_tasks or not model.task_head.sees_tokens else 0
        operations = 2 * width * (transformed + model.task_head.num_labels)
        return operations * (lengths.tokens if model.task_head.sees_tokens else 1) + masked
    # The pooler's square matrix and the classifier, for the first token of a row alone.
    return masked + (2 * width * (width + PAIR_KINDS) if model.pair_head else 0)


def saved(
    model: BERTConfig,
    layer: int,
    lengths: RowLengths,
    tensor_size: int,
    sequence_size: int = 1,
    recompute: Recompute = "none",
) -> int:
    """Return the count as in a GPT; a post-norm layer keeps no input beside its norm's output (4 D whole, not 5)."""
    kept = gpt.saved(model, layer, lengths, tensor_size, sequence_size, recompute)
    if recompute != "none":
        return kept
    if _in_blocks(model, layer, lengths):  # keys and values three times: as each of three blocks sees them
        kept += 4 * parts.held_tokens(model, lengths) * model.num_kv_heads * model.head_size // tensor_size
    return kept - parts.held_tokens(model, lengths) * model.hidden_size // sequence_size if model.post_norm else kept


def mask(model: BERTConfig, layer: int, lengths: RowLengths, masks: bool = True, segments: bool = True) -> int:
    """Elements of the mask: a number for each query and each key that its block sees, of the whole row or of three
    blocks. A local layer has them on every device."""
    tokens = parts.held_tokens(model, lengths)
    if prefix_length(model):  # on every device
        return tokens * parts.seen_tokens(model, lengths)
    if not segments:
        return 0
    if _in_blocks(model, layer, lengths):
        return tokens * SEEN_BLOCKS * (model.reach(layer) or 0)
    return tokens**2 if masks or model.reach(layer) is not None else 0


def _in_blocks(model: BERTConfig, layer: int, lengths: RowLengths) -> bool:
    """Return True if a layer computes attention in blocks of its reach (`engine.models.attention.local_mask`)."""
    reach, tokens = model.reach(layer), parts.held_tokens(model, lengths)
    # A row of three blocks or fewer would see all of itself, so it is not cut.
    return reach is not None and model.attention_dropout == 0 and tokens > SEEN_BLOCKS * reach


def reduced_again(model: BERTConfig, layer: int, lengths: RowLengths) -> int:
    """Return the count as in a GPT; the norm at the end of a post-norm layer wants the feed-forward part's sum, too."""
    return gpt.reduced_again(model, layer, lengths) * (2 if model.post_norm else 1)


def sees_whole_rows(name: str) -> bool:
    """Return True for the heads' parameters: their input is gathered before them."""
    return name.startswith(("head_", "pooler.", "pair_head.", "classifier."))
