"""Llama in Hugging Face's names: projections apart, rotary positions by halves of a head."""

from __future__ import annotations

from typing import Any

from engine.checkpoint.interchange.config_map import Always, Computed, Same, rope_theta
from engine.checkpoint.interchange.forms.form import Form, Theirs, one
from engine.config import huggingface_forms
from engine.config.huggingface_forms import Problems
from engine.config.schema.model import GPTConfig


def _write_rope(model: GPTConfig) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta}, "head_dim": model.head_size}


def _read_rope(theirs: Any, problems: Problems) -> dict[str, Any]:
    # `head_dim` came later: older configurations of Llama do not have it, and newer ones may leave it None.
    even, width = theirs.hidden_size // theirs.num_attention_heads, getattr(theirs, "head_dim", None)
    theta = rope_theta(getattr(theirs, "rope_parameters", None), problems)
    return {"rope_theta": theta, "head_size": width or even}


LLAMA = Form(
    twin=huggingface_forms.LLAMA,
    model_type="llama",
    architecture="LlamaForCausalLM",
    names={
        "embed_tokens": one("model.embed_tokens"),
        "layers.#.attention_norm": one("model.layers.#.input_layernorm"),
        "layers.#.attention.qkv_proj": Theirs(tuple(f"model.layers.#.self_attn.{part}_proj" for part in "qkv")),
        "layers.#.attention.out_proj": one("model.layers.#.self_attn.o_proj"),
        "layers.#.ffn_norm": one("model.layers.#.post_attention_layernorm"),
        "layers.#.ffn.gate_up_proj": Theirs(("model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj")),
        "layers.#.ffn.down_proj": one("model.layers.#.mlp.down_proj"),
        "final_norm": one("model.norm"),
        "lm_head": one("lm_head"),
    },
    fields=(
        Same("vocab_size", "vocab_size"),
        Same("num_layers", "num_hidden_layers"),
        Same("hidden_size", "hidden_size"),
        Same("num_heads", "num_attention_heads"),
        Same("num_kv_heads", "num_key_value_heads"),
        Same("feed_forward_size", "intermediate_size"),
        Same("max_positions", "max_position_embeddings"),
        Same("norm_epsilon", "rms_norm_eps"),
        Same("tie_embeddings", "tie_word_embeddings"),
        Same("init_std", "initializer_range"),
        Always("hidden_act", ("silu",)),
        Always("attention_bias", (False,), written=False),
        Always("mlp_bias", (False,), written=False),
        Computed(_write_rope, _read_rope),
    ),
    older=lambda model: {"rope_theta": model.rotary_theta(None)},
    prefix="model.",
    unused=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
