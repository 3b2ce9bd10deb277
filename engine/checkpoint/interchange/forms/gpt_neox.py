"""GPT-NeoX (Pythia) in Hugging Face's names: queries, keys and values head by head, rotary positions of a part of each
head, attention and feed-forward part side by side."""

from __future__ import annotations

from typing import Any

from engine.checkpoint.interchange.config_map import Always, Choice, Computed, Left, Same
from engine.checkpoint.interchange.forms.form import Form, Theirs, one
from engine.checkpoint.interchange.forms.rope import read_scaling, theta_of, write_scaling
from engine.config import huggingface_forms
from engine.config.huggingface_forms import NEOX_ACTIVATIONS, Problems
from engine.config.schema.model import GPTConfig


def _write_rope(model: GPTConfig) -> dict[str, Any]:
    share = {"partial_rotary_factor": model.partial_rotary_factor}
    return {"rope_parameters": write_scaling(model) | {"rope_theta": model.rope_theta} | share}


def _read_rope(theirs: Any, problems: Problems) -> dict[str, Any]:
    rope = theirs.rope_parameters
    return {
        "rope_theta": theta_of(rope),
        "partial_rotary_factor": float(rope["partial_rotary_factor"]),
        "rope_scaling": read_scaling(rope, problems),
    }


def _older(model: GPTConfig) -> dict[str, Any]:
    scaling = {} if model.rope_scaling is None else {"rope_scaling": write_scaling(model)}
    return {"rotary_emb_base": model.rope_theta, "rotary_pct": model.partial_rotary_factor} | scaling


GPT_NEOX = Form(
    twin=huggingface_forms.GPT_NEOX,
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    names={
        "embed_tokens": one("gpt_neox.embed_in"),
        "layers.#.attention_norm": one("gpt_neox.layers.#.input_layernorm"),
        "layers.#.attention.qkv_proj": Theirs(("gpt_neox.layers.#.attention.query_key_value",), per_head=True),
        "layers.#.attention.out_proj": one("gpt_neox.layers.#.attention.dense"),
        "layers.#.ffn_norm": one("gpt_neox.layers.#.post_attention_layernorm"),
        "layers.#.ffn.up_proj": one("gpt_neox.layers.#.mlp.dense_h_to_4h"),
        "layers.#.ffn.down_proj": one("gpt_neox.layers.#.mlp.dense_4h_to_h"),
        "final_norm": one("gpt_neox.final_layer_norm"),
        "lm_head": one("embed_out"),
    },
    fields=(
        Same("vocab_size", "vocab_size"),
        Same("num_layers", "num_hidden_layers"),
        Same("hidden_size", "hidden_size"),
        Same("num_heads", "num_attention_heads"),
        Same("feed_forward_size", "intermediate_size"),
        Same("max_positions", "max_position_embeddings"),
        Same("norm_epsilon", "layer_norm_eps"),
        Same("tie_embeddings", "tie_word_embeddings"),
        Same("init_std", "initializer_range"),
        Same("parallel_residual", "use_parallel_residual"),
        Choice("activation", "hidden_act", NEOX_ACTIVATIONS, also={"gelu_new": "gelu_tanh"}),
        Always("attention_bias", (True,), written=False),
        Computed(_write_rope, _read_rope),
        Left({"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    ),
    older=_older,
    prefix="gpt_neox.",
    heads=("embed_out.", "lm_head."),
    # the head's name in transformers 5, which reads and writes files under the older one
    spellings={"lm_head.": "embed_out."},
    # causal masks and tables, which old files have
    unused=(r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
)
