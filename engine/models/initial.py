"""Initial weights as a function of (seed, logical name) alone, so that they are equal in every layout.

Normal with `init_std`; the projections that write to the residual stream are scaled down by sqrt(2 x layers)
(Radford et al. 2019, GPT-2, section 2.3) unless each sum is normalised (post-norm); T5 has deviations of its own. The
classifier of a task behind ModernBERT's transformation has deviation 1 / sqrt(width), cut at two deviations, as in
Hugging Face's class. Norms 1, biases 0, padded rows 0. One whole parameter at a time: a rank that holds a part draws
the whole, keeps its part and drops the rest.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from engine.config.adapter_targets import MARK
from engine.config.schema.adapter import AdaLoRAConfig
from engine.config.schema.model import BERTConfig, GPTConfig, ModelConfig
from engine.parallel.sharding import ParameterSpec

PURPOSE = 0x1A17
"""Keeps this stream of random numbers apart from every other one of the same seed."""


def initial_value(spec: ParameterSpec, config: ModelConfig, seed: int) -> torch.Tensor:
    """Return the whole parameter (fp32 on the CPU, of `spec.shape`) that a run with this seed starts from."""
    # layers.3.ffn.down_proj.weight -> down_proj, weight
    kind, role = spec.name.split(".")[-2:]
    if MARK in spec.name:
        return _adapter_value(spec, kind, role, config, seed)
    if role == "bias":
        return torch.zeros(spec.shape, device="cpu")
    if kind.endswith("norm"):
        return torch.ones(spec.shape, device="cpu")
    value = torch.zeros(spec.shape, device="cpu")
    # Real rows only: the padded ones stay 0, and their number does not move the stream.
    real = value if spec.real_rows is None else value[: spec.real_rows]
    if kind == "classifier" and isinstance(config, BERTConfig) and config.transforms_for_tasks:
        real.copy_(config.hidden_size**-0.5 * _cut_normal(seed, spec.name, tuple(real.shape)))
        return value
    # numpy and not torch: torch seeds its CPU generator with 32 bits, and its values depend on the CPU's vector width.
    drawn = _generator(seed, spec.name).standard_normal(tuple(real.shape), dtype=np.float32)
    real.copy_(torch.from_numpy(drawn))
    deviations = t5_deviations(spec, config) if config.family == "t5" else (_deviation(kind, config),)
    # Views of `value`, scaled in place: blocks of a fused projection may have deviations of their own.
    blocks = (real,) if len(deviations) == 1 else real.split(spec.blocks())
    for block, deviation in zip(blocks, deviations, strict=True):
        block.mul_(deviation)
    return value


def _adapter_value(spec: ParameterSpec, kind: str, role: str, config: ModelConfig, seed: int) -> torch.Tensor:
    """Return the initial value of an adapter's parameter, with which the model computes what it did without it.

    That of peft: A uniform up to 1 / sqrt(inputs), B zero (Hu et al. 2021, section 4.1); factors 1 (Liu et al. 2022).
    AdaLoRA's A and B have deviation 0.02, its E is zero.
    Bottlenecks nearly do: deviation 0.01, cut at two deviations (Houlsby et al. 2019, section 3.6), biases 0. Virtual
    tokens do not: they are drawn as the embeddings of a model are.
    """
    if kind == "adapters":  # a prompt's `weight`, `prefix_key`, `prefix_value`
        assert isinstance(config, GPTConfig | BERTConfig)
        drawn = _generator(seed, spec.name).standard_normal(spec.shape, dtype=np.float32)
        return torch.from_numpy(drawn) * config.init_std
    if isinstance(config.adapter, AdaLoRAConfig) and kind in ("lora_A", "lora_B"):
        drawn = _generator(seed, spec.name).standard_normal(spec.shape, dtype=np.float32)
        return torch.from_numpy(drawn) * 0.02
    if kind == "lora_B" or role in ("bias", "lora_E"):
        return torch.zeros(spec.shape, device="cpu")
    if kind == "lora_A":
        bound = spec.shape[1] ** -0.5
        drawn = _generator(seed, spec.name).uniform(-bound, bound, spec.shape).astype(np.float32)
        return torch.from_numpy(drawn)
    if kind in ("down", "up"):
        return 0.01 * _cut_normal(seed, spec.name, spec.shape)
    return torch.ones(spec.shape, device="cpu")


def _cut_normal(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return normal numbers (fp32) within two deviations."""
    drawn = _generator(seed, name).standard_normal((2, *shape), dtype=np.float32)
    # a second draw, cut, for the one in twenty that lies beyond two deviations
    return torch.from_numpy(np.where(np.abs(drawn[0]) <= 2, drawn[0], np.clip(drawn[1], -2, 2)))


def _deviation(kind: str, config: ModelConfig) -> float:
    assert isinstance(config, GPTConfig | BERTConfig)
    # Two per layer write to the residual stream, hence 2 x layers.
    residual = kind in ("out_proj", "down_proj") and not config.post_norm
    return config.init_std / math.sqrt(2 * config.num_layers) if residual else config.init_std


def t5_deviations(spec: ParameterSpec, config: ModelConfig) -> tuple[float, ...]:
    """Return the deviation of a T5 matrix, or of each of its blocks (Raffel et al. 2020, in mesh_tensorflow).

    1 / sqrt(inputs), with 1 / sqrt(head size) more for queries, whose scores are not scaled; embeddings 1; positions
    1 / sqrt(width). A head of its own is like any matrix: logits then begin with size 1, as tied ones do.
    """
    kind = spec.name.split(".")[-2]
    if kind == "embed_tokens":
        return (1.0,)
    if kind.endswith("_positions"):
        return (config.hidden_size**-0.5,)
    deviation = spec.shape[1] ** -0.5
    query = deviation * config.head_size**-0.5
    return {"qkv_proj": (query, deviation, deviation), "q_proj": (query,)}.get(kind, (deviation,))


def _generator(seed: int, name: str) -> np.random.Generator:
    """Return the random stream of one parameter; the name enters by a hash that is equal on every machine."""
    # Not `hash(name)`, which Python salts per process.
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, PURPOSE, digest])))
