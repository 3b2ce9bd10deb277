"""The BERT family: an encoder that predicts masked tokens, in BERT form (post-norm, learned positions, token types, a
head for pairs; Devlin et al. 2019), in RoBERTa form (without pairs; Liu et al. 2019), in modern form (pre-norm,
rotary positions, gated feed-forward, no biases, most layers local; Warner et al. 2024, ModernBERT) or in that of
Megatron-LM's BERT (BERT's, but pre-norm, and no norm of the embeddings; Shoeybi et al. 2019, section 5.3).

Tokens see their whole document, and nobody sees padding. The head over the vocabulary, by far the widest product of a
small encoder, is computed for the masked tokens only. Cut into stages and named as in `engine.models.gpt`.

Legend: B batch, T time, D width, V vocabulary, M most masked tokens of a row, C kinds of pairs (2), L losses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema.model import BERTConfig
from engine.config.virtual_tokens import prefix_length, prompt_length
from engine.models.attention import positions_in_document, view
from engine.models.dropout import EMBEDDING_OUTPUT, KEYS, Dropout, drops
from engine.models.dropout import make as make_dropout
from engine.models.embedding import Embedding
from engine.models.embedding_shift import SHIFT, shifted
from engine.models.heads import Head, VocabularyHead, attach
from engine.models.kept_head import HeadWithVocabulary
from engine.models.layers import TransformerLayer, layer_sharding
from engine.models.norms import norm
from engine.models.token_heads import task_head
from engine.models.virtual_tokens import prompt, prompted_segments, prompted_types, without_prompt
from engine.parallel.boundary import ROW_LOSSES, Boundary, Field, MicroBatchShape, Tensors
from engine.parallel.functions import PLAIN, Functions
from engine.parallel.sharding import VOCABULARY, ParameterSpec, Table, describe
from engine.plan.cut import ModelChunk, whole_model

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
PAIR_KINDS = 2


@dataclass(frozen=True)
class MaskedHead:
    """Predicts the masked tokens and, with `model.pair_head`, the order of each row's pair."""

    config: BERTConfig
    sharding: Table = field(default_factory=lambda: {"lm_head.*": VOCABULARY})

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the losses: of masked tokens and, with a pair head, of pairs."""
        return ("mlm", "pairs") if self.config.pair_head else ("mlm",)

    @property
    def inputs(self) -> frozenset[str]:
        """Positions of the masked tokens (`masked_BM`), and targets and weights of each loss."""
        pairs = {"pair_targets_B", "pair_weights_B"} if self.config.pair_head else set()
        return frozenset({"masked_BM", "targets_BM", "weights_BM"} | pairs)

    def modules(self, functions: Functions) -> dict[str, nn.Module]:
        """Make the transformation of a token's hidden state and its output projection, and the head of pairs."""
        config, width = self.config, self.config.hidden_size
        modules: dict[str, nn.Module] = {
            "head_transform": nn.Linear(width, width, bias=config.bias),
            "head_norm": norm(config),
            "lm_head": VocabularyHead(width, config.vocab_size, config.padded_vocab_size, functions, bias=True),
        }
        if config.pair_head:
            modules |= {"pooler": nn.Linear(width, width), "pair_head": nn.Linear(width, PAIR_KINDS)}
        return modules

    def outputs(
        self, chunk: nn.Module, hidden_BTD: torch.Tensor, given: Tensors, by_row: bool, dropout: Dropout | None = None
    ) -> Tensors:
        """Compute `losses_L` (of the masked tokens and the pairs), or without targets logits.

        Those are `logits_BTV` over the real vocabulary (of all tokens; on one tensor-parallel rank only) and, with a
        pair head, `pair_logits_BC`. Positions count among the given tokens; pairs are read from the first of these.
        """
        lm_head = cast(VocabularyHead, chunk.get_submodule("lm_head"))
        if "targets_BM" not in given:
            outputs = {"logits_BTV": lm_head(self._transformed(chunk, hidden_BTD))}
            return outputs | ({"pair_logits_BC": self._pair_logits(chunk, hidden_BTD)} if self.config.pair_head else {})
        # Positions behind a row's last masked token are 0 and weigh nothing: (B, M) -> (B, M, D).
        positions_BMD = given["masked_BM"].unsqueeze(-1).expand(-1, -1, hidden_BTD.size(-1))
        hidden_BMD = self._transformed(chunk, hidden_BTD.gather(1, positions_BMD))
        loss, loss_B = lm_head.losses(hidden_BMD, given["targets_BM"], given["weights_BM"], by_row)
        losses, losses_B = [loss], [loss_B]
        if self.config.pair_head:
            # fp32 like the other loss, whatever the dtype of the weights.
            logits_BC = self._pair_logits(chunk, hidden_BTD).float()
            loss_B = F.cross_entropy(logits_BC, given["pair_targets_B"], reduction="none") * given["pair_weights_B"]
            losses.append(loss_B.sum())
            losses_B.append(loss_B.detach())
        outputs = {"losses_L": torch.stack(losses)}
        rows = [each for each in losses_B if each is not None]
        return outputs | ({ROW_LOSSES: torch.stack(rows, 1)} if by_row else {})

    @staticmethod
    def _transformed(chunk: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Prepare hidden states for the output projection, (..., D) -> (..., D)."""
        transformed = F.gelu(chunk.get_submodule("head_transform")(hidden))
        return chunk.get_submodule("head_norm")(transformed)  # type: ignore[no-any-return]

    @staticmethod
    def _pair_logits(chunk: nn.Module, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return logits_BC of the rows' pairs, read from their first tokens: 0 in order, 1 random or swapped."""
        pooled_BD = torch.tanh(chunk.get_submodule("pooler")(hidden_BTD[:, 0]))
        return chunk.get_submodule("pair_head")(pooled_BD)  # type: ignore[no-any-return]


class BERTChunk(nn.Module):
    """Consecutive layers, with the embeddings on the first stage, the heads on the last."""

    def __init__(self, config: BERTConfig, chunk: ModelChunk, functions: Functions, head: Head) -> None:
        super().__init__()
        self.config, self.chunk, self.functions, self.head = config, chunk, functions, head
        width = config.hidden_size
        if chunk.first:
            self.embed_tokens = Embedding(config.padded_vocab_size, width)
            if config.position_table:
                self.embed_positions = Embedding(config.max_positions, width)
            if config.token_types:
                self.embed_types = Embedding(config.token_types, width)
            self.embed_norm = norm(config) if config.embedding_norm else nn.Identity()
            self.embed_prompt = prompt(config)
        self.layers = nn.ModuleDict(
            {
                str(index): TransformerLayer(config, functions, index, normed=index == 0 and config.embedding_norm)
                for index in chunk.layers
            }
        )
        if chunk.last:
            self.final_norm = norm(config) if not config.post_norm else nn.Identity()
            attach(self, head, functions, ties(config))

    def forward(
        self,
        *,
        tokens_BT: torch.Tensor | None = None,
        token_types_BT: torch.Tensor | None = None,
        hidden_BTD: torch.Tensor | None = None,
        segments_BT: torch.Tensor | None = None,
        dropout_keys_B: torch.Tensor | None = None,
        embedding_shift_BTD: torch.Tensor | None = None,
        by_row: bool = False,
        **given: torch.Tensor,
    ) -> Tensors:
        """Run the chunk on one micro-batch.

        The first chunk takes `tokens_BT` and `token_types_BT` (int64; None means type 0), the others `hidden_BTD` of
        the chunk before. `segments_BT` numbers the documents of a whole row, padding being one; None means that the row
        is one document. `dropout_keys_B` (int64) are the rows' keys; None means no dropout. `embedding_shift_BTD` is
        added to the embeddings of the tokens. `given` is for the head. Returns `hidden_BTD`, from the last chunk what
        its head does.
        """
        segments_BT = prompted_segments(self.config, segments_BT)
        if hidden_BTD is None:
            assert tokens_BT is not None, "the first stage takes tokens, the others hidden states"
            hidden_BTD = self.embed(tokens_BT, token_types_BT, segments_BT, embedding_shift_BTD)
        x_BTD: torch.Tensor = hidden_BTD
        dropout = make_dropout(self.config, dropout_keys_B, x_BTD, self.functions)
        # One view per kind of layer, global or local: they differ in mask and rotary base.
        made_with = (self.config, x_BTD, segments_BT, True, self.functions.sequence_slice, dropout)
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
        self,
        tokens_BT: torch.Tensor,
        token_types_BT: torch.Tensor | None,
        segments_BT: torch.Tensor | None,
        shift_BTD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return hidden_BTD of the tokens; learned positions start again with each document, as they would alone."""
        hidden_BTD = shifted(self.embed_tokens(tokens_BT), shift_BTD)
        if self.embed_prompt is not None:
            hidden_BTD = self.embed_prompt(hidden_BTD)
        if self.config.position_table:
            if segments_BT is None:
                num_given = tokens_BT.size(1) + prompt_length(self.config)
                positions = torch.arange(num_given, device=tokens_BT.device) + self.functions.sequence_slice.first(
                    num_given
                )
            else:
                # Counted in the whole row and then cut: a document may begin in an earlier rank's slice.
                positions = self.functions.sequence_slice.own(positions_in_document(segments_BT))  # (B, T)
            hidden_BTD = hidden_BTD + self.embed_positions(positions + prefix_length(self.config))
        if self.config.token_types:
            # Type 0 is added too where there are no pairs: BERT was trained with it, and its checkpoints expect it.
            types_BT = torch.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
            hidden_BTD = hidden_BTD + self.embed_types(prompted_types(self.config, types_BT))
        return self.embed_norm(hidden_BTD)


def build(
    config: BERTConfig, chunk: ModelChunk | None = None, functions: Functions = PLAIN, head: Head | None = None
) -> BERTChunk:
    """Build the modules of one chunk (None means the whole model), on the device context that is active.

    Build under `torch.device("meta")` and give the values afterwards (`engine.models.initial`): the values that plain
    torch modules start with are not the model's. `head` None means the one of the configuration.
    """
    return BERTChunk(config, chunk or whole_model(config), functions, head or configured_head(config))


def sharding(config: BERTConfig, head: Head | None = None) -> Table:
    """Return how the parameters of the whole model are split over the tensor axis; the others are replicated."""
    return {EMBEDDING: VOCABULARY, **layer_sharding(config)} | (head or configured_head(config)).sharding


def specs(config: BERTConfig, head: Head | None = None) -> list[ParameterSpec]:
    """Describe every parameter of the whole model by logical name, in the model's order; a tied head is not there."""
    with torch.device("meta"):
        model = build(config, head=head)
    return describe(model.named_parameters(), sharding(config, head), config.vocab_size)


def ties(config: BERTConfig) -> dict[str, str]:
    """Return local name -> logical name of parameters that a stage holds under another name (the tied head)."""
    return {HEAD: EMBEDDING} if config.tie_embeddings and config.has_vocabulary_head else {}


def configured_head(config: BERTConfig) -> Head:
    """Return the head of the task or, without one, that which predicts masked tokens and, with `model.pair_head`,
    pairs; a task's may have that of masked tokens beside it."""
    if config.task_head is None:
        return MaskedHead(config)
    head = task_head(config)
    if not config.has_vocabulary_head:
        return head
    return HeadWithVocabulary(head, MaskedHead(config.model_copy(update={"pair_head": False})))


def inputs(config: BERTConfig, chunk: ModelChunk, head: Head | None = None) -> frozenset[str]:
    """Return the keywords of the chunk that come from the data."""
    found: set[str] = set()
    if chunk.first:
        found |= {"tokens_BT", "segments_BT", SHIFT} | ({"token_types_BT"} if config.token_types > 1 else set())
        found |= {KEYS} if drops(config) else set()
    return frozenset(found) | ((head or configured_head(config)).inputs if chunk.last else frozenset())


def boundary(config: BERTConfig, layer: int, rows: MicroBatchShape) -> Boundary:
    """Return what a chunk receives from the one before it: hidden states, document numbers and keys of dropout."""
    held = (rows.num_rows, rows.length // rows.shared_by + prompt_length(config), config.hidden_size)
    received: Boundary = {"hidden_BTD": Field(held, rows.dtype, differentiable=True)}
    if rows.segments:
        received["segments_BT"] = Field((rows.num_rows, rows.length), torch.int32, differentiable=False)
    if drops(config):
        received[KEYS] = Field((rows.num_rows,), torch.int64, differentiable=False, evaluated=False)
    return received
