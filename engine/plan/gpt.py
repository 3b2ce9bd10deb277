"""The GPT family in numbers (see `engine.plan.families`)."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

from engine.config.objectives import RowLengths
from engine.config.schema.model import ModelConfig
from engine.config.schema.parallel import Recompute
from engine.config.virtual_tokens import prefix_length
from engine.plan import parts
from engine.plan.parts import Entry

SEGMENT_BYTES = 4
"""A token's document number, int32."""
SEEN_BLOCKS = 2
"""Blocks of keys that a block of queries sees under a sliding window: its own and the one before it."""
KEY_BYTES = 8
"""A row's key of dropout, int64."""
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def entries(model: ModelConfig, layers: range, is_first: bool, is_last: bool, inner: bool = True) -> list[Entry]:
    """Parameters of consecutive layers, with the embedding if first, and the final norm and the head if last."""
    found = []
    if is_first:
        found.append(parts.vocabulary(model, EMBEDDING))
        if model.position_table:
            shape = (model.max_positions, model.hidden_size)
            found.append(Entry("embed_positions.weight", shape, split=False))
        found += parts.prompt(model)
    for layer in layers if inner else ():
        found += layer_entries(model, layer)
    if is_last:
        found += parts.norm(model, "final_norm")
        if model.has_vocabulary_head:
            found.append(parts.vocabulary(model, EMBEDDING if model.tie_embeddings else HEAD))
        if model.task_head is not None:
            bias, width = model.task_head.sees_tokens, model.hidden_size
            found += parts.linear("classifier", model.task_head.num_labels, width, bias=bias, split=False)
    return found


def layer_entries(model: ModelConfig, layer: int) -> list[Entry]:
    """Parameters of the layer with the given global number."""
    prefix = f"layers.{layer}"
    return [
        *parts.norm(model, f"{prefix}.attention_norm"),
        *parts.self_attention(model, f"{prefix}.attention"),
        *parts.norm(model, f"{prefix}.ffn_norm"),
        *parts.feed_forward(model, f"{prefix}.ffn"),
        *parts.bottleneck_adapters(model, prefix, ("attention", "ffn")),
    ]


def layer_kind(model: ModelConfig, layer: int) -> Hashable:
    """Return the kind: layers with a sliding window keep and compute less."""
    return model.reach(layer)


@lru_cache(maxsize=1024)
def layer_matrices(model: ModelConfig) -> int:
    """Elements of the matrices of self-attention and feed-forward part of a layer, equal in all."""
    return parts.matrix_elements(layer_entries(model, 0))


def layer_operations(model: ModelConfig, layer: int, lengths: RowLengths) -> int:
    """Forward operations of projections, scores and weighted values. A sliding window counts the tokens that it has."""
    tokens, reach = parts.held_tokens(model, lengths), model.reach(layer)
    seen = parts.seen_tokens(model, lengths) if reach is None else min(tokens, reach + 1)
    return tokens * 2 * layer_matrices(model) + parts.score_operations(model, tokens, seen)


def embedding_operations(model: ModelConfig, lengths: RowLengths) -> int:
    """Forward operations of a lookup, and of a sum where positions are learned."""
    return parts.held_tokens(model, lengths) * model.hidden_size * (2 if model.position_table else 1)


def head_operations(model: ModelConfig, lengths: RowLengths, vocab_size: int) -> int:
    """Forward operations of the output projection."""
    operations = lengths.predicted * 2 * model.hidden_size * vocab_size if model.has_vocabulary_head else 0
    if model.task_head is not None:
        of_token = 2 * model.hidden_size * model.task_head.num_labels
        operations += of_token * (lengths.tokens if model.task_head.sees_tokens else 1)
    return operations


def saved(
    model: ModelConfig,
    layer: int,
    lengths: RowLengths,
    tensor_size: int,
    sequence_size: int = 1,
    recompute: Recompute = "none",
) -> int:
    """Elements per row that a layer keeps, T x these multiples of D.

    Whole on every tensor rank: both norms' inputs and outputs (4 D in fp32; 6 D in bf16, for the inputs are kept in
    fp32; 5 D for both). Parallel parts share the input in fp32 (3 D), and have a copy each in bf16 (6 D). Split:
    attention and feed-forward part. For GPT-2 on one rank: 17 D; 11 D with products kept only; 1 D with the input only.
    """
    tokens = parts.held_tokens(model, lengths)
    whole = tokens * model.hidden_size
    stretch = whole // sequence_size  # of one rank's tokens under sequence parallelism
    if recompute == "full":
        return stretch
    if recompute == "selective":  # products are kept before they are summed and scattered
        return stretch + 2 * whole + parts.kept_products(model, tokens, tensor_size)
    return (
        (9 * stretch // 2 if model.parallel else 5 * stretch)
        + parts.saved_by_attention(model, tokens, tensor_size)
        + parts.saved_by_feed_forward(model, tokens, tensor_size)
    )


def mask(model: ModelConfig, layer: int, lengths: RowLengths, masks: bool = True, segments: bool = True) -> int:
    """Elements of the mask: a number for each query and key that it sees, where the device has no kernel without.

    In blocks (`engine.models.attention.local_mask`) a query has those of two blocks, which also hold a copy of the keys
    and values.
    """
    reach, tokens = model.reach(layer), parts.held_tokens(model, lengths)
    if prefix_length(model):  # on every device
        return tokens * parts.seen_tokens(model, lengths)
    sees_all = reach is None or reach >= tokens - 1
    if not masks or (sees_all and not segments):
        return 0
    if reach is not None and model.attention_dropout == 0 and tokens > SEEN_BLOCKS * reach:
        return tokens * (SEEN_BLOCKS * reach + 2 * model.num_kv_heads * model.head_size)
    return tokens**2


def reduced(model: ModelConfig, layers: range, is_first: bool, is_last: bool, lengths: RowLengths) -> int:
    """Elements that a chunk all-reduces: four times per layer; the embedding's output; the head's input gradient."""
    # Attention and feed-forward part each sum their output forward and the gradient of their input backward
    # (Shoeybi et al. 2019, section 3, f and g).
    times = parts.held_tokens(model, lengths) * (4 * len(layers) + is_first) + lengths.predicted * is_last
    return times * model.hidden_size


def reduced_again(model: ModelConfig, layer: int, lengths: RowLengths) -> int:
    """Elements that attention adds to the residual stream."""
    return parts.held_tokens(model, lengths) * model.hidden_size


def entered(model: ModelConfig, layer: int, lengths: RowLengths) -> int:
    """Elements that attention reads, and those that the feed-forward part reads."""
    return 2 * parts.held_tokens(model, lengths) * model.hidden_size


def exchanged(model: ModelConfig, layer: int, lengths: RowLengths) -> int:
    """Elements of self-attention's queries, keys, values and results."""
    return parts.exchanged(model, parts.held_tokens(model, lengths))


def sees_whole_rows(name: str) -> bool:
    """Return True for the head of a task, whose input is gathered before it."""
    return name.startswith("classifier.")


def boundary(model: ModelConfig, layer: int, lengths: RowLengths) -> int:
    """Elements of a row's hidden states."""
    return parts.held_tokens(model, lengths) * model.hidden_size


def carried_bytes(model: ModelConfig, layer: int, lengths: RowLengths, segments: bool) -> int:
    """Bytes of a row's document numbers and of its dropout key."""
    keys = KEY_BYTES if model.dropout or model.attention_dropout else 0
    return (lengths.tokens * SEGMENT_BYTES if segments else 0) + keys
