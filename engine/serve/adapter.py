"""Export of a trained adapter alone, as a folder that peft loads onto the model that it was trained on.

The folder is made beside its final path and renamed once it is whole.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.checkpoint.interchange.peft_format import WEIGHTS, adapter_config, adapter_tensors
from engine.checkpoint.interchange.sources.source import not_finite
from engine.config.schema.adapter import LoRAConfig
from engine.errors import ConfigError
from engine.extras import need
from engine.serve.new_folder import new_folder
from engine.serve.source import Trained


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
    peft = need("peft", "writing an adapter", "tasks")
    kind = peft.LoraConfig if isinstance(trained.config.adapter, LoRAConfig) else peft.IA3Config
    shapes = trained.source.shapes

    def read(name: str) -> torch.Tensor:
        value = trained.source.read(name, 0, shapes[name][0])
        if not torch.isfinite(value).all():
            raise not_finite(trained.source.origin, [name])
        return value

    tensors = adapter_tensors(trained.config, read)
    with new_folder(output) as partial:
        kind(**adapter_config(trained.config, base)).save_pretrained(str(partial))
        save_file(tensors, str(partial / WEIGHTS), metadata={"format": "pt"})
    return sum(value.numel() for value in tensors.values())


def require_peft() -> None:
    """Raise `EnvironmentProblem` where peft is missing."""
    need("peft", "writing an adapter", "tasks")
