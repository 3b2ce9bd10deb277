"""Qwen2 and Qwen3 in Hugging Face's names: Llama with biases of queries, keys and values, or with norms of their heads.

Both may have a sliding window from some layer on, which their configurations spell in three fields.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.checkpoint.interchange.config_map import Always, Computed
from engine.checkpoint.interchange.forms.llama import HEAD_SIZE, LLAMA, SIZES, read_head
from engine.config import huggingface_forms
from engine.config.huggingface_forms import Problems
from engine.config.schema.model import GPTConfig
from engine.errors import ConfigError

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Names of the layer kinds."""


def _write_window(model: GPTConfig) -> dict[str, Any]:
    if model.sliding_window is None:
        # `max_window_layers` counts the layers without a window.
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": model.num_layers}
    return {
        "use_sliding_window": True,
        "sliding_window": model.sliding_window,
        "max_window_layers": model.first_window_layer,
    }


def _read_window(theirs: Any, problems: Problems) -> dict[str, Any]:
    # Their class makes a kind for each layer from the other fields, and computes by these kinds.
    kinds = list(theirs.layer_types)
    first = kinds.index(LOCAL) if LOCAL in kinds else len(kinds)
    if len(kinds) != theirs.num_hidden_layers or kinds != [GLOBAL] * first + [LOCAL] * (len(kinds) - first):
        problems.append(ConfigError(f"layer_types = {kinds}", f"{GLOBAL} for the first layers, then {LOCAL}"))
        return {}
    if first == len(kinds):
        return {}
    if theirs.sliding_window is None:
        problems.append(ConfigError(f"sliding_window = None with {LOCAL} in layer_types", "a number of tokens"))
    return {"sliding_window": theirs.sliding_window, "first_window_layer": first}


def _write_uneven_head(model: GPTConfig) -> dict[str, Any]:
    # Their class has no field for it, and reads it where a configuration has one.
    even = model.hidden_size // model.num_heads
    return {} if model.head_size == even else {"head_dim": model.head_size}


_WINDOW = Computed(_write_window, _read_window)
QWEN2 = replace(
    LLAMA,
    twin=huggingface_forms.QWEN2,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=(*SIZES, Computed(_write_uneven_head, read_head), _WINDOW),
)
QWEN3 = replace(
    LLAMA,
    twin=huggingface_forms.QWEN3,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=(*SIZES, HEAD_SIZE, _WINDOW, Always("attention_bias", (False,), written=False)),
)
