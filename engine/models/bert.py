"""The BERT family: an encoder that predicts masked tokens, in BERT form (post-norm, learned positions, token types, a
head for pairs; Devlin et al. 2019), in RoBERTa form (without pairs; Liu et al. 2019) or in modern form (pre-norm,
rotary positions, gated feed-forward, no biases, most layers local; Warner et al. 2024, ModernBERT).

Tokens see their whole document, and nobody sees padding. The head over the vocabulary, by far the widest product of a
small encoder, is computed for the masked tokens only. Cut into stages and named as in `engine.models.gpt`.

Legend: B batch, T time, D width, V vocabulary, M most masked tokens of a row, C kinds of pairs (2), L losses.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema.model import BERTConfig
from engine.models.attention import positions_in_document, view
from engine.models.chunk import Chunk, Rows, whole
from engine.models.dropout import EMBEDDING as EMBEDDED
from engine.models.dropout import KEYS, drops
from engine.models.dropout import make as make_dropout
from engine.models.heads import VocabularyHead
from engine.models.layers import TransformerLayer, layer_sharding, norm
from engine.parallel.boundary import ROW_LOSSES, Boundary, Field, Tensors
from engine.parallel.functions import PLAIN, Functions
from engine.parallel.sharding import VOCABULARY, ParameterSpec, Table, describe

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
PAIR_KINDS = 2


class Stage(nn.Module):
    """Consecutive layers, with the embeddings on the first stage, the heads on the last."""

    def __init__(self, config: BERTConfig, chunk: Chunk, functions: Functions) -> None:
        super().__init__()
        self.config, self.chunk, self.functions = config, chunk, functions
        width = config.hidden_size
        if chunk.first:
            self.embed_tokens = nn.Embedding(config.padded_vocab_size, width)
            if config.position_table:
                self.embed_positions = nn.Embedding(config.max_positions, width)
            if config.token_types:
                self.embed_types = nn.Embedding(config.token_types, width)
            self.embed_norm = norm(config)
        self.layers = nn.ModuleDict(
            {str(index): TransformerLayer(config, functions, index, normed=index == 0) for index in chunk.layers}
        )
        if chunk.last:
            self.final_norm = norm(config) if not config.post_norm else nn.Identity()
            self.head_transform = nn.Linear(width, width, bias=config.bias)
            self.head_norm = norm(config)
            self.lm_head = VocabularyHead(width, config.vocab_size, config.padded_vocab_size, functions, bias=True)
            if config.tie_embeddings and chunk.first:
                self.lm_head.weight = self.embed_tokens.weight
            if config.pair_head:
                self.pooler = nn.Linear(width, width)
                self.pair_head = nn.Linear(width, PAIR_KINDS)

    def forward(
        self,
        *,
        tokens_BT: torch.Tensor | None = None,
        token_types_BT: torch.Tensor | None = None,
        hidden_BTD: torch.Tensor | None = None,
        segments_BT: torch.Tensor | None = None,
        dropout_keys_B: torch.Tensor | None = None,
        masked_BM: torch.Tensor | None = None,
        targets_BM: torch.Tensor | None = None,
        weights_BM: torch.Tensor | None = None,
        pair_targets_B: torch.Tensor | None = None,
        pair_weights_B: torch.Tensor | None = None,
        by_row: bool = False,
    ) -> Tensors:
        """What the stage makes of one micro-batch.

        The first stage takes `tokens_BT` and `token_types_BT` (int64; None means type 0), the others `hidden_BTD` of
        the stage before. `segments_BT` numbers the documents of a whole row, padding being one; None means that the row
        is one document. `dropout_keys_B` (int64) are the rows' keys; None means no dropout. `masked_BM` are places
        among the given tokens, and pairs are read from the first of these. The last stage returns
        `losses_L` (fp32 weighted sums: of the tokens at `masked_BM` and, with a pair head, of the rows' pairs);
        without `targets_BM` it returns `logits_BTV` over the real vocabulary (of all tokens; on one tensor-parallel
        rank only) and, with a pair head, `pair_logits_BC`. With `by_row` it also returns `row_losses_BL`.
        """
        if hidden_BTD is None:
            assert tokens_BT is not None, "the first stage takes tokens, the others hidden states"
            hidden_BTD = self.embed(tokens_BT, token_types_BT, segments_BT)
        x_BTD: torch.Tensor = hidden_BTD
        dropout = make_dropout(self.config, dropout_keys_B, x_BTD, self.functions)
        made_with = (self.config, x_BTD, segments_BT, True, self.functions.time, dropout)
        views = {reach: view(*made_with, reach) for reach in {self.config.reach(layer) for layer in self.chunk.layers}}
        if self.chunk.first and dropout is not None:
            x_BTD = dropout.hidden(x_BTD, -1, EMBEDDED)
        for number in self.chunk.layers:
            x_BTD = self.layers[str(number)](x_BTD, views[self.config.reach(number)])
        if not self.chunk.last:
            return {"hidden_BTD": x_BTD}
        x_BTD = self.functions.whole_rows(self.final_norm(x_BTD))
        if targets_BM is None:
            made = {"logits_BTV": self.lm_head(self.transform(x_BTD))}
            return made | ({"pair_logits_BC": self.pair_logits(x_BTD)} if self.config.pair_head else {})
        assert masked_BM is not None, "targets come with the places of what is masked"
        # Places behind a row's last masked token are 0 and weigh nothing.
        x_BMD = x_BTD.gather(1, masked_BM.unsqueeze(-1).expand(-1, -1, x_BTD.size(-1)))
        loss, of_rows = self.lm_head.losses(self.transform(x_BMD), targets_BM, weights_BM, by_row)
        losses, losses_B = [loss], [of_rows]
        if self.config.pair_head:
            assert pair_targets_B is not None
            assert pair_weights_B is not None
            loss_B = F.cross_entropy(self.pair_logits(x_BTD).float(), pair_targets_B, reduction="none")
            losses.append((loss_B * pair_weights_B).sum())
            losses_B.append((loss_B * pair_weights_B).detach())
        made = {"losses_L": torch.stack(losses)}
        return made | ({ROW_LOSSES: torch.stack([each for each in losses_B if each is not None], 1)} if by_row else {})

    def embed(
        self, tokens_BT: torch.Tensor, token_types_BT: torch.Tensor | None, segments_BT: torch.Tensor | None
    ) -> torch.Tensor:
        """hidden_BTD of the tokens; learned positions start again with each document, as they would alone."""
        hidden_BTD = self.embed_tokens(tokens_BT)
        if self.config.position_table:
            if segments_BT is None:
                num_given = tokens_BT.size(1)
                positions = torch.arange(num_given, device=tokens_BT.device) + self.functions.time.first(num_given)
            else:
                positions = self.functions.time.own(positions_in_document(segments_BT))  # (B, T)
            hidden_BTD = hidden_BTD + self.embed_positions(positions)
        if self.config.token_types:
            types_BT = torch.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
            hidden_BTD = hidden_BTD + self.embed_types(types_BT)
        return self.embed_norm(hidden_BTD)

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D): what the head over the vocabulary is given of a token's hidden state."""
        return self.head_norm(F.gelu(self.head_transform(hidden)))

    def pair_logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """logits_BC of the rows' pairs, read from their first tokens: 0 in order, 1 random or swapped."""
        return self.pair_head(torch.tanh(self.pooler(hidden_BTD[:, 0])))


def build(config: BERTConfig, chunk: Chunk | None = None, functions: Functions = PLAIN) -> Stage:
    """The modules of one chunk (None: the whole model), on the device context that is active; values come later."""
    return Stage(config, chunk or whole(config.num_layers), functions)


def sharding(config: BERTConfig) -> Table:
    """How the parameters of the whole model lie over the tensor axis; what is not named is replicated."""
    return {EMBEDDING: VOCABULARY, **layer_sharding(config), "lm_head.*": VOCABULARY}


def specs(config: BERTConfig) -> list[ParameterSpec]:
    """Every parameter of the whole model by logical name, in the model's order; a tied head is not there."""
    with torch.device("meta"):
        model = build(config)
    return describe(model.named_parameters(), sharding(config), config.vocab_size)


def ties(config: BERTConfig) -> dict[str, str]:
    """Local name -> logical name of parameters that a stage holds under another name (the tied head)."""
    return {HEAD: EMBEDDING} if config.tie_embeddings else {}


def losses(config: BERTConfig) -> tuple[str, ...]:
    """Masked tokens and, with a pair head, pairs."""
    return ("mlm", "pairs") if config.pair_head else ("mlm",)


def wanted(config: BERTConfig, chunk: Chunk) -> frozenset[str]:
    """Keywords of the chunk that come from the data."""
    found: set[str] = set()
    if chunk.first:
        found |= {"tokens_BT", "segments_BT"} | ({"token_types_BT"} if config.token_types > 1 else set())
        found |= {KEYS} if drops(config) else set()
    if chunk.last:
        found |= {"masked_BM", "targets_BM", "weights_BM"}
        found |= {"pair_targets_B", "pair_weights_B"} if config.pair_head else set()
    return frozenset(found)


def boundary(config: BERTConfig, layer: int, rows: Rows) -> Boundary:
    """What a chunk receives from the one before it: hidden states, document numbers for attention, keys of dropout."""
    held = (rows.num_rows, rows.length // rows.shared_by, config.hidden_size)
    received: Boundary = {"hidden_BTD": Field(held, rows.dtype, differentiable=True)}
    if rows.segments:
        received["segments_BT"] = Field((rows.num_rows, rows.length), torch.int32, differentiable=False)
    if drops(config):
        received[KEYS] = Field((rows.num_rows,), torch.int64, differentiable=False, evaluated=False)
    return received
