"""T5 in Hugging Face's names: v1.0 (ReLU, tied head, scaled output) and v1.1 (gated GELU, head of its own).

Their layers are numbered within each stack. Their configuration calls every T5 tied and says in
`scale_decoder_outputs` which version it is; where head and embedding differ in a file, they load as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.checkpoint.interchange.config_map import Choice, Computed, Left, Same
from engine.checkpoint.interchange.forms.form import Form, Theirs, numbered, one
from engine.config import huggingface_forms
from engine.config.huggingface_forms import T5_ACTIVATIONS, Problems
from engine.config.schema.model import T5Config

MAX_POSITIONS = 512
"""Default number of positions: theirs have no limit, and the published models were trained with this length."""
_ENCODER, _DECODER = "encoder.block.#.layer", "decoder.block.#.layer"


def _key(config: T5Config, module: str) -> tuple[str, str]:
    key, number = numbered(config, module)
    if not number:
        return key, number
    # Ours count through both stacks: with 6 encoder layers, layer 7 is the decoder's layer 1.
    layer, first = int(number), config.num_encoder_layers
    stack, own = ("encoder", layer) if layer < first else ("decoder", layer - first)
    return key.replace("layers.", f"{stack}.", 1), str(own)


def _write(model: T5Config) -> dict[str, Any]:
    return {
        "num_layers": model.num_encoder_layers,
        "num_decoder_layers": model.num_decoder_layers,
        "tie_word_embeddings": model.tie_embeddings,
        "n_positions": model.max_positions,
    }


def _read(theirs: Any, problems: Problems) -> dict[str, Any]:
    return {
        "num_layers": theirs.num_layers + theirs.num_decoder_layers,
        "num_decoder_layers": theirs.num_decoder_layers,
        "tie_embeddings": theirs.scale_decoder_outputs,
        "max_positions": getattr(theirs, "n_positions", MAX_POSITIONS),
    }


T5 = Form(
    twin=huggingface_forms.T5,
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    names={
        "embed_tokens": one("shared"),
        # One table of relative positions per stack, which theirs keep in the stack's first layer.
        "encoder_positions": one("encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        "decoder_positions": one("decoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        "encoder.#.attention_norm": one(f"{_ENCODER}.0.layer_norm"),
        "encoder.#.attention.qkv_proj": Theirs(tuple(f"{_ENCODER}.0.SelfAttention.{part}" for part in "qkv")),
        "encoder.#.attention.out_proj": one(f"{_ENCODER}.0.SelfAttention.o"),
        "encoder.#.ffn_norm": one(f"{_ENCODER}.1.layer_norm"),
        "encoder.#.ffn.up_proj": one(f"{_ENCODER}.1.DenseReluDense.wi"),
        "encoder.#.ffn.gate_up_proj": Theirs(tuple(f"{_ENCODER}.1.DenseReluDense.wi_{number}" for number in (0, 1))),
        "encoder.#.ffn.down_proj": one(f"{_ENCODER}.1.DenseReluDense.wo"),
        "encoder_norm": one("encoder.final_layer_norm"),
        "decoder.#.attention_norm": one(f"{_DECODER}.0.layer_norm"),
        "decoder.#.attention.qkv_proj": Theirs(tuple(f"{_DECODER}.0.SelfAttention.{part}" for part in "qkv")),
        "decoder.#.attention.out_proj": one(f"{_DECODER}.0.SelfAttention.o"),
        "decoder.#.cross_attention_norm": one(f"{_DECODER}.1.layer_norm"),
        "decoder.#.cross_attention.q_proj": one(f"{_DECODER}.1.EncDecAttention.q"),
        "decoder.#.cross_attention.kv_proj": Theirs(tuple(f"{_DECODER}.1.EncDecAttention.{part}" for part in "kv")),
        "decoder.#.cross_attention.out_proj": one(f"{_DECODER}.1.EncDecAttention.o"),
        "decoder.#.ffn_norm": one(f"{_DECODER}.2.layer_norm"),
        "decoder.#.ffn.up_proj": one(f"{_DECODER}.2.DenseReluDense.wi"),
        "decoder.#.ffn.gate_up_proj": Theirs(tuple(f"{_DECODER}.2.DenseReluDense.wi_{number}" for number in (0, 1))),
        "decoder.#.ffn.down_proj": one(f"{_DECODER}.2.DenseReluDense.wo"),
        "final_norm": one("decoder.final_layer_norm"),
        "lm_head": one("lm_head"),
    },
    fields=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("num_heads", "num_heads"),
        Same("head_size", "d_kv"),
        Same("feed_forward_size", "d_ff"),
        Same("relative_buckets", "relative_attention_num_buckets"),
        Same("relative_distance", "relative_attention_max_distance"),
        Same("norm_epsilon", "layer_norm_epsilon"),
        Choice("activation", "feed_forward_proj", T5_ACTIVATIONS),
        Computed(_write, _read),
        Left({"dropout_rate": 0.0}),
    ),
    # transformers 5 says in scale_decoder_outputs what this field said before, and calls every T5 tied
    older=lambda model: {"tie_word_embeddings": model.tie_embeddings},
    key=_key,
    copies={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
    unused=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
)


def _write_mt5(model: T5Config) -> dict[str, Any]:
    return {key: value for key, value in _write(model).items() if key != "tie_word_embeddings"}


def _read_mt5(theirs: Any, problems: Problems) -> dict[str, Any]:
    # Their class calls every mT5 tied, whatever its file says, and computes with a head of its own.
    found = {"num_layers": theirs.num_layers + theirs.num_decoder_layers, "tie_embeddings": False}
    positions = getattr(theirs, "n_positions", MAX_POSITIONS)
    return found | {"num_decoder_layers": theirs.num_decoder_layers, "max_positions": positions}


MT5 = replace(
    T5,
    model_type="mt5",
    architecture="MT5ForConditionalGeneration",
    # The last two are those of T5 that say whether the head is tied, and dropout.
    fields=(*T5.fields[:-2], Computed(_write_mt5, _read_mt5), T5.fields[-1]),
)
"""T5 1.1 with another vocabulary and a class of its own. A model of ours with these keys is written as T5."""
