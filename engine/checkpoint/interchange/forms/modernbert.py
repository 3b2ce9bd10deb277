"""ModernBERT in Hugging Face's names: most layers local, a rotary base for each kind of layer."""

from __future__ import annotations

from typing import Any

from engine.checkpoint.interchange.config_map import ENCODER_SIZES, Always, Computed, Left, Same
from engine.checkpoint.interchange.forms.form import Form, one
from engine.checkpoint.interchange.forms.rope import unscaled_theta
from engine.config import huggingface_forms
from engine.config.huggingface_forms import Problems
from engine.config.schema.model import BERTConfig
from engine.errors import ConfigError

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Names of the layer kinds."""
_BIASES = ("attention_bias", "mlp_bias", "classifier_bias")


def _write_biases(model: BERTConfig) -> dict[str, Any]:
    return dict.fromkeys(_BIASES, model.bias)


def _read_biases(theirs: Any, problems: Problems) -> dict[str, Any]:
    biases = {name: getattr(theirs, name) for name in _BIASES}
    if len(set(biases.values())) > 1:
        problems.append(ConfigError(f"biases that differ: {biases}", "one value"))
    return {"bias": theirs.mlp_bias}


def _write_layers(model: BERTConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "layer_types": [GLOBAL if model.reach(layer) is None else LOCAL for layer in range(model.num_layers)],
        "rope_parameters": {
            GLOBAL: {"rope_type": "default", "rope_theta": model.rope_theta},
            # None is ours for "as the global layers"; theirs has a number for each kind.
            LOCAL: {"rope_type": "default", "rope_theta": model.local_rope_theta or model.rope_theta},
        },
    }
    return fields if model.local_attention is None else fields | {"local_attention": model.local_attention}


def _read_layers(theirs: Any, problems: Problems) -> dict[str, Any]:
    theta = unscaled_theta(theirs.rope_parameters[GLOBAL], problems)
    return {"rope_theta": theta, **_read_local(theirs, theta, problems)}


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
    local = unscaled_theta(theirs.rope_parameters[LOCAL], problems)
    return {
        "local_attention": 2 * (theirs.local_attention // 2),  # theirs halves it, too
        "global_every": every,
        "local_rope_theta": None if local == theta else local,
    }


def _older(model: BERTConfig) -> dict[str, Any]:
    is_local = model.local_attention is not None
    return {
        "global_attn_every_n_layers": model.global_every if is_local else 1,
        "global_rope_theta": model.rope_theta,
        "local_rope_theta": model.local_rope_theta or model.rope_theta,
    }


MODERN_BERT = Form(
    twin=huggingface_forms.MODERN_BERT,
    model_type="modernbert",
    architecture="ModernBertForMaskedLM",
    names={
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
    },
    fields=(
        *ENCODER_SIZES,
        Same("max_positions", "max_position_embeddings"),
        Same("norm_epsilon", "norm_eps"),
        Same("norm_bias", "norm_bias"),
        Same("tie_embeddings", "tie_word_embeddings"),
        Always("hidden_activation", ("gelu",)),
        Always("classifier_activation", ("gelu",)),
        Always("decoder_bias", (True,)),
        Computed(_write_biases, _read_biases),
        Computed(_write_layers, _read_layers),
        Left({"pad_token_id": None, "cls_token_id": None, "sep_token_id": None}),
    ),
    older=_older,
    prefix="model.",
    heads=("head.", "decoder."),
)
