"""The weights of a checkpoint whose model has an adapter, as those of the model without it: the adapter is added in.

Sums and products are those of peft's `merge_and_unload`, in fp32: W + (B A) x scale for LoRA, with
(A x E) for A in AdaLoRA, W x factors for IA3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.checkpoint.interchange.sources.source import Source
from engine.config.adapter_targets import MARK, PARTS, Target, adapted
from engine.config.schema.adapter import AdaLoRAConfig, LoRAConfig
from engine.config.schema.model import ModelConfig
from engine.parallel.sharding import Shape


def without_adapter(model: ModelConfig) -> ModelConfig:
    """Return the configuration of a model after its adapter is merged."""
    return model.model_copy(update={"adapter": None})


def merged(source: Source, model: ModelConfig) -> tuple[Source, ModelConfig]:
    """Return weights and configuration of a model without its adapter; both as they are where it cannot be merged."""
    if model.adapter is None or not model.adapter.merges:
        return source, model
    return Merged(source, model), without_adapter(model)


class Merged:
    """A source of the parameters of a model of ours, adapters merged. Holds the parameter that was read last."""

    def __init__(self, source: Source, model: ModelConfig) -> None:
        self._source, self._model = source, model
        self._targets = {
            (part, linear): [one for one in adapted(model, part) if one.linear == linear]
            for part in PARTS
            for linear in {one.linear for one in adapted(model, part)}
        }
        self._held: tuple[str, torch.Tensor] | None = None

    @property
    def origin(self) -> str:
        return self._source.origin

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: shape for name, shape in self._source.shapes.items() if MARK not in name}

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def read(self, name: str, first: int, end: int, dim: int = 0) -> torch.Tensor:
        targets = self._targets_of(name)
        if not targets:
            return self._source.read(name, first, end, dim)
        # Whole, whichever rows are asked for: products of some rows alone may be rounded otherwise.
        if self._held is None or self._held[0] != name:
            self._held = name, self._merged(name, targets)
        return self._held[1].narrow(dim, first, end - first).clone()

    def _targets_of(self, name: str) -> list[Target]:
        """Return the targets among the rows of a parameter, `layers.3.attention.qkv_proj.weight` for one."""
        if not name.startswith("layers."):
            return []
        *_, part, linear, _ = ("", "", *name.split("."))
        return next((found for (at, of), found in self._targets.items() if (at, of) == (part, linear)), [])

    def _merged(self, name: str, targets: list[Target]) -> torch.Tensor:
        value, adapter = self._whole(name), self._model.adapter
        module, _, kind = name.rpartition(".")
        prefix = module.rpartition(".")[0]
        for target in targets:
            own = f"{prefix}{MARK}{target.name}"
            rows = value[target.first : target.first + target.rows]
            if isinstance(adapter, LoRAConfig):
                if kind == "weight":
                    low, high = self._whole(f"{own}.lora_A.weight"), self._whole(f"{own}.lora_B.weight")
                    rows += (high @ low) * (adapter.alpha / adapter.rank)
            elif isinstance(adapter, AdaLoRAConfig):
                if kind == "weight":
                    low, high = self._whole(f"{own}.lora_A.weight"), self._whole(f"{own}.lora_B.weight")
                    product = high @ (low * self._whole(f"{own}.lora_E"))
                    # peft multiplies and divides by itself: one factor would be rounded otherwise
                    rows += product * adapter.alpha / (torch.tensor([float(adapter.initial_rank)]) + 1e-5)
            elif target.is_row:
                if kind == "weight":  # the bias is added behind the product
                    rows *= self._whole(f"{own}.ia3_l")
            else:
                factors = self._whole(f"{own}.ia3_l")
                rows *= factors if kind == "bias" else factors.unsqueeze(1)
        return value

    def _whole(self, name: str) -> torch.Tensor:
        return self._source.read(name, 0, self._source.shapes[name][0])
