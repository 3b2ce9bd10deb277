"""Rules that join several keys of a model: sizes that divide one another, keys that another one switches off.

Part of `engine.config.resolve`, which reports every problem at once.
"""

from __future__ import annotations

import math

from engine.config.rules.adapter import check_adapter
from engine.config.schema.model import BERTConfig, GPTConfig, ModelConfig, T5Config
from engine.config.schema.rotary import DynamicScaling, Llama3Scaling, YarnScaling
from engine.errors import ConfigError, PalimpsestError


def check_model(model: ModelConfig, problems: list[PalimpsestError]) -> None:
    """Add every rule that the model breaks to `problems`."""
    _check_heads(model, problems)
    if model.norm == "rmsnorm" and not model.norm_bias:
        problems.append(
            ConfigError(
                "model.norm_bias = False with model.norm = rmsnorm", "True", "leave it out: RMS norms have no shift"
            )
        )
    _check_rotary(model, problems)
    check_adapter(model, problems)
    head = model.task_head
    if head is not None and head.pooling == "mean" and (head.sees_tokens or not model.transforms_for_tasks):
        problems.append(
            ConfigError(
                f"model.task_head.pooling = mean with task {head.task} and a model of family {model.family}",
                "classification or regression by an encoder of ModernBERT's form (model.norm_position pre, with a norm "
                "of the embeddings)",
                "leave it out: the classes of other models at Hugging Face read one token",
            )
        )
    if isinstance(model, GPTConfig):
        _check_decoder(model, problems)
    if isinstance(model, BERTConfig):
        _check_local(model, problems)
        if not model.embedding_norm and model.post_norm:
            problems.append(
                ConfigError(
                    "model.embedding_norm = False with model.norm_position = post",
                    "norm_position pre, or embedding_norm True",
                    "without it the first layer would read what no norm has seen",
                )
            )
    if isinstance(model, T5Config):
        _check_encoder_decoder(model, problems)


def _check_heads(model: ModelConfig, problems: list[PalimpsestError]) -> None:
    # A head size that is written out needs no even share of the width (Llama and T5 forms have some that are not).
    if "head_size" not in model.model_fields_set and model.hidden_size % model.num_heads:
        problems.append(
            ConfigError(
                f"model.num_heads = {model.num_heads} does not divide model.hidden_size = {model.hidden_size}",
                f"one of {listed(divisors(model.hidden_size))}",
                "or give model.head_size",
            )
        )
    if model.num_heads % model.num_kv_heads:
        problems.append(
            ConfigError(
                f"model.num_kv_heads = {model.num_kv_heads} does not divide model.num_heads = {model.num_heads}",
                f"one of {listed(divisors(model.num_heads))}",
            )
        )


def _check_rotary(model: ModelConfig, problems: list[PalimpsestError]) -> None:
    rotary = model.rotary(None)
    if rotary is None:
        return
    if rotary.width == model.head_size and rotary.width % 2:
        problems.append(
            ConfigError(
                f"model.position = rope needs an even head size, found {model.head_size}",
                "hidden_size / num_heads even",
                "change model.num_heads",
            )
        )
    elif rotary.width < 2 or rotary.width % 2:
        factor = getattr(model, "partial_rotary_factor", 1.0)
        problems.append(
            ConfigError(
                f"model.partial_rotary_factor = {factor} of model.head_size = {model.head_size} turns "
                f"{rotary.width} dimensions",
                "an even number of them, 2 or more",
                "change model.partial_rotary_factor",
            )
        )
    if isinstance(rotary.scaling, DynamicScaling) and rotary.width <= 2:
        # The base grows by the power of width / (width - 2).
        problems.append(
            ConfigError(
                f"model.rope_scaling.type = dynamic with {rotary.width} rotated dimensions of a head",
                "4 or more",
                "take linear scaling, or larger heads",
            )
        )


def _check_decoder(model: GPTConfig, problems: list[PalimpsestError]) -> None:
    if model.position != "rope":
        defaults = {"rope_scaling": None, "partial_rotary_factor": 1.0}
        problems += [
            ConfigError(
                f"model.{key} = {_text(getattr(model, key))} with model.position = {model.position}",
                "position rope",
                "leave it out",
            )
            for key, default in defaults.items()
            if getattr(model, key) != default
        ]
    _check_scaling(model, problems)
    if model.first_window_layer and model.sliding_window is None:
        problems.append(
            ConfigError(
                f"model.first_window_layer = {model.first_window_layer} without model.sliding_window",
                "sliding_window with it",
                "leave it out, or say how wide the window is",
            )
        )
    elif model.sliding_window is not None and model.first_window_layer >= model.num_layers:
        problems.append(
            ConfigError(
                f"model.first_window_layer = {model.first_window_layer} of model.num_layers = {model.num_layers}",
                f"0 to {model.num_layers - 1}",
                "leave model.sliding_window out if no layer has it",
            )
        )


def _check_scaling(model: GPTConfig, problems: list[PalimpsestError]) -> None:
    scaling = model.rope_scaling
    if isinstance(scaling, Llama3Scaling) and scaling.high_freq_factor <= scaling.low_freq_factor:
        problems.append(
            ConfigError(
                f"model.rope_scaling.high_freq_factor = {scaling.high_freq_factor} with "
                f"low_freq_factor = {scaling.low_freq_factor}",
                "more than low_freq_factor",
                "frequencies between the two are interpolated",
            )
        )
    if isinstance(scaling, YarnScaling) and scaling.beta_fast <= scaling.beta_slow:
        problems.append(
            ConfigError(
                f"model.rope_scaling.beta_fast = {scaling.beta_fast} with beta_slow = {scaling.beta_slow}",
                "more than beta_slow",
                "frequencies between the two are interpolated",
            )
        )
    if isinstance(scaling, YarnScaling) and model.rope_theta == 1:
        # The bounds of the ramp are logarithms to this base.
        problems.append(
            ConfigError("model.rope_theta = 1 with model.rope_scaling.type = yarn", "another base", "such as 10000")
        )


def _text(value: object) -> str:
    return str(getattr(value, "type", value))


def _check_local(model: BERTConfig, problems: list[PalimpsestError]) -> None:
    unused = [key for key in ("global_every", "local_rope_theta") if model.local_attention is None]
    problems += [
        ConfigError(
            f"model.{key} = {getattr(model, key)} without model.local_attention",
            "local_attention with it",
            "leave it out, or say how wide the window is",
        )
        for key in unused
        if getattr(model, key) != BERTConfig.model_fields[key].default
    ]
    if model.local_rope_theta is not None and model.position != "rope":
        problems.append(
            ConfigError(
                f"model.local_rope_theta = {model.local_rope_theta} with model.position = {model.position}",
                "position rope",
                "leave it out",
            )
        )


def _check_encoder_decoder(model: T5Config, problems: list[PalimpsestError]) -> None:
    if model.num_encoder_layers < 1:
        problems.append(
            ConfigError(
                f"model.num_decoder_layers = {model.num_decoder_layers} of model.num_layers = {model.num_layers}",
                "at least one layer in each of encoder and decoder",
                "num_layers counts both",
            )
        )
    # Beyond half of the buckets their widths grow logarithmically up to this distance, which has to lie further.
    if model.relative_distance <= model.relative_buckets // 2:
        problems.append(
            ConfigError(
                f"model.relative_distance = {model.relative_distance} with model.relative_buckets = "
                f"{model.relative_buckets}",
                f"{model.relative_buckets // 2 + 1} or more",
                "half of the buckets hold one distance each, the others what lies beyond them",
            )
        )
    if model.num_heads != model.num_kv_heads:
        problems.append(
            ConfigError(
                f"model.num_kv_heads = {model.num_kv_heads} with model.family = t5",
                f"{model.num_heads} (model.num_heads)",
                "leave it out: T5 has no grouped queries",
            )
        )


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    # Divisors come in pairs around the root, which a square number has once: 12 is 1, 2, 3 and 4, 6, 12.
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]


def listed(numbers: list[int]) -> str:
    """Return numbers as text."""
    return ", ".join(map(str, numbers))
