"""The model forms that both Hugging Face and this engine have: names of their configuration fields and parameters.

Tables alone; `engine.checkpoint.interchange.huggingface` reads them in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import huggingface_forms
from engine.config.huggingface_forms import Problems, Twin
from engine.config.schema.model import ModelConfig
from engine.errors import ConfigError


@dataclass(frozen=True)
class Theirs:
    """Modules of theirs whose parameters, joined along the output dimension, make up one of ours."""

    modules: tuple[str, ...]
    transposed: bool = False
    """True if their weights are (in, out), as in GPT-2's Conv1D; ours are (out, in)."""
    after_padding: bool = False
    """True if their table begins with the rows 0 to the number of the padding token, which ours does not have."""


def one(module: str) -> Theirs:
    return Theirs((module,))


def conv1d(module: str) -> Theirs:
    return Theirs((module,), transposed=True)


def numbered(config: ModelConfig, module: str) -> tuple[str, str]:
    """Return a module's name with # for the number of its layer, and that number ("" where it has none)."""
    # layers.3.ffn.up_proj -> ("layers.#.ffn.up_proj", "3")
    number = next(iter(re.findall(r"\.(\d+)\.", module)), "")
    return re.sub(r"\.\d+\.", ".#.", module), number


@dataclass(frozen=True)
class Form:
    """One of the model forms that both sides have.

    `twin` says what `ModelConfig` must be, `theirs` are the values that theirs may have, and `fields` the fields that
    carry over (ours -> theirs).
    """

    twin: Twin
    model_type: str
    architecture: str
    """Name of their class that has all heads of ours."""
    names: Mapping[str, Theirs]
    """Their modules by the key of ours (`key`); an entry with .weight or .bias takes precedence over its module."""
    theirs: Mapping[str, tuple[Any, ...]]
    fields: Mapping[str, str]
    extras: Callable[[Any], dict[str, Any]]
    """Function from our configuration to the fields of theirs beyond `fields`."""
    read: Callable[[Any, Problems], dict[str, Any]] = lambda theirs, problems: {}
    """Function from their configuration to our keys beyond `fields`; adds what ours cannot express to the problems."""
    key: Callable[[Any, str], tuple[str, str]] = numbered
    """Function from one of our modules to its key in `names` and the number of its layer among theirs."""

    @property
    def name(self) -> str:
        return self.twin.name

    @property
    def after_padding(self) -> bool:
        """True if positions are counted from the number of the padding token on."""
        return any(entry.after_padding for entry in self.names.values())


def rope_theta(rope: Mapping[str, Any] | None, problems: Problems) -> float:
    """Base of their rotary frequencies; any scaling of them is a problem."""
    kind = (rope or {}).get("rope_type", "default")
    if kind != "default":
        problems.append(ConfigError(f"rope_parameters.rope_type = {kind!r}", "'default'"))
    return float((rope or {}).get("rope_theta", 10000.0))


def _read_llama(theirs: Any, problems: Problems) -> dict[str, Any]:
    # `head_dim` came later: older configurations of Llama do not have it, and newer ones may leave it None.
    even, width = theirs.hidden_size // theirs.num_attention_heads, getattr(theirs, "head_dim", None)
    theta = rope_theta(getattr(theirs, "rope_parameters", None), problems)
    return {"rope_theta": theta, "head_size": width or even}


GPT2_NAMES = {
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
}
LLAMA_NAMES = {
    "embed_tokens": one("model.embed_tokens"),
    "layers.#.attention_norm": one("model.layers.#.input_layernorm"),
    "layers.#.attention.qkv_proj": Theirs(tuple(f"model.layers.#.self_attn.{part}_proj" for part in "qkv")),
    "layers.#.attention.out_proj": one("model.layers.#.self_attn.o_proj"),
    "layers.#.ffn_norm": one("model.layers.#.post_attention_layernorm"),
    "layers.#.ffn.gate_up_proj": Theirs(("model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj")),
    "layers.#.ffn.down_proj": one("model.layers.#.mlp.down_proj"),
    "final_norm": one("model.norm"),
    "lm_head": one("lm_head"),
}
GPT2 = Form(
    twin=huggingface_forms.GPT2,
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    names=GPT2_NAMES,
    theirs={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    fields={
        "vocab_size": "vocab_size",
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_heads": "n_head",
        "feed_forward_size": "n_inner",
        "max_positions": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    extras=lambda config: {
        "n_inner": config.feed_forward_size,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
)
LLAMA = Form(
    twin=huggingface_forms.LLAMA,
    model_type="llama",
    architecture="LlamaForCausalLM",
    names=LLAMA_NAMES,
    theirs={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    fields={
        "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "feed_forward_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "norm_epsilon": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    extras=lambda config: {
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.feed_forward_size,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    },
    read=_read_llama,
)
