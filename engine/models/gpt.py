"""The GPT family: a decoder in GPT-2 form, in Llama form or in that of its relatives, cut into pipeline stages that are
modules of one class.

Parameter names inside a stage are the logical names of the whole model (layers keep their global index), so any
cut of the model has the same names. The one exception is a tied head on a stage without the embedding: see `ties`.
The vocabulary is padded in memory; padded columns never enter the loss, so their gradients are exactly zero.

Legend: B batch, T time, D width, V vocabulary, L losses.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.config.schema.model import ModelConfig
from engine.config.virtual_tokens import prefix_length, prompt_length
from engine.models.attention import positions_in_document, view
from engine.models.dropout import EMBEDDING_OUTPUT, KEYS, drops
from engine.models.dropout import make as make_dropout
from engine.models.embedding import Embedding
from engine.models.embedding_shift import SHIFT, shifted
from engine.models.heads import Head, LanguageModelHead, attach
from engine.models.kept_head import HeadWithVocabulary
from engine.models.layers import TransformerLayer, layer_sharding
from engine.models.norms import norm
from engine.models.token_heads import task_head
from engine.models.virtual_tokens import prompt, prompted_segments, without_prompt
from engine.parallel.boundary import Boundary, Field, MicroBatchShape, Tensors
from engine.parallel.functions import PLAIN, Functions
from engine.parallel.sharding import VOCABULARY, ParameterSpec, Table, describe
from engine.plan.cut import ModelChunk, whole_model

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


class GPTChunk(nn.Module):
    """Consecutive layers, with the embedding on the first stage, the final norm and the head on the last."""

    def __init__(self, config: ModelConfig, chunk: ModelChunk, functions: Functions, head: Head) -> None:
        super().__init__()
        self.config, self.chunk, self.functions, self.head = config, chunk, functions, head
        if chunk.first:
            self.embed_tokens = Embedding(config.padded_vocab_size, config.hidden_size)
            if config.position_table:
                self.embed_positions = Embedding(config.max_positions, config.hidden_size)
            self.embed_prompt = prompt(config)
        self.layers = nn.ModuleDict({str(index): TransformerLayer(config, functions, index) for index in chunk.layers})
        if chunk.last:
            self.final_norm = norm(config)
            attach(self, head, functions, ties(config))

    def forward(
        self,
        *,
        tokens_BT: torch.Tensor | None = None,
        hidden_BTD: torch.Tensor | None = None,
        segments_BT: torch.Tensor | None = None,
        dropout_keys_B: torch.Tensor | None = None,
        embedding_shift_BTD: torch.Tensor | None = None,
        by_row: bool = False,
        **given: torch.Tensor,
    ) -> Tensors:
        """Run the chunk on one micro-batch.

        The first chunk takes `tokens_BT` (int64), the others `hidden_BTD` of the chunk before. `segments_BT` numbers
        the documents of a whole row; None means that it is one document. `dropout_keys_B` (int64) are the rows' keys;
        None means no dropout. `embedding_shift_BTD` is added to the embeddings of the tokens. `given` is for the head.
        Returns `hidden_BTD`, from the last chunk what its head does.
        """
        segments_BT = prompted_segments(self.config, segments_BT)
        if hidden_BTD is None:
            assert tokens_BT is not None, "the first stage takes tokens, the others hidden states"
            hidden_BTD = self.embed(tokens_BT, segments_BT, embedding_shift_BTD)
        x_BTD: torch.Tensor = hidden_BTD
        dropout = make_dropout(self.config, dropout_keys_B, x_BTD, self.functions)
        # From the hidden states, not the tokens, which later chunks do not have. One view per kind of layer, global or
        # with the sliding window: they differ in the mask.
        made_with = (self.config, x_BTD, segments_BT, False, self.functions.sequence_slice, dropout)
        views = {reach: view(*made_with, reach) for reach in {self.config.reach(layer) for layer in self.chunk.layers}}
        if self.chunk.first and dropout is not None:
            x_BTD = dropout.hidden(x_BTD, -1, EMBEDDING_OUTPUT)
        for number in self.chunk.layers:
            x_BTD = self.layers[str(number)](x_BTD, views[self.config.reach(number)])
        if not self.chunk.last:
            return {"hidden_BTD": x_BTD}
        x_BTD = self.functions.whole_rows(self.final_norm(x_BTD))
        return self.head.outputs(self, without_prompt(self.config, x_BTD), given, by_row, dropout)

    def embed(
        self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None, shift_BTD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return hidden_BTD of the tokens; learned positions start again with each document, as they would alone."""
        hidden_BTD = shifted(self.embed_tokens(tokens_BT), shift_BTD)
        if self.embed_prompt is not None:
            hidden_BTD = self.embed_prompt(hidden_BTD)
        if not self.config.position_table:
            return hidden_BTD
        if segments_BT is None:
            num_given = tokens_BT.size(1) + prompt_length(self.config)
            positions = torch.arange(num_given, device=tokens_BT.device) + self.functions.sequence_slice.first(
                num_given
            )  # (T,)
        else:
            # Counted in the whole row and then cut: a document may begin in an earlier rank's slice.
            positions = self.functions.sequence_slice.own(positions_in_document(segments_BT))  # (B, T)
        return hidden_BTD + self.embed_positions(positions + prefix_length(self.config))


def build(
    config: ModelConfig, chunk: ModelChunk | None = None, functions: Functions = PLAIN, head: Head | None = None
) -> GPTChunk:
    """Build the modules of one chunk (None means the whole model), on the device context that is active.

    Build under `torch.device("meta")` and give the values afterwards (`engine.models.initial`): the values that plain
    torch modules start with are not the model's. `head` None means the one of the configuration.
    """
    return GPTChunk(config, chunk or whole_model(config), functions, head or configured_head(config))


def sharding(config: ModelConfig, head: Head | None = None) -> Table:
    """Return how the parameters of the whole model are split over the tensor axis; the others are replicated."""
    return {EMBEDDING: VOCABULARY, **layer_sharding(config)} | (head or configured_head(config)).sharding


def specs(config: ModelConfig, head: Head | None = None) -> list[ParameterSpec]:
    """Describe every parameter of the whole model by logical name, in the model's order; a tied head is not there."""
    with torch.device("meta"):
        model = build(config, head=head)
    return describe(model.named_parameters(), sharding(config, head), config.vocab_size)


def ties(config: ModelConfig) -> dict[str, str]:
    """Return local name -> logical name of parameters that a stage holds under another name (the tied head).

    Where the embedding is on the same stage, both modules hold one `Parameter` and the local name does not show
    in `named_parameters`.
    """
    return {HEAD: EMBEDDING} if config.tie_embeddings and config.has_vocabulary_head else {}


def configured_head(config: ModelConfig) -> Head:
    """Return the head of the task, that which predicts the successor of each token, or both."""
    if config.task_head is None:
        return LanguageModelHead(config, "causal")
    head = task_head(config)
    return HeadWithVocabulary(head, LanguageModelHead(config, "causal")) if config.has_vocabulary_head else head


def inputs(config: ModelConfig, chunk: ModelChunk, head: Head | None = None) -> frozenset[str]:
    """Return the keywords of the chunk that come from the data."""
    first = {"tokens_BT", "segments_BT", SHIFT} | ({KEYS} if drops(config) else set()) if chunk.first else set()
    return frozenset(first) | ((head or configured_head(config)).inputs if chunk.last else frozenset())


def boundary(config: ModelConfig, layer: int, rows: MicroBatchShape) -> Boundary:
    """Return what a chunk receives from the one before it: hidden states, document numbers and keys of dropout."""
    # Hidden states cross as the sender holds them, one slice per rank; document numbers are needed whole.
    held = (rows.num_rows, rows.length // rows.shared_by + prompt_length(config), config.hidden_size)
    received: Boundary = {"hidden_BTD": Field(held, rows.dtype, differentiable=True)}
    if rows.segments:
        received["segments_BT"] = Field((rows.num_rows, rows.length), torch.int32, differentiable=False)
    if drops(config):
        received[KEYS] = Field((rows.num_rows,), torch.int64, differentiable=False, evaluated=False)
    return received
