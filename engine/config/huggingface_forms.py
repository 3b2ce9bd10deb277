"""The forms of models that Hugging Face's library has, too: the values of the model's keys that an export requires.

No torch and no library of theirs, so that `plan` and the start of a run tell what `convert` would refuse. The names of
parameters and fields on their side are in `engine.checkpoint.interchange`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config.schema.model import ModelConfig
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError, PalimpsestError

Problems = list[PalimpsestError]
T5_ACTIVATIONS = {"relu": "relu", "geglu_tanh": "gated-gelu"}
"""Ours -> theirs."""
NEOX_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
"""Ours -> theirs."""


@dataclass(frozen=True)
class Twin:
    """A form of model that both sides compute: the values that the model's keys must have."""

    name: str
    values: Mapping[str, Any]
    even_heads: bool = True
    """Every head has keys of its own and an even share of the width."""
    divided_width: bool = False
    """The width is a multiple of the number of heads, whatever a head's own width."""
    choices: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    """Further keys, and the test that their values must pass."""
    allowed: Mapping[str, str] = field(default_factory=dict)
    """The values that pass, in words."""
    fused: frozenset[str] = frozenset()
    """Our linear layers of several blocks that are one matrix in their files, too."""

    def mismatches(self, model: ModelConfig) -> Problems:
        """Return an error for every key that keeps a model from this form."""
        wrong = [(key, str(value)) for key, value in self.values.items() if getattr(model, key) != value]
        wrong += [(key, self.allowed[key]) for key, passes in self.choices.items() if not passes(getattr(model, key))]
        problems: Problems = [
            ConfigError(f"model.{key} = {getattr(model, key)}", f"{allowed} in {self.name} form")
            for key, allowed in wrong
        ]
        if (self.divided_width or self.even_heads) and model.hidden_size % model.num_heads:
            allowed = f"a divisor of {model.hidden_size} (model.hidden_size) in {self.name} form"
            problems.append(ConfigError(f"model.num_heads = {model.num_heads}", allowed))
        return problems + (_uneven(model, self.name) if self.even_heads else [])


def _uneven(model: ModelConfig, form: str) -> Problems:
    even = model.hidden_size // model.num_heads
    found = {
        "num_kv_heads": (model.num_kv_heads, model.num_heads, " (model.num_heads)"),
        "head_size": (model.head_size, even, ""),
    }
    return [
        ConfigError(f"model.{key} = {value}", f"{wanted}{what} in {form} form")
        for key, (value, wanted, what) in found.items()
        if value != wanted
    ]


GPT2 = Twin(
    name="GPT-2",
    values={
        "family": "gpt",
        "position": "learned",
        "norm": "layernorm",
        "norm_bias": True,
        "activation": "gelu_tanh",
        "bias": True,
        "qkv_bias": True,
        "qk_norm": False,
        "parallel_residual": False,
        "sliding_window": None,
    },
    fused=frozenset({"qkv_proj"}),
)
_LLAMA = {
    "family": "gpt",
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "partial_rotary_factor": 1.0,
    "parallel_residual": False,
}
LLAMA = Twin(
    name="Llama",
    values=_LLAMA | {"qkv_bias": False, "qk_norm": False, "sliding_window": None},
    even_heads=False,
    divided_width=True,
)
MISTRAL = Twin(
    name="Mistral",
    values=_LLAMA | {"qkv_bias": False, "qk_norm": False, "first_window_layer": 0},
    even_heads=False,
    # Without a window a model is of Llama's form.
    choices={"sliding_window": lambda width: width is not None},
    allowed={"sliding_window": "a number of tokens"},
)
QWEN2 = Twin(name="Qwen2", values=_LLAMA | {"qkv_bias": True, "qk_norm": False}, even_heads=False)
QWEN3 = Twin(name="Qwen3", values=_LLAMA | {"qkv_bias": False, "qk_norm": True}, even_heads=False)
GPT_NEOX = Twin(
    name="GPT-NeoX",
    values={
        "family": "gpt",
        "position": "rope",
        "norm": "layernorm",
        "norm_bias": True,
        "bias": True,
        "qkv_bias": True,
        "qk_norm": False,
        "sliding_window": None,
    },
    choices={"activation": lambda name: name in NEOX_ACTIVATIONS},
    allowed={"activation": " or ".join(NEOX_ACTIVATIONS)},
    fused=frozenset({"qkv_proj"}),
)
_POST_NORM = {
    "family": "bert",
    "position": "learned",
    "norm": "layernorm",
    "norm_bias": True,
    "norm_position": "post",
    "embedding_norm": True,
    "activation": "gelu",
    "bias": True,
    "tie_embeddings": True,
    "local_attention": None,
}
_PRE_NORM = _POST_NORM | {"norm_position": "pre", "embedding_norm": False}
_WITH_SEGMENTS = "1 or more"
"""Their classes of these forms always have an embedding of segments, even of one kind."""


def _has_segments(token_types: int) -> bool:
    return token_types >= 1


BERT = Twin(
    name="BERT",
    values=_POST_NORM | {"pair_head": True},
    choices={"token_types": _has_segments},
    allowed={"token_types": _WITH_SEGMENTS},
)
BERT_WITHOUT_PAIRS = Twin(
    name="BERT without pairs",
    values=_POST_NORM | {"pair_head": False},
    # With one kind of segment and no pairs a model is of RoBERTa's form.
    choices={"token_types": lambda count: count >= 2},
    allowed={"token_types": "2 or more"},
)
ROBERTA = Twin(name="RoBERTa", values=_POST_NORM | {"pair_head": False, "token_types": 1})
MEGATRON_BERT = Twin(
    name="Megatron BERT",
    values=_PRE_NORM | {"pair_head": True},
    choices={"token_types": _has_segments},
    allowed={"token_types": _WITH_SEGMENTS},
)
MEGATRON_BERT_WITHOUT_PAIRS = Twin(
    name="Megatron BERT without pairs",
    values=_PRE_NORM | {"pair_head": False},
    choices={"token_types": _has_segments},
    allowed={"token_types": _WITH_SEGMENTS},
)
MODERN_BERT = Twin(
    name="ModernBERT",
    values={
        "family": "bert",
        "position": "rope",
        "norm": "layernorm",
        "norm_position": "pre",
        "embedding_norm": True,
        "activation": "geglu",
        "token_types": 0,
        "pair_head": False,
    },
    fused=frozenset({"qkv_proj", "gate_up_proj"}),
)
T5 = Twin(
    name="T5",
    values={"family": "t5", "norm": "rmsnorm", "norm_bias": True, "bias": False},
    even_heads=False,
    choices={"activation": lambda name: name in T5_ACTIVATIONS},
    allowed={"activation": " or ".join(T5_ACTIVATIONS)},
)
_ENCODERS = (BERT, BERT_WITHOUT_PAIRS, ROBERTA, MEGATRON_BERT, MEGATRON_BERT_WITHOUT_PAIRS, MODERN_BERT)
TWINS = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GPT_NEOX, *_ENCODERS, T5)

_STRUCTURE = ("position", "pair_head", "qk_norm", "qkv_bias")
"""Keys that decide which form of its family a mix is nearest to, in this order, before the number of keys that
differ."""


def nearest(model: ModelConfig) -> tuple[Twin, Problems]:
    """Return the form that a model is of, or the nearest one, and the keys that keep the model from it."""
    of_family = [twin for twin in TWINS if twin.values["family"] == model.family]
    wrong = {twin.name: twin.mismatches(model) for twin in of_family}

    def distance(twin: Twin) -> tuple[Any, ...]:
        differs = [key in twin.values and getattr(model, key) != twin.values[key] for key in _STRUCTURE]
        # Tuples sort by the structure first: learned positions are never nearest to a form with rotary ones. Of two
        # forms that lack as much, the one that has a model's window is nearer.
        lacks_window = model.reach(model.num_layers - 1) is not None and "sliding_window" in twin.values
        return (*differs, len(wrong[twin.name]), lacks_window)

    found = min(of_family, key=distance)
    return found, wrong[found.name]


def export_warning(run: RunConfig) -> ConfigError | None:
    """Return what to tell of a run whose model cannot be exported: the keys that are why; None where it can, or need
    not.
    """
    twin, problems = nearest(run.model)
    if run.export == "none" or not problems:
        return None
    return ConfigError(
        "this model cannot be exported to Hugging Face, whose library has no twin of it: "
        + ", ".join(problem.wrong for problem in problems),
        f"in {twin.name} form, the nearest: "
        + ", ".join(f"{_key(problem)} {problem.allowed.removesuffix(f' in {twin.name} form')}" for problem in problems),
        "change these keys before you train, or set export=none if the model need not leave",
    )


def _key(problem: PalimpsestError) -> str:
    return problem.wrong.partition(" = ")[0]
