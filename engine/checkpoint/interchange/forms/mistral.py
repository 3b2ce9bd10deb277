"""Mistral in Hugging Face's names: Llama with a sliding window in every layer.

A configuration without a window (Mistral 7B from version 0.2 on) is read as well, and computes what Llama does: ours
then is of Llama's form.
"""

from __future__ import annotations

from dataclasses import replace

from engine.checkpoint.interchange.config_map import Always, Same
from engine.checkpoint.interchange.forms.llama import HEAD_SIZE, LLAMA, SIZES
from engine.config import huggingface_forms

MISTRAL = replace(
    LLAMA,
    twin=huggingface_forms.MISTRAL,
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=(
        *SIZES,
        HEAD_SIZE,
        Same("sliding_window", "sliding_window"),
        # Their class would pass over a kind for each layer.
        Always("layer_types", (None,), written=False),
    ),
)
