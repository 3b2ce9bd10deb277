"""The format in which peft keeps an adapter: `adapter_config.json` and `adapter_model.safetensors`.

Tensors have the names of peft's modules around those of Hugging Face's classes. The head of a task, which is trained
beside the adapter, is among peft's `modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.forms.form import Form, Theirs
from engine.checkpoint.interchange.mapping import mapped
from engine.checkpoint.interchange.sources.merged import without_adapter
from engine.config.adapter_targets import MARK, Target, all_targets
from engine.config.schema.adapter import AdaLoRAConfig, LoRAConfig, PrefixConfig, VirtualTokensConfig
from engine.config.schema.model import ModelConfig
from engine.models.families import family
from engine.parallel.sharding import ParameterSpec
from engine.plan.frozen import is_base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Names of the files."""
_PREFIX, _VIRTUAL = "base_model.model.", "prompt_embeddings"
_WHOLE = ("classifier", "score", "qa_outputs")
"""Modules of their classes that peft saves whole by itself, whatever is named of them."""


def adapter_tensors(model: ModelConfig, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of peft's file, the head of a task among them; `read` gives a whole parameter of ours.

    Raises:
        ConfigError: the model is of no form that Hugging Face has.
    """
    form, found = form_of(without_adapter(model)), {}
    if isinstance(model.adapter, VirtualTokensConfig):
        found[_VIRTUAL] = _virtual_tokens(model, read)
    for spec in family(model).specs(model):
        if MARK in spec.name:
            if not isinstance(model.adapter, VirtualTokensConfig):
                name, value = _of_adapter(form, model, spec, read(spec.name))
                found[name] = value
        elif not is_base(model, spec.name):  # the head of a task
            entry, names = form.names_of(model, spec.name)
            one = mapped(spec, tuple(names), entry.transposed)
            found |= {f"{_prefix(model)}{name}": one.theirs(name, read(spec.name)) for name in names}
    return {name: value.contiguous() for name, value in found.items()}


def adapter_config(model: ModelConfig, base: str | None) -> dict[str, Any]:
    """Return the arguments of peft's configuration of the model's adapter; `base` is the folder of the model that it
    adapts."""
    adapter, form = model.adapter, form_of(without_adapter(model))
    assert adapter is not None
    shared: dict[str, Any] = {
        "base_model_name_or_path": base,
        "task_type": _task_type(form),
        "modules_to_save": _saved(form, model) or None,
        "inference_mode": True,
    }
    if isinstance(adapter, VirtualTokensConfig):
        return shared | _sizes(model, adapter)
    modules: dict[str, Target] = {}
    transposed = False
    for spec in family(model).specs(model):
        if MARK in spec.name:
            target = _target(model, spec.name)
            entry, module = _module(form, model, spec.name, target)
            modules[module], transposed = target, transposed or entry.transposed
    given = shared | {"target_modules": sorted(modules), "fan_in_fan_out": transposed}
    if isinstance(adapter, LoRAConfig):
        return given | {"r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout, "bias": "none"}
    if isinstance(adapter, AdaLoRAConfig):
        return given | _of_adalora(adapter)
    return given | {"feedforward_modules": sorted(name for name, target in modules.items() if target.is_row)}


def _prefix(model: ModelConfig) -> str:
    """Return the beginning of the names in peft's file: without modules in the model there is none around it."""
    return _PREFIX.removesuffix("model.") if isinstance(model.adapter, VirtualTokensConfig) else _PREFIX


def _virtual_tokens(model: ModelConfig, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Return the virtual tokens as peft has them: a prompt, (P, D), or keys and values layer by layer, (P, 2 x layers x
    width of the keys)."""
    names = [spec.name for spec in family(model).specs(model) if MARK in spec.name]
    if isinstance(model.adapter, PrefixConfig):
        each = [f"layers.{layer}.attention{MARK}prefix_" for layer in range(model.num_layers)]
        names = [f"{prefix}{kind}" for prefix in each for kind in ("key", "value")]
    return torch.cat([read(name) for name in names], 1)


def _sizes(model: ModelConfig, adapter: VirtualTokensConfig) -> dict[str, Any]:
    """Return the sizes in peft's configuration; those of a prefix are of the keys' heads."""
    heads = model.num_kv_heads if isinstance(adapter, PrefixConfig) else model.num_heads
    width = heads * model.head_size if isinstance(adapter, PrefixConfig) else model.hidden_size
    sizes = {
        "num_virtual_tokens": adapter.virtual_tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": model.num_layers,
    }
    return sizes | ({"encoder_hidden_size": width} if isinstance(adapter, PrefixConfig) else {})


def _of_adalora(adapter: AdaLoRAConfig) -> dict[str, Any]:
    """Return peft's arguments of AdaLoRA. Elements that were set to zero are in the file, as zeros: `rank_pattern`
    stays empty, and peft divides by the initial rank, as training did."""
    return {
        "init_r": adapter.initial_rank,
        "target_r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "orth_reg_weight": adapter.orthogonality,
        "beta1": adapter.smoothing,
        "beta2": adapter.smoothing,
        "deltaT": adapter.every_steps,
        "total_step": 1,  # the schedule is over; peft wants a number
        "bias": "none",
    }


def _of_adapter(form: Form, model: ModelConfig, spec: ParameterSpec, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Return name and value of a parameter of an adapter as peft has them."""
    target = _target(model, spec.name)
    entry, module = _module(form, model, spec.name, target)
    _, _, kind = spec.name.partition(f"{MARK}{target.name}.")
    if entry.per_head and spec.shape[0] == target.rows and len(target.blocks) > 1:
        # rows of queries, keys and values head by head, as in the matrix that they change
        value = mapped(spec, (kind,), per_head=model.head_size).theirs(kind, value)
    if isinstance(model.adapter, AdaLoRAConfig):
        kind = kind.removesuffix(".weight")  # peft has plain parameters there
    if kind == "ia3_l":
        value = value.unsqueeze(0 if target.is_row else 1)
    return f"{_PREFIX}{module}.{kind}", value


def _target(model: ModelConfig, name: str) -> Target:
    """Return the target of a parameter, `layers.3.attention.adapters.query.lora_A.weight` for one."""
    module, _, rest = name.partition(MARK)
    part = module.rpartition(".")[2]
    return next(one for one in all_targets(model) if one.part == part and one.name == rest.split(".")[0])


def _module(form: Form, model: ModelConfig, name: str, target: Target) -> tuple[Theirs, str]:
    """Return the module of theirs that the adapter of a parameter changes, and its entry in the form's table."""
    prefix = name.partition(MARK)[0]
    entry, names = form.names_of(model, f"{prefix}.{target.linear}.weight")
    beside = [one for one in all_targets(model) if (one.part, one.linear) == (target.part, target.linear)]
    return entry, names[beside.index(target)].removesuffix(".weight")


def _saved(form: Form, model: ModelConfig) -> list[str]:
    """Return the modules of theirs that are trained beside the adapter."""
    found = set()
    for spec in family(model).specs(model):
        if not is_base(model, spec.name) and MARK not in spec.name:
            for name in form.names_of(model, spec.name)[1]:
                module = name.rpartition(".")[0]
                found.add(next((whole for whole in _WHOLE if module.startswith(whole)), module))
    return sorted(found)


def _task_type(form: Form) -> str | None:
    """Return peft's name of the task that a class of theirs is for; None means no class of peft's own."""
    endings = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    return next((task for ending, task in endings.items() if form.architecture.endswith(ending)), None)
