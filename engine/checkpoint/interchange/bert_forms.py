"""BERT (with and without its head for pairs), RoBERTa and ModernBERT in Hugging Face's names.

Theirs keep the bias of the output projection beside it and tie the two. RoBERTa's positions are counted from the
number of the padding token on, so rows up to that stand before ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.checkpoint.interchange.forms import Form, Theirs, one, rope_theta
from engine.config import huggingface_forms
from engine.config.huggingface_forms import Problems
from engine.config.schema.model import BERTConfig
from engine.errors import ConfigError


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


BERT_NAMES = _encoder("bert") | {
    "head_transform": one("cls.predictions.transform.dense"),
    "head_norm": one("cls.predictions.transform.LayerNorm"),
    "lm_head": one("cls.predictions.decoder"),
    "lm_head.bias": one("cls.predictions"),
    "pooler": one("bert.pooler.dense"),
    "pair_head": one("cls.seq_relationship"),
}
ROBERTA_NAMES = _encoder("roberta") | {
    "embed_positions": Theirs(("roberta.embeddings.position_embeddings",), after_padding=True),
    "head_transform": one("lm_head.dense"),
    "head_norm": one("lm_head.layer_norm"),
    "lm_head": one("lm_head.decoder"),
    "lm_head.bias": one("lm_head"),
}
MODERN_BERT_NAMES = {
    "embed_tokens": one("model.embeddings.tok_embeddings"),
    "embed_norm": one("model.embeddings.norm"),
    "layers.#.attention_norm": one("model.layers.#.attn_norm"),
    "layers.#.attention.qkv_proj": one("model.layers.#.attn.Wqkv"),
    "layers.#.attention.out_proj": one("model.layers.#.attn.Wo"),
    "layers.#.ffn_norm": one("model.layers.#.mlp_norm"),
    "layers.#.ffn.gate_up_proj": one("model.layers.#.mlp.Wi"),
    "layers.#.ffn.down_proj": one("model.layers.#.mlp.Wo"),
    "final_norm": one("model.final_norm"),
    "head_transform": one("head.dense"),
    "head_norm": one("head.norm"),
    "lm_head": one("decoder"),
}

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Names of ModernBERT's layer kinds."""
_FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "feed_forward_size": "intermediate_size",
    "init_std": "initializer_range",
}


def _bert_extras(config: BERTConfig) -> dict[str, Any]:
    return {
        "tie_word_embeddings": True,
        "intermediate_size": config.feed_forward_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


BERT = Form(
    twin=huggingface_forms.BERT,
    model_type="bert",
    architecture="BertForPreTraining",
    names=BERT_NAMES,
    theirs={
        "hidden_act": ("gelu",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),  # else theirs unties the bias, too, and has one that nothing uses
    },
    fields=_FIELDS
    | {
        "max_positions": "max_position_embeddings",
        "token_types": "type_vocab_size",
        "norm_epsilon": "layer_norm_eps",
    },
    extras=_bert_extras,
)


BERT_WITHOUT_PAIRS = replace(
    BERT,
    twin=huggingface_forms.BERT_WITHOUT_PAIRS,
    architecture="BertForMaskedLM",
)


def _read_roberta(theirs: Any, problems: Problems) -> dict[str, Any]:
    # 514 of roberta-base are 512 and the rows 0 and 1, up to that of its padding token, number 1
    return {"max_positions": theirs.max_position_embeddings - theirs.pad_token_id - 1}


ROBERTA = Form(
    twin=huggingface_forms.ROBERTA,
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    names=ROBERTA_NAMES,
    theirs=dict(BERT.theirs) | {"type_vocab_size": (1,)},
    fields=_FIELDS | {"norm_epsilon": "layer_norm_eps"},
    extras=lambda config: _bert_extras(config) | {"type_vocab_size": 1},
    read=_read_roberta,
)


def _modern_extras(config: BERTConfig) -> dict[str, Any]:
    return {
        "intermediate_size": config.feed_forward_size,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "norm_bias": config.norm_bias,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "classifier_bias": config.bias,
        "decoder_bias": True,
        "layer_types": [GLOBAL if config.reach(layer) is None else LOCAL for layer in range(config.num_layers)],
        "rope_parameters": {
            GLOBAL: {"rope_type": "default", "rope_theta": config.rope_theta},
            # None is ours for "as the global layers"; theirs has a number for each kind.
            LOCAL: {"rope_type": "default", "rope_theta": config.local_rope_theta or config.rope_theta},
        },
        **({} if config.local_attention is None else {"local_attention": config.local_attention}),
        "pad_token_id": None,
        "cls_token_id": None,
        "sep_token_id": None,
    }


def _read_modern(theirs: Any, problems: Problems) -> dict[str, Any]:
    biases = {name: getattr(theirs, name) for name in ("attention_bias", "mlp_bias", "classifier_bias")}
    if len(set(biases.values())) > 1:
        problems.append(ConfigError(f"biases that differ: {biases}", "one value"))
    theta = rope_theta(theirs.rope_parameters[GLOBAL], problems)
    return {"bias": theirs.mlp_bias, "rope_theta": theta, **_read_local(theirs, theta, problems)}


def _read_local(theirs: Any, theta: float, problems: Problems) -> dict[str, Any]:
    """Return our keys of local layers: window, order and rotary base; empty where no layer is local."""
    kinds = list(theirs.layer_types)
    if LOCAL not in kinds:
        return {}
    # Global layers come first of every n: n = 3 is [GLOBAL, LOCAL, LOCAL, GLOBAL, ...]. The least n that fits is ours.
    every = next(
        (n for n in range(2, len(kinds) + 1) if kinds == [LOCAL if i % n else GLOBAL for i in range(len(kinds))]), 0
    )
    if every == 0:
        problems.append(
            ConfigError(
                f"layer_types = {kinds}", f"{GLOBAL} for the first of every so many layers, {LOCAL} for the others"
            )
        )
        return {}
    local = rope_theta(theirs.rope_parameters[LOCAL], problems)
    return {
        "local_attention": 2 * (theirs.local_attention // 2),  # theirs halves it, too
        "global_every": every,
        "local_rope_theta": None if local == theta else local,
    }


MODERN_BERT = Form(
    twin=huggingface_forms.MODERN_BERT,
    model_type="modernbert",
    architecture="ModernBertForMaskedLM",
    names=MODERN_BERT_NAMES,
    theirs={"hidden_activation": ("gelu",), "classifier_activation": ("gelu",), "decoder_bias": (True,)},
    fields=_FIELDS
    | {"max_positions": "max_position_embeddings", "norm_epsilon": "norm_eps", "norm_bias": "norm_bias"}
    | {"tie_embeddings": "tie_word_embeddings"},
    extras=_modern_extras,
    read=_read_modern,
)
