"""GPT-2 in Hugging Face's names: fused projections that are (in, out), as its Conv1D has them."""

from engine.checkpoint.interchange.config_map import Always, Left, Same
from engine.checkpoint.interchange.forms.form import Form, conv1d, one
from engine.config import huggingface_forms

GPT2 = Form(
    twin=huggingface_forms.GPT2,
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    names={
        "embed_tokens": one("transformer.wte"),
        "embed_positions": one("transformer.wpe"),
        "layers.#.attention_norm": one("transformer.h.#.ln_1"),
        "layers.#.attention.qkv_proj": conv1d("transformer.h.#.attn.c_attn"),
        "layers.#.attention.out_proj": conv1d("transformer.h.#.attn.c_proj"),
        "layers.#.ffn_norm": one("transformer.h.#.ln_2"),
        "layers.#.ffn.up_proj": conv1d("transformer.h.#.mlp.c_fc"),
        "layers.#.ffn.down_proj": conv1d("transformer.h.#.mlp.c_proj"),
        "final_norm": one("transformer.ln_f"),
        "lm_head": one("lm_head"),
    },
    fields=(
        Same("vocab_size", "vocab_size"),
        Same("num_layers", "n_layer"),
        Same("hidden_size", "n_embd"),
        Same("num_heads", "n_head"),
        Same("feed_forward_size", "n_inner"),
        Same("max_positions", "n_positions"),
        Same("norm_epsilon", "layer_norm_epsilon"),
        Same("tie_embeddings", "tie_word_embeddings"),
        Same("init_std", "initializer_range"),
        Always("activation_function", ("gelu_new", "gelu_pytorch_tanh")),
        Always("scale_attn_weights", (True,), written=False),
        Always("scale_attn_by_inverse_layer_idx", (False,), written=False),
        Always("add_cross_attention", (False,), written=False),
        Left({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    ),
    older=lambda model: {"n_ctx": model.max_positions},  # llama.cpp
    prefix="transformer.",
    # causal masks, which old files have
    unused=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)
