"""The T5 family in numbers (see `engine.plan.families`): layers of the encoder, then those of the decoder.

Encoder layers see rows of `lengths.tokens`, decoder layers rows of `lengths.decoder` that read the encoder's.
"""

from __future__ import annotations

from collections.abc import Hashable

from engine.config.objectives import RowLengths
from engine.config.schema.model import T5Config
from engine.config.schema.parallel import Recompute
from engine.plan import gpt, parts
from engine.plan.gpt import EMBEDDING, HEAD, KEY_BYTES, SEGMENT_BYTES
from engine.plan.parts import Entry


def entries(model: T5Config, layers: range, is_first: bool, is_last: bool, inner: bool = True) -> list[Entry]:
    """Parameters of consecutive layers, with the embedding where a stack begins and its norm where it ends."""
    first_of_decoder = model.num_encoder_layers
    found = [parts.vocabulary(model, EMBEDDING)] if is_first or first_of_decoder in layers else []
    # A stack's relative positions are one table for all its layers: every chunk with a layer of the stack holds a copy.
    for stack, held in (("encoder", layers.start < first_of_decoder), ("decoder", layers.stop > first_of_decoder)):
        if held:
            found.append(Entry(f"{stack}_positions.weight", (model.relative_buckets, model.num_heads), split=True))
    for layer in layers if inner else ():
        found += layer_entries(model, layer)
    if first_of_decoder - 1 in layers:
        found += parts.norm(model, "encoder_norm")
    if is_last:
        found += parts.norm(model, "final_norm")
        found.append(parts.vocabulary(model, EMBEDDING if model.tie_embeddings else HEAD))
    return found


def layer_entries(model: T5Config, layer: int) -> list[Entry]:
    """Parameters of a layer; those of the decoder have cross attention."""
    found = gpt.layer_entries(model, layer)
    if layer < model.num_encoder_layers:
        return found
    name, width, heads = f"layers.{layer}.cross_attention", model.hidden_size, _heads(model)
    return [
        *found,
        *parts.norm(model, f"{name}_norm"),
        *parts.linear(f"{name}.q_proj", heads, width, bias=model.bias, bias_split=True),
        *parts.linear(f"{name}.kv_proj", 2 * heads, width, bias=model.bias, bias_split=True),
        *parts.linear(f"{name}.out_proj", width, heads, bias=model.bias),
        *parts.adapters(model, name, "cross_attention"),
        *parts.bottleneck_adapters(model, f"layers.{layer}", ("cross_attention",)),
    ]


def layer_kind(model: T5Config, layer: int) -> Hashable:
    """Return True if it is the decoder's."""
    return layer >= model.num_encoder_layers


def layer_operations(model: T5Config, layer: int, lengths: RowLengths) -> int:
    """Forward operations of projections, scores and weighted values.

    Keys and values of cross attention are projected from the encoder's tokens."""
    tokens = _tokens(model, layer, lengths)
    own = tokens * 2 * gpt.layer_matrices(model)
    found = own + parts.score_operations(model, tokens, tokens)
    if layer < model.num_encoder_layers:
        return found
    # Queries and output project the decoder's tokens, keys and values the encoder's: 2 x 2 D^2 operations a token each.
    square = model.hidden_size * _heads(model)
    return found + 4 * square * (tokens + lengths.tokens) + parts.score_operations(model, tokens, lengths.tokens)


def embedding_operations(model: T5Config, lengths: RowLengths) -> int:
    """Forward operations of a lookup; the decoder's, in another chunk, is as small and left out."""
    return lengths.tokens * model.hidden_size


def head_operations(model: T5Config, lengths: RowLengths, vocab_size: int) -> int:
    """Forward operations of the output projection."""
    return lengths.predicted * 2 * model.hidden_size * vocab_size


def saved(
    model: T5Config,
    layer: int,
    lengths: RowLengths,
    tensor_size: int,
    sequence_size: int = 1,
    recompute: Recompute = "none",
) -> int:
    """Return the count as in a GPT, with that of cross attention.

    It adds its norm's input and output (with products kept only, its own output), queries, output, keys and values."""
    tokens = _tokens(model, layer, lengths)
    # Self-attention and the feed-forward part are a GPT layer's, on the rows of this layer's stack.
    found = gpt.saved(model, layer, RowLengths(tokens, tokens), tensor_size, sequence_size, recompute)
    if layer < model.num_encoder_layers or recompute == "full":
        return found
    whole = tokens * model.hidden_size // sequence_size
    # Queries and output of the decoder's tokens, keys and values of the encoder's.
    cross = 2 * (tokens + lengths.tokens) * _heads(model) // tensor_size
    if recompute == "none":
        cross += parts.saved_probabilities(model, tokens, lengths.tokens, tensor_size)
    return found + cross + (whole if recompute == "selective" else 2 * whole)


def mask(model: T5Config, layer: int, lengths: RowLengths, masks: bool = True, segments: bool = True) -> int:
    """Elements of cross attention's mask in a decoder layer, on every device.

    The numbers added to self-attention's scores are made once for all layers of a stack, and left out. So are the
    probabilities that a CPU keeps, which has no kernel for cross attention with a mask."""
    return lengths.decoder * lengths.tokens if segments and layer >= model.num_encoder_layers else 0


def reduced(model: T5Config, layers: range, is_first: bool, is_last: bool, lengths: RowLengths) -> int:
    """Elements that a chunk all-reduces: four times per layer, in the decoder twice more and once the gradient of the
    encoder's output; the embeddings' outputs; the gradient of the head's input."""
    first_of_decoder = model.num_encoder_layers
    times = lengths.tokens * is_first + lengths.decoder * (first_of_decoder in layers) + lengths.predicted * is_last
    encoding = len(range(layers.start, min(layers.stop, first_of_decoder)))
    times += encoding * 4 * lengths.tokens + (len(layers) - encoding) * (6 * lengths.decoder + lengths.tokens)
    return times * model.hidden_size


def reduced_again(model: T5Config, layer: int, lengths: RowLengths) -> int:
    """Elements that attention adds to the residual stream, in the decoder self and cross attention each."""
    times = 1 if layer < model.num_encoder_layers else 2
    return times * _tokens(model, layer, lengths) * model.hidden_size


def entered(model: T5Config, layer: int, lengths: RowLengths) -> int:
    """Elements that self-attention and the feed-forward part read, and in the decoder queries, keys and values of cross
    attention."""
    if layer < model.num_encoder_layers:
        return 2 * lengths.tokens * model.hidden_size
    return (3 * lengths.decoder + lengths.tokens) * model.hidden_size


def exchanged(model: T5Config, layer: int, lengths: RowLengths) -> int:
    """Elements of queries, keys, values and results of self-attention, in the decoder of cross attention as well."""
    tokens = _tokens(model, layer, lengths)
    cross = 2 * (tokens + lengths.tokens) * _heads(model) if layer >= model.num_encoder_layers else 0
    return parts.exchanged(model, tokens) + cross


def boundary(model: T5Config, layer: int, lengths: RowLengths) -> int:
    """Elements of a row's hidden states, inside the decoder of both stacks."""
    return _received(model, layer, lengths) * model.hidden_size


def carried_bytes(model: T5Config, layer: int, lengths: RowLengths, segments: bool) -> int:
    """Bytes of the document numbers of the same tokens, and of a dropout key."""
    keys = KEY_BYTES if model.dropout or model.attention_dropout else 0
    return (_received(model, layer, lengths) * SEGMENT_BYTES if segments else 0) + keys


def _received(model: T5Config, layer: int, lengths: RowLengths) -> int:
    """Number of tokens whose hidden states the chunk that begins with a layer receives."""
    # The decoder's first layer embeds its own row; every later one receives it, and the encoder's output beside it.
    return lengths.tokens + (lengths.decoder if layer > model.num_encoder_layers else 0)


def _tokens(model: T5Config, layer: int, lengths: RowLengths) -> int:
    return lengths.tokens if layer < model.num_encoder_layers else lengths.decoder


def _heads(model: T5Config) -> int:
    """Outputs of all heads."""
    return model.num_heads * model.head_size


def sees_whole_rows(name: str) -> bool:
    """Return False: none of the parameters that tensor ranks hold alike sees whole rows."""
    return False
