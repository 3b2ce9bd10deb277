"""The T5 family: an encoder and a decoder that reads it, cut into chunks of one class.

Raffel et al. 2020 (v1.0: ReLU, tied head) and its v1.1 (gated GELU, head of its own): RMSNorm before each part, no
biases, scores that are not scaled, relative positions from one table per stack. Layers are numbered through both
stacks, the encoder's first; a chunk may hold the end of the one and the beginning of the other. The output of the last
encoder layer is normed there and goes, as `encoded_BSD`, through all chunks of the decoder.

Up to three pipeline stages share the embedding (`embed_tokens` on the first and where the decoder begins, the tied head
on the last), and every one with layers of a stack has that stack's table. Sequence parallelism cuts the rows of both
stacks (`engine.parallel.functions.SequenceSlice`). Dropout is where the paper has it (section 2.1); the embedding of
the decoder is numbered as the site of the last encoder layer.

Legend: B batch, S tokens of the encoder, T tokens of the decoder, D width, H heads (local), V vocabulary, L losses.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.config.adapter_targets import Part
from engine.config.schema.model import T5Config
from engine.models.adapters import adapters, bottleneck_adapters, project
from engine.models.attention import SelfAttention, View
from engine.models.dropout import (
    ATTENTION_OUTPUT,
    CROSS_ATTENTION,
    CROSS_ATTENTION_OUTPUT,
    EMBEDDING_OUTPUT,
    FFN_OUTPUT,
    KEYS,
    STACK_OUTPUT,
    drops,
)
from engine.models.dropout import make as make_dropout
from engine.models.embedding import Embedding
from engine.models.heads import Head, LanguageModelHead, attach
from engine.models.layers import TransformerLayer, feed_forward, layer_sharding
from engine.models.norms import norm
from engine.models.relative import RelativePositions, masked
from engine.parallel.boundary import Boundary, Field, MicroBatchShape, Tensors
from engine.parallel.functions import PLAIN, Functions
from engine.parallel.sharding import HEADS, ROW, VOCABULARY, ParameterSpec, Table, column, describe
from engine.plan.cut import ModelChunk, whole_model

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


class CrossAttention(nn.Module):
    """Attention with queries from the decoder, fused keys and values from the encoder's output."""

    def __init__(self, config: T5Config, functions: Functions, layer: int) -> None:
        super().__init__()
        self.layer, self.tensor_rank = layer, functions.tensor_rank
        self.head_size, self.scale, self.attention = config.head_size, config.score_scale, functions.attention
        heads = config.num_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=config.bias)
        self.kv_proj = nn.Linear(config.hidden_size, 2 * heads, bias=config.bias)
        self.out_proj = nn.Linear(heads, config.hidden_size, bias=config.bias)
        self.adapters = adapters(config, "cross_attention", layer)

    def forward(
        self, x_BTD: torch.Tensor, view: View, encoded_BSD: torch.Tensor, mask_B1TS: torch.Tensor
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        # Head counts from the projections' widths, as in self-attention: a tensor rank has some of the heads.
        q_BTHK = project(self.adapters, "q_proj", self.q_proj, x_BTD, view.dropout).unflatten(-1, (-1, self.head_size))
        both_BSHK = project(self.adapters, "kv_proj", self.kv_proj, encoded_BSD, view.dropout)
        k_BSHK, v_BSHK = both_BSHK.unflatten(-1, (-1, self.head_size)).chunk(2, dim=2)
        drop = view.probability_drop(self.layer, self.tensor_rank * q_BTHK.size(2), CROSS_ATTENTION)
        out_BTHK = self.attention(q_BTHK, k_BSHK, v_BSHK, mask_B1TS, self.scale, drop)
        return project(self.adapters, "out_proj", self.out_proj, out_BTHK.flatten(2), view.dropout)


class CrossLayer(nn.Module):
    """A layer of the decoder: self-attention, attention to the encoder, feed-forward, each behind a norm of its own."""

    def __init__(self, config: T5Config, functions: Functions, number: int) -> None:
        super().__init__()
        self.number = number
        self.attention_norm = norm(config)
        self.attention = SelfAttention(config, functions, number)
        self.cross_attention_norm = norm(config)
        self.cross_attention = CrossAttention(config, functions, number)
        self.ffn_norm = norm(config)
        self.ffn = feed_forward(config, number)
        self.adapters = bottleneck_adapters(config, ("attention", "cross_attention", "ffn"))

    def forward(
        self, x_BTD: torch.Tensor, view: View, encoded_BSD: torch.Tensor, mask_B1TS: torch.Tensor
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        made_BTD = self.attention(self.attention_norm(x_BTD), view)
        x_BTD = x_BTD + self._adapted("attention", view.dropped(made_BTD, self.number, ATTENTION_OUTPUT))
        made_BTD = self.cross_attention(self.cross_attention_norm(x_BTD), view, encoded_BSD, mask_B1TS)
        made_BTD = view.dropped(made_BTD, self.number, CROSS_ATTENTION_OUTPUT)
        x_BTD = x_BTD + self._adapted("cross_attention", made_BTD)
        made_BTD = self.ffn(self.ffn_norm(x_BTD), view.dropout)
        return x_BTD + self._adapted("ffn", view.dropped(made_BTD, self.number, FFN_OUTPUT))

    def _adapted(self, part: Part, made_BTD: torch.Tensor) -> torch.Tensor:
        return made_BTD if self.adapters is None else self.adapters.behind(part, made_BTD)


class T5Chunk(nn.Module):
    """Consecutive layers of both stacks, with embeddings where a stack begins and norms where it ends."""

    def __init__(self, config: T5Config, chunk: ModelChunk, functions: Functions, head: Head) -> None:
        super().__init__()
        self.config, self.chunk, self.functions, self.head = config, chunk, functions, head
        self.encoder, self.decoder = stacks(config, chunk)
        first_of_decoder = config.num_encoder_layers
        self.begins_decoder = first_of_decoder in chunk.layers
        if chunk.first or self.begins_decoder:
            self.embed_tokens = Embedding(config.padded_vocab_size, config.hidden_size)
        # A copy of the stack's one table on every stage that has layers of it: tied, so gradients are summed.
        if self.encoder:
            self.encoder_positions = RelativePositions(config, bidirectional=True)
        if self.decoder:
            self.decoder_positions = RelativePositions(config, bidirectional=False)
        self.layers = nn.ModuleDict()
        for index in chunk.layers:
            kind = TransformerLayer if index < first_of_decoder else CrossLayer
            self.layers[str(index)] = kind(config, functions, index)
        self.ends_encoder = first_of_decoder - 1 in chunk.layers
        if self.ends_encoder:
            self.encoder_norm = norm(config)
        if chunk.last:
            self.final_norm = norm(config)
            attach(self, head, functions, ties(config))

    def forward(
        self,
        *,
        tokens_BS: torch.Tensor | None = None,
        decoder_tokens_BT: torch.Tensor | None = None,
        hidden_BSD: torch.Tensor | None = None,
        encoded_BSD: torch.Tensor | None = None,
        hidden_BTD: torch.Tensor | None = None,
        segments_BS: torch.Tensor | None = None,
        decoder_segments_BT: torch.Tensor | None = None,
        dropout_keys_B: torch.Tensor | None = None,
        by_row: bool = False,
        **given: torch.Tensor,
    ) -> Tensors:
        """Run the chunk on one micro-batch.

        Tokens (int64) are for the chunk where a stack begins; hidden states come from the chunk before: `hidden_BSD`
        inside the encoder, `encoded_BSD` behind it, with `hidden_BTD` inside the decoder. Segments number the documents
        of a whole row; None means that it is one. `dropout_keys_B` (int64) are the rows' keys; None means no dropout.
        `given` is for the head. Returns what the next chunk receives, from the last one what its head does.
        """
        # In the order of use: `pop(0)` below takes the encoder's first, where this chunk begins both stacks.
        embedded = self.embed(tokens_BS, decoder_tokens_BT)
        if self.encoder:
            x_BSD = hidden_BSD if hidden_BSD is not None else embedded.pop(0)
            seen = self.view(x_BSD, self.encoder_positions, segments_BS, dropout_keys_B)
            if hidden_BSD is None:
                x_BSD = seen.dropped(x_BSD, -1, EMBEDDING_OUTPUT)
            for index in self.encoder:
                x_BSD = self.layers[str(index)](x_BSD, seen)
            if not self.ends_encoder:
                return {"hidden_BSD": x_BSD}
            # The chunk with the encoder's last layer normalises its output once for all layers of the decoder.
            encoded_BSD = seen.dropped(self.encoder_norm(x_BSD), self.encoder[-1], STACK_OUTPUT)
        assert encoded_BSD is not None, "the decoder reads the encoder"
        if not self.decoder:
            return {"encoded_BSD": encoded_BSD}
        x_BTD = hidden_BTD if hidden_BTD is not None else embedded.pop(0)
        seen = self.view(x_BTD, self.decoder_positions, decoder_segments_BT, dropout_keys_B)
        if hidden_BTD is None:
            x_BTD = seen.dropped(x_BTD, self.decoder[0] - 1, EMBEDDING_OUTPUT)
        # Of whole rows, and one for all layers. A document is in the same rows of both stacks under the same number.
        sequence_slice = self.functions.sequence_slice
        mask_B1TS = cross_mask(
            decoder_segments_BT,
            segments_BS,
            sequence_slice.whole(x_BTD),
            sequence_slice.whole(encoded_BSD),
            x_BTD.device,
        )
        for index in self.decoder:
            x_BTD = self.layers[str(index)](x_BTD, seen, encoded_BSD, mask_B1TS)
        if not self.chunk.last:
            return {"encoded_BSD": encoded_BSD, "hidden_BTD": x_BTD}
        x_BTD = self.functions.whole_rows(seen.dropped(self.final_norm(x_BTD), self.decoder[-1], STACK_OUTPUT))
        return self.head.outputs(self, x_BTD, given, by_row)

    def embed(self, *tokens: torch.Tensor | None) -> list[torch.Tensor]:
        """Return the hidden states of those tokens that are given, in one look-up: ZeRO-3 gathers a module per call.

        Under sequence parallelism the look-up returns one slice of its tokens to each tensor rank, so they are laid out
        as the slices of rank 0, then those of rank 1: tokens 0 1 2 3 and a b over 2 ranks are looked up as 0 1 a 2 3 b.
        """
        given = [some for some in tokens if some is not None]
        if not given:
            return []
        ranks = self.functions.sequence_slice.shared_by
        together = torch.cat([some.unflatten(1, (ranks, -1)) for some in given], dim=2).flatten(1)
        return list(self.embed_tokens(together).split([some.size(1) // ranks for some in given], dim=1))

    def view(
        self,
        x_BTD: torch.Tensor,
        positions: RelativePositions,
        segments_BT: torch.Tensor | None,
        keys_B: torch.Tensor | None,
    ) -> View:
        """Make the view of a stack with these hidden states and this table."""
        sequence_slice = self.functions.sequence_slice
        # Of whole rows, although this rank holds a slice: attention works on whole rows.
        bias_BHTT = masked(
            positions(sequence_slice.whole(x_BTD), sequence_slice), segments_BT, causal=not positions.bidirectional
        )
        return View(bias_BHTT, None, None, make_dropout(self.config, keys_B, x_BTD, self.functions))


def stacks(config: T5Config, chunk: ModelChunk) -> tuple[range, range]:
    """Return the chunk's layers of the encoder and of the decoder, by global index."""
    # 6 encoder layers: a chunk 4 to 7 gives 4, 5 and 6, 7; a chunk 8 to 9 gives none and 8, 9.
    border = min(max(config.num_encoder_layers, chunk.layers.start), chunk.layers.stop)
    return range(chunk.layers.start, border), range(border, chunk.layers.stop)


def cross_mask(
    decoder_segments_BT: torch.Tensor | None,
    segments_BS: torch.Tensor | None,
    decoder_length: int,
    encoder_length: int,
    device: torch.device,
) -> torch.Tensor:
    """Return mask_B1TS of whole rows, true where a decoder position sees one of the encoder: in the same document."""
    assert (decoder_segments_BT is None) == (segments_BS is None), "rows of both stacks are numbered, or neither"
    if decoder_segments_BT is None or segments_BS is None:
        return torch.ones((1, 1, decoder_length, encoder_length), dtype=torch.bool, device=device)
    return (decoder_segments_BT[:, :, None] == segments_BS[:, None, :])[:, None]


def build(
    config: T5Config, chunk: ModelChunk | None = None, functions: Functions = PLAIN, head: Head | None = None
) -> T5Chunk:
    """Build the modules of one chunk (None means the whole model), on the device context that is active.

    Build under `torch.device("meta")` and give the values afterwards (`engine.models.initial`): the values that plain
    torch modules start with are not the model's. `head` None means the one of the configuration.
    """
    return T5Chunk(config, chunk or whole_model(config), functions, head or configured_head(config))


def sharding(config: T5Config, head: Head | None = None) -> Table:
    """Return how the parameters of the whole model are split over the tensor axis; the others are replicated."""
    heads = config.num_heads * config.head_size
    return {
        EMBEDDING: VOCABULARY,
        "*coder_positions.weight": HEADS,  # of encoder and decoder
        **layer_sharding(config),
        "layers.*.cross_attention.q_proj.*": column(heads),
        "layers.*.cross_attention.kv_proj.*": column(heads, heads),
        "layers.*.cross_attention.out_proj.weight": ROW,
    } | (head or configured_head(config)).sharding


def specs(config: T5Config, head: Head | None = None) -> list[ParameterSpec]:
    """Describe every parameter of the whole model by logical name, in the model's order; a tied head is not there."""
    with torch.device("meta"):
        model = build(config, head=head)
    return describe(model.named_parameters(), sharding(config, head), config.vocab_size)


def ties(config: T5Config) -> dict[str, str]:
    """Return local name -> logical name of the tied head, which a stage without an embedding holds as its own."""
    return {HEAD: EMBEDDING} if config.tie_embeddings else {}


def configured_head(config: T5Config) -> Head:
    """Return the head that predicts the decoder's next token."""
    # v1.0: without the factor the embedding's numbers, of size 1, would make logits of size D ** 0.5.
    return LanguageModelHead(config, "span", config.hidden_size**-0.5 if config.tie_embeddings else 1.0)


def inputs(config: T5Config, chunk: ModelChunk, head: Head | None = None) -> frozenset[str]:
    """Return the keywords of the chunk that come from the data."""
    names: set[str] = set()
    if chunk.first:
        names |= {"tokens_BS", "segments_BS"} | ({KEYS} if drops(config) else set())
    if config.num_encoder_layers in chunk.layers:
        names |= {"decoder_tokens_BT", "decoder_segments_BT"}
    return frozenset(names) | ((head or configured_head(config)).inputs if chunk.last else frozenset())


def boundary(config: T5Config, layer: int, rows: MicroBatchShape) -> Boundary:
    """Return what the chunk that begins with `layer` receives.

    Hidden states of the encoder or its output; inside the decoder that one's hidden states too; the document numbers of
    both; and keys of dropout.
    """
    # The chunk that begins the decoder gets its document numbers from the data, those behind it from the one before.
    encoder, decoder = (rows.num_rows, rows.length), (rows.num_rows, rows.decoder_length)

    def hidden(length: int) -> Field:
        held = (rows.num_rows, length // rows.shared_by, config.hidden_size)
        return Field(held, rows.dtype, differentiable=True)

    received: Boundary = {}
    received["hidden_BSD" if layer < config.num_encoder_layers else "encoded_BSD"] = hidden(rows.length)
    if layer > config.num_encoder_layers:
        received["hidden_BTD"] = hidden(rows.decoder_length)
    if rows.segments:
        received["segments_BS"] = Field(encoder, torch.int32, differentiable=False)
        if layer > config.num_encoder_layers:
            received["decoder_segments_BT"] = Field(decoder, torch.int32, differentiable=False)
    if drops(config):
        received[KEYS] = Field((rows.num_rows,), torch.int64, differentiable=False, evaluated=False)
    return received
