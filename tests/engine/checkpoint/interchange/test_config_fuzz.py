"""Random configurations of theirs, per form: each becomes a model of ours and the same configuration again, with the
tensors that their class has, or is refused by the name of the key that ours cannot express."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import AutoConfig

from engine.checkpoint.interchange.forms import FORMS, Form
from engine.errors import ConfigError
from tests.engine.checkpoint.interchange.shapes import check_shapes

FEW, MANY = 8, 300
Draw = Callable[[random.Random], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """How configurations of a form are drawn."""

    valid: Draw
    """Keys of a configuration that ours computes."""
    refused: Mapping[str, tuple[Any, ...]]
    """Keys -> values that ours does not compute, one of which is put into some of the configurations."""
    moved: frozenset[str] = frozenset()
    """Keys that their class keeps under other names, or changes."""


def sizes(rng: random.Random) -> dict[str, Any]:
    """Sizes by the names of most of their classes, odd ones among them."""
    heads = rng.choice((1, 2, 3, 4, 6))
    return {
        "vocab_size": rng.randint(3, 700),
        "num_hidden_layers": rng.randint(1, 5),
        "hidden_size": heads * rng.choice((8, 10, 12, 16)),
        "num_attention_heads": heads,
        "intermediate_size": rng.randint(1, 90),
        "max_position_embeddings": rng.randint(8, 4096),
        "tie_word_embeddings": rng.random() < 0.5,
        "initializer_range": rng.choice((0.02, 0.01, 0.5)),
    }


def rope(rng: random.Random, **more: Any) -> dict[str, Any]:
    """Rotary parameters of any kind that ours has, of transformers 5."""
    kind = rng.choice(("default", "linear", "dynamic", "llama3", "yarn"))
    found = {"rope_type": kind, "rope_theta": rng.choice((10000.0, 500000.0, 1e6, 77.0)), **more}
    if kind != "default":
        found["factor"] = rng.choice((1.0, 1.5, 2.0, 8.0, 32.0))
    if kind in ("llama3", "yarn"):
        found["original_max_position_embeddings"] = rng.randint(2, 5000)
    if kind == "llama3":
        found |= {"low_freq_factor": rng.choice((0.5, 1.0, 2.0)), "high_freq_factor": rng.choice((3.0, 4.0, 16.0))}
    if kind == "yarn":
        optional = {"attention_factor": 1.25, "beta_fast": 16.5, "beta_slow": 1.5, "truncate": False}
        found |= {key: value for key, value in optional.items() if rng.random() < 0.5}
    return found


def llama(rng: random.Random) -> dict[str, Any]:
    drawn = sizes(rng) | {"rms_norm_eps": rng.choice((1e-5, 1e-6, 0.1)), "rope_parameters": rope(rng)}
    heads = drawn["num_attention_heads"]
    drawn["num_key_value_heads"] = rng.choice([number for number in range(1, heads + 1) if heads % number == 0])
    return drawn


def with_head(rng: random.Random) -> dict[str, Any]:
    return llama(rng) | ({"head_dim": rng.choice((4, 8, 14, 32))} if rng.random() < 0.5 else {})


def mistral(rng: random.Random) -> dict[str, Any]:
    return with_head(rng) | {"sliding_window": rng.choice((None, 2, 3, 17, 4096))}


def qwen(rng: random.Random) -> dict[str, Any]:
    drawn = with_head(rng)
    window = {"use_sliding_window": rng.random() < 0.6, "sliding_window": rng.choice((2, 9, 4096))}
    return drawn | window | {"max_window_layers": rng.randint(0, drawn["num_hidden_layers"] + 1)}


def gpt2(rng: random.Random) -> dict[str, Any]:
    names = {"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head"}
    names |= {"intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}
    drawn = {names.get(key, key): value for key, value in sizes(rng).items()}
    return drawn | {"layer_norm_epsilon": rng.choice((1e-5, 1e-3))}


def neox(rng: random.Random) -> dict[str, Any]:
    drawn = sizes(rng)
    width = drawn["hidden_size"] // drawn["num_attention_heads"]
    # an even number of dimensions, and more than two for dynamic scaling
    share = rng.choice([part / width for part in range(4, width + 1, 2)])
    return drawn | {
        "layer_norm_eps": rng.choice((1e-5, 1e-12)),
        "use_parallel_residual": rng.random() < 0.5,
        "hidden_act": rng.choice(("gelu", "relu", "gelu_pytorch_tanh")),
        "rope_parameters": rope(rng, partial_rotary_factor=share),
    }


def bert(rng: random.Random) -> dict[str, Any]:
    own = {"type_vocab_size": rng.randint(2, 4), "layer_norm_eps": rng.choice((1e-12, 1e-5))}
    return sizes(rng) | own | {"tie_word_embeddings": True}


def roberta(rng: random.Random) -> dict[str, Any]:
    padding = rng.randint(0, 2)
    return bert(rng) | {"type_vocab_size": 1, "pad_token_id": padding}


def modernbert(rng: random.Random) -> dict[str, Any]:
    drawn = sizes(rng) | {"norm_eps": rng.choice((1e-5, 1e-3)), "norm_bias": rng.random() < 0.5}
    bias, every = rng.random() < 0.5, rng.choice((1, 2, 3))
    number = drawn["num_hidden_layers"]
    kinds = ["sliding_attention" if layer % every else "full_attention" for layer in range(number)]
    bases = {kind: {"rope_type": "default", "rope_theta": rng.choice((1e4, 160000.0))} for kind in sorted(set(kinds))}
    both = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    return drawn | {
        "layer_types": kinds,
        "rope_parameters": both | bases,
        "local_attention": rng.choice((4, 16, 128)),
        "pad_token_id": None,
        **dict.fromkeys(("attention_bias", "mlp_bias", "classifier_bias"), bias),
    }


def t5(rng: random.Random) -> dict[str, Any]:
    buckets = rng.choice((4, 8, 32))
    gated = rng.random() < 0.5
    return {
        "vocab_size": rng.randint(3, 700),
        "num_layers": rng.randint(1, 4),
        "num_decoder_layers": rng.randint(1, 4),
        "d_model": rng.choice((8, 21, 48)),
        "d_ff": rng.randint(1, 90),
        "num_heads": rng.choice((1, 3, 4)),
        "d_kv": rng.choice((4, 7, 16)),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": rng.randint(buckets // 2 + 1, 200),
        "layer_norm_epsilon": rng.choice((1e-6, 1e-3)),
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": rng.random() < 0.5,
    }


_NO_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
_ROPES = ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, _NO_ROPE)
_ENCODER = {"hidden_act": ("relu", "silu"), "is_decoder": (True,), "tie_word_embeddings": (False,)}
_QWEN = Kind(
    qwen,
    {"hidden_act": ("gelu",), "rope_parameters": _ROPES},
    # read as `layer_types`, which has the same meaning
    moved=frozenset(("use_sliding_window", "sliding_window", "max_window_layers")),
)
KINDS: dict[str, Kind] = {
    "gpt2": Kind(
        gpt2,
        {"activation_function": ("relu", "silu"), "scale_attn_by_inverse_layer_idx": (True,)}
        | {"scale_attn_weights": (False,), "add_cross_attention": (True,)},
    ),
    "llama": Kind(
        with_head,
        {"hidden_act": ("gelu",), "attention_bias": (True,), "mlp_bias": (True,), "rope_parameters": _ROPES},
    ),
    "mistral": Kind(mistral, {"hidden_act": ("relu",), "rope_parameters": _ROPES, "sliding_window": (1,)}),
    "qwen2": _QWEN,
    "qwen3": Kind(qwen, {**_QWEN.refused, "attention_bias": (True,)}, _QWEN.moved),
    "gpt_neox": Kind(neox, {"hidden_act": ("silu", "gelu_fast"), "attention_bias": (False,)}),
    "bert": Kind(bert, _ENCODER),
    "megatron-bert": Kind(bert, _ENCODER | {"hidden_act": ("relu", "gelu_new", "gelu_pytorch_tanh")}),
    "roberta": Kind(roberta, _ENCODER | {"type_vocab_size": (2,)}, frozenset(("pad_token_id",))),
    "modernbert": Kind(
        modernbert,
        {"hidden_activation": ("relu",), "decoder_bias": (False,), "classifier_activation": ("relu",)},
        # of layers that are not there
        frozenset(("rope_parameters", "local_attention")),
    ),
    "t5": Kind(t5, {"feed_forward_proj": ("gated-silu", "gelu")}, frozenset(("tie_word_embeddings",))),
    "mt5": Kind(t5, {"feed_forward_proj": ("gated-silu",)}, frozenset(("tie_word_embeddings",))),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.model_type}-{form.architecture}")
@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.matrix)])
def test_random_configurations_map_both_ways_or_are_refused_by_name(form: Form, number: int):
    for seed in range(number):
        rng = random.Random(f"{form.architecture} {seed}")
        if seed % 4:
            check_taken(form, rng)
        else:
            check_refused(form, rng)


def check_refused(form: Form, rng: random.Random) -> None:
    """Puts a value into one configuration that ours does not compute; the error has to name its key."""
    kind = KINDS[form.model_type]
    wrong = rng.choice(sorted(kind.refused))
    keys = kind.valid(rng) | {wrong: rng.choice(kind.refused[wrong])}
    theirs = AutoConfig.for_model(form.model_type, **keys, architectures=[form.architecture])
    with pytest.raises(ConfigError, match=wrong):
        form.our_config(theirs, 64)


def check_taken(form: Form, rng: random.Random) -> None:
    """Holds one configuration to its model and back."""
    kind = KINDS[form.model_type]
    keys = kind.valid(rng)
    theirs = AutoConfig.for_model(form.model_type, **keys, architectures=[form.architecture])
    model = form.our_config(theirs, 64)
    again = form.their_config(model, theirs.pad_token_id)
    assert form.our_config(again, 64) == model, keys
    different = {
        key: (_value(again, key), _value(theirs, key))
        for key in keys.keys() - kind.moved
        if _value(again, key) != _value(theirs, key)
    }
    assert not different, keys
    # what a class makes of the keys that it keeps under other names
    assert getattr(again, "layer_types", None) == getattr(theirs, "layer_types", None)
    check_shapes(form, theirs, model)


def _value(config: Any, key: str) -> Any:
    """Qwen2's class has no field for the width of a head, which is its even share where a configuration has none."""
    if key == "head_dim" and not hasattr(config, key):
        return config.hidden_size // config.num_attention_heads
    return getattr(config, key)
