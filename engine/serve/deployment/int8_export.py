"""A Hugging Face folder with int8 weights: torchao's weight-only quantisation of linear layers, one scale per row."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint.interchange.forms import form_of
from engine.errors import ConfigError
from engine.extras import need
from engine.serve.deployment.held_out_text import LossAgreement, compare_losses, held_out_text, logits_of
from engine.serve.export import ExportOptions, write_folder
from engine.serve.new_folder import new_folder
from engine.serve.source import Trained


@dataclass(frozen=True)
class Quantized:
    """Summary of an export in int8."""

    agreement: LossAgreement
    num_layers: int
    """Number of linear layers whose weights are int8; embeddings, heads that are tied and norms stay as they are."""


def export_int8(trained: Trained, output: Path) -> Quantized:
    """Write a folder that `from_pretrained` loads where torchao is there, and load it. Holds the model in memory.

    Raises:
        EnvironmentProblem: torchao is missing, or the folder cannot be written.
        ConfigError: `output` is taken, the model has no twin, or its twin has no linear layer (GPT-2).
        CheckpointError: the loaded model gives another loss than our own forward pass.
    """
    need("torchao", "--dtype int8", "deploy")
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]

    form, text = form_of(trained.config), held_out_text(trained)
    kind = getattr(transformers, form.architecture)
    with new_folder(output) as partial, tempfile.TemporaryDirectory() as scratch:
        write_folder(trained, Path(scratch), output, ExportOptions("fp32"))
        settings = transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
        model = kind.from_pretrained(scratch, dtype=torch.float32, quantization_config=settings)
        count = sum(type(one.weight.data).__name__.startswith("Int8") for one in _linear(model))
        if not count:
            raise ConfigError(
                f"--dtype int8 of a model in {form.name} form, whose layers are no linear layers to torchao",
                "another form",
                "use --dtype bf16, or --to gguf or onnx",
            )
        model.save_pretrained(partial)
        for path in Path(scratch).iterdir():
            if ".safetensors" not in path.name and not (partial / path.name).exists():
                (partial / path.name).write_bytes(path.read_bytes())
        del model
        again = kind.from_pretrained(partial, dtype=torch.float32).eval()
        found = compare_losses(trained, text, logits_of(again), "int8", "torchao", output)
    return Quantized(found, count)


def _linear(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
