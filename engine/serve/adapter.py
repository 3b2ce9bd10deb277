"""Export of a trained adapter alone, as a folder that peft loads onto the model that it was trained on.

The folder is made beside its final path and renamed once it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.checkpoint.interchange.peft_format import WEIGHTS, adapter_config, adapter_tensors
from engine.checkpoint.interchange.sources.source import not_finite
from engine.config.schema.adapter import AdapterMethod
from engine.errors import ConfigError
from engine.extras import need
from engine.models.families import family
from engine.plan.frozen import is_base
from engine.serve.new_folder import new_folder
from engine.serve.source import Trained

OWN_CONFIG, OWN_WEIGHTS = "adapter.json", "adapter.safetensors"
"""Names of the files of an adapter that peft has no method for."""
THEIR_CONFIGS: dict[AdapterMethod, str] = {
    "lora": "LoraConfig",
    "adalora": "AdaLoraConfig",
    "ia3": "IA3Config",
    "prompt": "PromptTuningConfig",
    "prefix": "PrefixTuningConfig",
}
"""Names of peft's classes by method."""


def export_adapter(trained: Trained, output: Path, base: str | None) -> int:
    """Write the adapter of a model, opened without merging it, as peft's folder; return its number of parameters.

    `base` is the Hugging Face folder of the model that it adapts, as peft is to find it. None means that whoever loads
    it names it.

    Raises:
        ConfigError: the model has no adapter, `output` is taken, or a weight is not finite.
        EnvironmentProblem: peft is not there, or the folder cannot be written.
    """
    if trained.config.adapter is None:
        raise ConfigError(
            f"the model in {trained.checkpoint} has no adapter",
            "a model that was trained with `adapter`",
            "export it as a Hugging Face folder",
        )
    shapes = trained.source.shapes

    def read(name: str) -> torch.Tensor:
        value = trained.source.read(name, 0, shapes[name][0])
        if not torch.isfinite(value).all():
            raise not_finite(trained.source.origin, [name])
        return value

    if not trained.config.adapter.is_peft:
        return _export_own(trained, read, output)
    peft = need("peft", "writing an adapter", "tasks")
    kind = getattr(peft, THEIR_CONFIGS[trained.config.adapter.method])
    tensors = adapter_tensors(trained.config, read)
    with new_folder(output) as partial:
        kind(**adapter_config(trained.config, base)).save_pretrained(str(partial))
        save_file(tensors, str(partial / WEIGHTS), metadata={"format": "pt"})
    return sum(value.numel() for value in tensors.values())


def mean_rank(trained: Trained) -> float | None:
    """Return the mean number of elements that are left in an E of AdaLoRA; None of a model without one."""
    shapes = trained.source.shapes
    ranks = [
        int(trained.source.read(name, 0, shapes[name][0]).count_nonzero())
        for name in shapes
        if name.endswith(".lora_E")
    ]
    return sum(ranks) / len(ranks) if ranks else None


def with_prompt(model: Any, trained: Trained) -> Any:
    """Return peft's model around Hugging Face's `model`, which is that of a run without its prompt."""
    peft = need("peft", "a prompt in front of a text", "tasks")
    made = peft.get_peft_model(model, peft.PromptTuningConfig(**adapter_config(trained.config, None)))
    weights = trained.weights
    peft.set_peft_model_state_dict(made, adapter_tensors(trained.config, weights.__getitem__))
    return made.eval()


def _export_own(trained: Trained, read: Callable[[str], torch.Tensor], output: Path) -> int:
    """Write an adapter that peft has no method for: the trained parameters by our names, and the model's keys."""
    model = trained.config
    tensors = {spec.name: read(spec.name) for spec in family(model).specs(model) if not is_base(model, spec.name)}
    with new_folder(output) as partial:
        keys = {"adapter": model.adapter, "task_head": model.task_head}
        told = {name: None if one is None else one.model_dump(mode="json") for name, one in keys.items()}
        (partial / OWN_CONFIG).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, str(partial / OWN_WEIGHTS), metadata={"format": "pt"})
    return sum(value.numel() for value in tensors.values())


def require_peft() -> None:
    """Raise `EnvironmentProblem` where peft is missing."""
    need("peft", "writing an adapter", "tasks")
