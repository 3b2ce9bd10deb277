"""BERT, with and without its head for pairs, and RoBERTa in Hugging Face's names.

Theirs keep the bias of the output projection beside it and tie the two. RoBERTa's positions are counted from the
number of the padding token on, so rows up to that stand before ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.checkpoint.interchange.config_map import ENCODER_SIZES, Always, Computed, Left, Same
from engine.checkpoint.interchange.forms.form import Form, Theirs, one
from engine.config import huggingface_forms
from engine.config.huggingface_forms import Problems


def _encoder(name: str) -> dict[str, Theirs]:
    """Return names of embeddings and layers that BERT and RoBERTa share."""
    layer = f"{name}.encoder.layer.#"
    return {
        "embed_tokens": one(f"{name}.embeddings.word_embeddings"),
        "embed_positions": one(f"{name}.embeddings.position_embeddings"),
        "embed_types": one(f"{name}.embeddings.token_type_embeddings"),
        "embed_norm": one(f"{name}.embeddings.LayerNorm"),
        "layers.#.attention.qkv_proj": Theirs(
            tuple(f"{layer}.attention.self.{part}" for part in ("query", "key", "value"))
        ),
        "layers.#.attention.out_proj": one(f"{layer}.attention.output.dense"),
        "layers.#.attention_norm": one(f"{layer}.attention.output.LayerNorm"),
        "layers.#.ffn.up_proj": one(f"{layer}.intermediate.dense"),
        "layers.#.ffn.down_proj": one(f"{layer}.output.dense"),
        "layers.#.ffn_norm": one(f"{layer}.output.LayerNorm"),
    }


_FIELDS = (
    *ENCODER_SIZES,
    Same("norm_epsilon", "layer_norm_eps"),
    Always("hidden_act", ("gelu",)),
    Always("is_decoder", (False,), written=False),
    Always("add_cross_attention", (False,), written=False),
    # else theirs unties the bias, too, and has one that nothing uses
    Always("tie_word_embeddings", (True,)),
    Left({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
)

BERT = Form(
    twin=huggingface_forms.BERT,
    model_type="bert",
    architecture="BertForPreTraining",
    names=_encoder("bert")
    | {
        "head_transform": one("cls.predictions.transform.dense"),
        "head_norm": one("cls.predictions.transform.LayerNorm"),
        "lm_head": one("cls.predictions.decoder"),
        "lm_head.bias": one("cls.predictions"),
        "pooler": one("bert.pooler.dense"),
        "pair_head": one("cls.seq_relationship"),
    },
    fields=(*_FIELDS, Same("max_positions", "max_position_embeddings"), Same("token_types", "type_vocab_size")),
    prefix="bert.",
    heads=("cls.",),
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    unused=(r"bert\.embeddings\.position_ids",),
)
BERT_WITHOUT_PAIRS = replace(BERT, twin=huggingface_forms.BERT_WITHOUT_PAIRS, architecture="BertForMaskedLM")


def _read_positions(theirs: Any, problems: Problems) -> dict[str, Any]:
    # 514 of roberta-base are 512 and the rows 0 and 1, up to that of its padding token, number 1
    return {"max_positions": theirs.max_position_embeddings - theirs.pad_token_id - 1}


ROBERTA = Form(
    twin=huggingface_forms.ROBERTA,
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    names=_encoder("roberta")
    | {
        "embed_positions": Theirs(("roberta.embeddings.position_embeddings",), after_padding=True),
        "head_transform": one("lm_head.dense"),
        "head_norm": one("lm_head.layer_norm"),
        "lm_head": one("lm_head.decoder"),
        "lm_head.bias": one("lm_head"),
    },
    fields=(
        *_FIELDS,
        Always("type_vocab_size", (1,)),
        # written by `Form.their_config`, which knows the padding token
        Computed(lambda model: {}, _read_positions),
    ),
    prefix="roberta.",
    copies={"lm_head.decoder.bias": "lm_head.bias"},
    unused=(r"roberta\.embeddings\.position_ids",),
)
