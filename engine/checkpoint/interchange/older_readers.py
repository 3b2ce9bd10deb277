"""Values of an exported configuration in the spelling of readers before transformers 5.

transformers 5 renamed or moved some fields and writes the new names alone; older versions of it, vLLM, SGLang and
llama.cpp take a field that they do not find at its default, without a word. Both spellings stand side by side in what
`palimpsest convert` writes; transformers 5 reads the new one.
"""

from __future__ import annotations

from typing import Any

from engine.config import huggingface_forms
from engine.config.schema.model import BERTConfig, ModelConfig

OLDEST = "4.57"
"""The oldest transformers that reads our exports, as `make test-readers` holds: the last series before 5."""


def older_spellings(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that `config.json` has besides those that transformers 5 writes."""
    twin, _ = huggingface_forms.nearest(model)
    fields: dict[str, Any] = {"torch_dtype": "float32"}
    if twin is huggingface_forms.GPT2:
        fields["n_ctx"] = model.max_positions  # llama.cpp
    elif twin is huggingface_forms.LLAMA:
        fields["rope_theta"] = model.rotary_theta(None)
    elif twin is huggingface_forms.MODERN_BERT and isinstance(model, BERTConfig):
        fields |= _modern_bert(model)
    elif twin is huggingface_forms.T5:
        # transformers 5 says in scale_decoder_outputs what this field said before, and calls every T5 tied
        fields["tie_word_embeddings"] = model.tie_embeddings
    return fields


def _modern_bert(model: BERTConfig) -> dict[str, Any]:
    is_local = model.local_attention is not None
    return {
        "global_attn_every_n_layers": model.global_every if is_local else 1,
        "global_rope_theta": model.rope_theta,
        "local_rope_theta": model.local_rope_theta or model.rope_theta,
    }
