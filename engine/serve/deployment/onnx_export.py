"""A model as an ONNX graph: transformers' model, exported by torch.onnx (torch.export), and run by onnxruntime.

Inputs are those of transformers' model, batch and lengths free: `input_ids`, `attention_mask`, for T5
`decoder_input_ids`; there is no cache. Takes a few times the memory of the model.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint.interchange.foreign_model import load
from engine.checkpoint.interchange.forms import form_of
from engine.extras import need
from engine.serve.deployment.held_out_text import HeldOutText, LossAgreement, compare_losses, held_out_text
from engine.serve.export import ExportOptions, write_folder
from engine.serve.new_folder import new_folder
from engine.serve.source import Trained

FILE = "model.onnx"
_HEADS = {"logits": "logits", "prediction_logits": "logits", "seq_relationship_logits": "pair_logits"}
"""Outputs of transformers' classes by their names in the graph."""


class _Graph(nn.Module):
    """A model of theirs from positional inputs to a tuple of its logits."""

    def __init__(self, model: Any, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.model, self._inputs, self._outputs = model, inputs, outputs
        encoders = ("bert", "megatron-bert", "roberta", "modernbert")
        self._without_cache = {} if model.config.model_type in encoders else {"use_cache": False}

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(**dict(zip(self._inputs, values, strict=True)), **self._without_cache)
        return tuple(found[name] for name in self._outputs)


def export_onnx(trained: Trained, output: Path) -> LossAgreement:
    """Write a folder with the graph, the configuration and the tokenizer, and run it.

    Raises:
        EnvironmentProblem: a package is missing, or the folder cannot be written.
        ConfigError: `output` is taken, or the model has no twin in Hugging Face's library.
        CheckpointError: onnxruntime gives another loss than our own forward pass.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, "--to onnx", "deploy")
    form, text = form_of(trained.config), held_out_text(trained)
    with new_folder(output) as partial:
        write_folder(trained, partial, output, ExportOptions("fp32"))
        model = load(partial, form.architecture).check(partial).eval()
        # Fused attention of T5 and of masks is not exported alike for every length; the plain product is.
        model.set_attn_implementation("eager")
        _write(model, text, partial / FILE)
        for path in [*partial.glob("*.safetensors"), partial / "README.md"]:
            path.unlink()
        del model
        return compare_losses(trained, text, _run(partial / FILE), "fp32", "onnxruntime", output)


def _write(model: Any, text: HeldOutText, path: Path) -> None:
    inputs = list(text.inputs)
    with torch.no_grad():
        made = model(**{name: value[:1] for name, value in text.inputs.items()})
    outputs = [name for name in _HEADS if name in made]
    axes = {"input_ids": "length", "attention_mask": "length", "decoder_input_ids": "decoder_length"}
    shapes = tuple({0: "batch", 1: axes[name]} for name in inputs)
    # Two rows, and other lengths on either side: a size of 1, or two equal ones, would be taken for constants.
    lengths = {"decoder_input_ids": 7}
    example = tuple(value[:1, : lengths.get(name, 11)].repeat(2, 1) for name, value in text.inputs.items())
    with _quiet():
        torch.onnx.export(
            _Graph(model, inputs, outputs),
            example,
            path,
            input_names=inputs,
            output_names=[_HEADS[name] for name in outputs],
            dynamic_shapes=(shapes,),
            dynamo=True,
            verbose=False,
        )


def _run(path: Path) -> Any:
    session = need("onnxruntime", "--to onnx", "deploy").InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def logits(given: dict[str, torch.Tensor]) -> torch.Tensor:
        [found] = session.run(["logits"], {name: value.numpy() for name, value in given.items()})
        return torch.from_numpy(found)

    return logits


@contextlib.contextmanager
def _quiet():
    """Keep the exporter's progress and its hints at other packages off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
