"""Megatron-LM's BERT in Hugging Face's names, with and without its head for pairs.

The modules are BERT's, but for the norms: each stands before the part that reads it, and one behind the last layer.
Their activation is one for layers and head, the exact GELU; Megatron-LM's own default computes the layers by its tanh
form, and the head exactly, which no class of theirs does.
"""

from __future__ import annotations

from dataclasses import replace

from engine.checkpoint.interchange.forms.bert import BERT
from engine.checkpoint.interchange.forms.form import one
from engine.config import huggingface_forms

_LAYER = "bert.encoder.layer.#"
_NORMS = {
    "layers.#.attention_norm": one(f"{_LAYER}.attention.ln"),
    "layers.#.ffn_norm": one(f"{_LAYER}.ln"),
    "final_norm": one("bert.encoder.ln"),
}

MEGATRON_BERT = replace(
    BERT,
    twin=huggingface_forms.MEGATRON_BERT,
    model_type="megatron-bert",
    architecture="MegatronBertForPreTraining",
    names={key: theirs for key, theirs in BERT.names.items() if key != "embed_norm"} | _NORMS,
)
MEGATRON_BERT_WITHOUT_PAIRS = replace(
    MEGATRON_BERT, twin=huggingface_forms.MEGATRON_BERT_WITHOUT_PAIRS, architecture="MegatronBertForMaskedLM"
)
