"""The model forms that both Hugging Face and this engine have, one file each, and how a form is found."""

from __future__ import annotations

from typing import Any

import torch

from engine.checkpoint.interchange.forms.bert import BERT, BERT_WITHOUT_PAIRS, ROBERTA
from engine.checkpoint.interchange.forms.form import Form
from engine.checkpoint.interchange.forms.gpt2 import GPT2
from engine.checkpoint.interchange.forms.gpt_neox import GPT_NEOX
from engine.checkpoint.interchange.forms.llama import LLAMA
from engine.checkpoint.interchange.forms.megatron_bert import MEGATRON_BERT, MEGATRON_BERT_WITHOUT_PAIRS
from engine.checkpoint.interchange.forms.mistral import MISTRAL
from engine.checkpoint.interchange.forms.modernbert import MODERN_BERT
from engine.checkpoint.interchange.forms.qwen import QWEN2, QWEN3
from engine.checkpoint.interchange.forms.t5 import MT5, T5
from engine.checkpoint.interchange.forms.tasks import ENDINGS, ending_of, with_task_head
from engine.config.huggingface_forms import nearest
from engine.config.schema.model import ModelConfig
from engine.errors import ConfigError, report

_DECODERS = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GPT_NEOX)
_ENCODERS = (BERT, BERT_WITHOUT_PAIRS, ROBERTA, MEGATRON_BERT, MEGATRON_BERT_WITHOUT_PAIRS, MODERN_BERT)
FORMS = (*_DECODERS, *_ENCODERS, T5, MT5)
OLDEST = "4.57"
"""The oldest transformers that reads our exports, as `make test-readers` holds: the last series before 5."""


def form_of(model: ModelConfig) -> Form:
    """Return the form that a configuration of ours matches exactly.

    Raises:
        ConfigError: it is a mix; names the keys that keep it from the nearest form.
    """
    if model.adapter is not None and not model.adapter.merges:
        raise ConfigError(
            f"model.adapter.method = {model.adapter.method}, which Hugging Face's classes have no place for",
            "a model without an adapter, or with one that is merged into the weights: lora, adalora, ia3",
            "load the run folder's `adapter` by peft onto the model that the run started from"
            if model.adapter.is_peft
            else "keep the checkpoint; its adapter alone is in the run folder's `adapter`",
        )
    twin, problems = nearest(model)
    if problems:
        raise report(problems, f"Hugging Face has no twin of this model (nearest: {twin.name})")
    form = next(form for form in FORMS if form.twin is twin)
    if model.task_head is None:
        return form
    ending = ENDINGS[model.task_head.task]
    with_head = with_task_head(form, ending)
    if with_head is None:
        raise ConfigError(
            f"model.task_head with a model of {form.name} form, of which no class ...{ending} is read here",
            " or ".join(found.name for found in FORMS if with_task_head(found, ending)),
            "export the model without its head, or train another one",
        )
    return with_head


def form_of_theirs(theirs: Any, architecture: str = "") -> Form | None:
    """Return the form of their model type; of several, that of the class, given or named in the configuration."""
    forms = [form for form in FORMS if form.model_type == theirs.model_type]
    said = [architecture, *(theirs.architectures or [])]
    if (ending := ending_of(said)) is not None:
        forms = [found for form in forms if (found := with_task_head(form, ending)) is not None]
    return next((form for form in forms if form.architecture in said), forms[0] if forms else None)


def require_form(theirs: Any, architecture: str = "") -> Form:
    """Return the form of their configuration. Raises `ConfigError` where its type is none of ours."""
    form = form_of_theirs(theirs, architecture)
    if form is None:
        raise ConfigError(
            f"a Hugging Face model of type {theirs.model_type}",
            " or ".join(dict.fromkeys(form.model_type for form in FORMS)),
            "convert it in its own library to a model of one of these types, if it computes the same",
        )
    return form


def older_spellings(model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the fields of `config.json` besides those that transformers 5 writes, for readers before it.

    transformers 5 renamed or moved some fields and writes the new names alone; older versions of it, vLLM, SGLang and
    llama.cpp take a field that they do not find at its default, without a word. Transformers 5 reads the new one.
    """
    return {"torch_dtype": str(dtype).removeprefix("torch.")} | form_of(model).older(model)


__all__ = [
    "BERT",
    "BERT_WITHOUT_PAIRS",
    "FORMS",
    "GPT2",
    "GPT_NEOX",
    "LLAMA",
    "MEGATRON_BERT",
    "MEGATRON_BERT_WITHOUT_PAIRS",
    "MISTRAL",
    "MODERN_BERT",
    "MT5",
    "OLDEST",
    "QWEN2",
    "QWEN3",
    "ROBERTA",
    "T5",
    "Form",
    "form_of",
    "form_of_theirs",
    "older_spellings",
    "require_form",
]
