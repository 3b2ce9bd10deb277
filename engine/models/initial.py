"""Initial weights as a function of (seed, logical name) alone, so that they are equal in every layout.

Normal with `init_std`; the projections that write to the residual stream are scaled down by sqrt(2 x layers)
(Radford et al. 2019, GPT-2, section 2.3) unless each sum is normalised (post-norm); norms 1, biases 0, padded rows 0.
One whole parameter at a time: a rank that holds a part draws the whole, keeps its part and drops the rest.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from engine.config.schema import ModelConfig
from engine.parallel.sharding import ParameterSpec

PURPOSE = 0x1A17
"""Keeps this stream of random numbers apart from every other one of the same seed."""


def initial_value(spec: ParameterSpec, config: ModelConfig, seed: int) -> torch.Tensor:
    """The whole parameter (fp32 on the CPU, of `spec.shape`) that a run with this seed starts from."""
    kind, role = spec.name.split(".")[-2:]
    if role == "bias":
        return torch.zeros(spec.shape, device="cpu")
    if kind.endswith("norm"):
        return torch.ones(spec.shape, device="cpu")
    residual = kind in ("out_proj", "down_proj") and config.norm_position == "pre"
    std = config.init_std / math.sqrt(2 * config.num_layers) if residual else config.init_std
    value = torch.zeros(spec.shape, device="cpu")
    # Real rows only: the padded ones stay 0, and their number does not move the stream.
    real = value if spec.real_rows is None else value[: spec.real_rows]
    # numpy and not torch: torch seeds its CPU generator with 32 bits, and its values depend on the CPU's vector width.
    drawn = _generator(seed, spec.name).standard_normal(tuple(real.shape), dtype=np.float32)
    real.copy_(torch.from_numpy(drawn)).mul_(std)
    return value


def _generator(seed: int, name: str) -> np.random.Generator:
    """The random stream of one parameter; the name enters by a hash that is equal on every machine."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, PURPOSE, digest])))
