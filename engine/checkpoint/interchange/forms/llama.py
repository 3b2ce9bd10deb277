"""Llama in Hugging Face's names: projections apart, rotary positions by halves of a head.

Mistral, Qwen2 and Qwen3 have the same names and most of the same fields; their own files say what differs.
"""

from __future__ import annotations

from typing import Any

from engine.checkpoint.interchange.config_map import Always, Computed, Same
from engine.checkpoint.interchange.forms.form import Form, Theirs, one
from engine.checkpoint.interchange.forms.rope import older_rope, read_rope, write_rope
from engine.config import huggingface_forms
from engine.config.huggingface_forms import Problems
from engine.config.schema.model import GPTConfig


def _write_head(model: GPTConfig) -> dict[str, Any]:
    return {"head_dim": model.head_size}


def read_head(theirs: Any, problems: Problems) -> dict[str, Any]:
    """Return our width of a head, which is an even share of the model's width where theirs leave it out."""
    # `head_dim` came later: older configurations do not have it, and newer ones may leave it None.
    even, width = theirs.hidden_size // theirs.num_attention_heads, getattr(theirs, "head_dim", None)
    return {"head_size": width or even}


SIZES = (
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
    Computed(write_rope, read_rope),
)
"""Fields that Llama shares with its relatives."""
HEAD_SIZE = Computed(_write_head, read_head)
NAMES = {
    "embed_tokens": one("model.embed_tokens"),
    "layers.#.attention_norm": one("model.layers.#.input_layernorm"),
    "layers.#.attention.qkv_proj": Theirs(tuple(f"model.layers.#.self_attn.{part}_proj" for part in "qkv")),
    "layers.#.attention.q_norm": one("model.layers.#.self_attn.q_norm"),
    "layers.#.attention.k_norm": one("model.layers.#.self_attn.k_norm"),
    "layers.#.attention.out_proj": one("model.layers.#.self_attn.o_proj"),
    "layers.#.ffn_norm": one("model.layers.#.post_attention_layernorm"),
    "layers.#.ffn.gate_up_proj": Theirs(("model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj")),
    "layers.#.ffn.down_proj": one("model.layers.#.mlp.down_proj"),
    "final_norm": one("model.norm"),
    "lm_head": one("lm_head"),
}

LLAMA = Form(
    twin=huggingface_forms.LLAMA,
    model_type="llama",
    architecture="LlamaForCausalLM",
    names=NAMES,
    fields=(
        *SIZES,
        HEAD_SIZE,
        Always("attention_bias", (False,), written=False),
        Always("mlp_bias", (False,), written=False),
    ),
    older=older_rope,
    prefix="model.",
    unused=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
