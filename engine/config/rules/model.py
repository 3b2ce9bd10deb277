"""Rules of a model by itself: keys that its family does not use, sizes that do not divide one another."""

from __future__ import annotations

import math

from engine.config.schema.model import ModelConfig
from engine.errors import ConfigError, PalimpsestError

ONLY: dict[str, tuple[str, ...]] = {
    "token_types": ("bert",),
    "pair_head": ("bert",),
    "norm_position": ("bert",),
    "local_attention": ("bert",),
    "global_every": ("bert",),
    "local_rope_theta": ("bert",),
    "num_decoder_layers": ("t5",),
    "relative_buckets": ("t5",),
    "relative_distance": ("t5",),
}
"""The families that use a key; a key that is not here is used by all."""


def check_model(model: ModelConfig, problems: list[PalimpsestError]) -> None:
    """Every rule that the model breaks."""
    problems += [
        ConfigError(
            f"model.{key} = {getattr(model, key)} with model.family = {model.family}, which does not use it",
            f"model.family {' or '.join(families)}",
            "leave it out",
        )
        for key, families in ONLY.items()
        if model.family not in families and getattr(model, key) != ModelConfig.model_fields[key].default
    ]
    _check_heads(model, problems)
    if model.norm == "rmsnorm" and not model.norm_bias:
        problems.append(
            ConfigError(
                "model.norm_bias = False with model.norm = rmsnorm", "True", "leave it out: RMS norms have no shift"
            )
        )
    if (model.position == "relative") != (model.family == "t5"):
        problems.append(
            ConfigError(
                f"model.position = {model.position} with model.family = {model.family}",
                "relative" if model.family == "t5" else "learned or rope",
                "only t5 knows relative positions, and no others",
            )
        )
    if model.family == "t5":
        _check_encoder_decoder(model, problems)
    if model.family == "bert":
        _check_local(model, problems)


def _check_local(model: ModelConfig, problems: list[PalimpsestError]) -> None:
    unused = [key for key in ("global_every", "local_rope_theta") if model.local_attention is None]
    problems += [
        ConfigError(
            f"model.{key} = {getattr(model, key)} without model.local_attention",
            "local_attention with it",
            "leave it out, or say how wide the window is",
        )
        for key in unused
        if getattr(model, key) != ModelConfig.model_fields[key].default
    ]
    if model.local_rope_theta is not None and model.position != "rope":
        problems.append(
            ConfigError(
                f"model.local_rope_theta = {model.local_rope_theta} with model.position = {model.position}",
                "position rope",
                "leave it out",
            )
        )


def _check_encoder_decoder(model: ModelConfig, problems: list[PalimpsestError]) -> None:
    decoder = model.num_layers - model.num_encoder_layers
    if not 1 <= decoder < model.num_layers:
        problems.append(
            ConfigError(
                f"model.num_decoder_layers = {decoder} of model.num_layers = {model.num_layers}",
                "at least one layer in each of encoder and decoder",
                "num_layers counts both",
            )
        )
    if model.relative_distance <= model.relative_buckets // 2:
        problems.append(
            ConfigError(
                f"model.relative_distance = {model.relative_distance} with model.relative_buckets = "
                f"{model.relative_buckets}",
                f"{model.relative_buckets // 2 + 1} or more",
                "half of the buckets hold one distance each, the others what lies beyond them",
            )
        )
    if model.num_heads != model.kv_heads:
        problems.append(
            ConfigError(f"model.num_kv_heads = {model.kv_heads} with model.family = t5", f"{model.num_heads}, or none")
        )
    if model.init_std != ModelConfig.model_fields["init_std"].default:
        problems.append(
            ConfigError(
                f"model.init_std = {model.init_std} with model.family = t5, which does not use it",
                "",
                "leave it out: T5 starts with deviations of its own (engine/models/t5.py)",
            )
        )


def _check_heads(model: ModelConfig, problems: list[PalimpsestError]) -> None:
    if model.head_width is None and model.hidden_size % model.num_heads:
        problems.append(
            ConfigError(
                f"model.num_heads = {model.num_heads} does not divide model.hidden_size = {model.hidden_size}",
                f"one of {listed(divisors(model.hidden_size))}",
                "or give model.head_width",
            )
        )
    elif model.position == "rope" and model.head_size % 2:
        problems.append(
            ConfigError(
                f"model.position = rope needs an even head size, found {model.head_size}",
                "hidden_size / num_heads even",
                "change model.num_heads",
            )
        )
    if model.num_heads % model.kv_heads:
        problems.append(
            ConfigError(
                f"model.num_kv_heads = {model.kv_heads} does not divide model.num_heads = {model.num_heads}",
                f"one of {listed(divisors(model.num_heads))}",
            )
        )


def divisors(number: int) -> list[int]:
    """The divisors of a number, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]


def listed(numbers: list[int]) -> str:
    """Numbers as text."""
    return ", ".join(map(str, numbers))
