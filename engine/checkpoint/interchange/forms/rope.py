"""Rotary positions in Hugging Face's configurations, both ways, and as readers before transformers 5 want them.

`rope_parameters` has the base and the kind of scaling with its keys; before transformers 5 the base stood beside
`rope_scaling`. Keys that a kind does not know are refused by name: theirs passes over them with a warning at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from engine.config.huggingface_forms import Problems
from engine.config.schema.model import GPTConfig
from engine.config.schema.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    ScalingType,
    YarnScaling,
)
from engine.errors import ConfigError

_SECTIONS: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}
_THEIRS = {"type": "rope_type", "original_max_positions": "original_max_position_embeddings"}
"""Ours -> theirs, where the names differ."""
_BASE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
"""Keys of theirs that every kind has."""
DEFAULT_THETA = 10000.0


def write_scaling(model: GPTConfig) -> dict[str, Any]:
    """Return the kind of scaling with its keys, by their names; optional ones of theirs only where they say more."""
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    keys = scaling.model_dump(exclude_defaults=isinstance(scaling, YarnScaling))
    return {_THEIRS.get(key, key): value for key, value in keys.items()}


def write_rope(model: GPTConfig) -> dict[str, Any]:
    """Return the field of transformers 5."""
    return {"rope_parameters": write_scaling(model) | {"rope_theta": model.rope_theta}}


def older_rope(model: GPTConfig) -> dict[str, Any]:
    """Return the fields of readers before transformers 5."""
    scaling = {} if model.rope_scaling is None else {"rope_scaling": write_scaling(model)}
    return {"rope_theta": model.rope_theta} | scaling


def read_rope(theirs: Any, problems: Problems) -> dict[str, Any]:
    """Return our keys of rotary positions that turn all dimensions of a head."""
    rope = getattr(theirs, "rope_parameters", None) or {}
    if (share := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        problems.append(ConfigError(f"rope_parameters.partial_rotary_factor = {share}", "1.0"))
    return {"rope_theta": theta_of(rope), "rope_scaling": read_scaling(rope, problems)}


def theta_of(rope: Mapping[str, Any] | None) -> float:
    """Return the base of their rotary frequencies."""
    return float((rope or {}).get("rope_theta") or DEFAULT_THETA)


def unscaled_theta(rope: Mapping[str, Any] | None, problems: Problems) -> float:
    """Return the base of their rotary frequencies; any scaling of them is a problem."""
    kind = (rope or {}).get("rope_type", "default")
    if kind != "default":
        problems.append(ConfigError(f"rope_parameters.rope_type = {kind!r}", "'default'"))
    return theta_of(rope)


def read_scaling(rope: Mapping[str, Any], problems: Problems) -> dict[str, Any] | None:
    """Return our section of the scaling; None without one."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    given = {key: value for key, value in rope.items() if key not in _BASE and value is not None}
    if kind not in _SECTIONS and kind != "default":
        allowed = " or ".join(map(repr, ("default", *get_args(ScalingType))))
        problems.append(ConfigError(f"rope_parameters.rope_type = {kind!r}", allowed))
        return None
    fields = _SECTIONS[kind].model_fields if kind in _SECTIONS else {}
    names = {_THEIRS.get(key, key): key for key in fields if key != "type"}
    problems += [
        ConfigError(f"rope_parameters.{key} = {value!r} with rope_type {kind!r}", "left out" + _hint(key))
        for key, value in given.items()
        if key not in names
    ]
    required = {name for name, key in names.items() if fields[key].is_required()}
    problems += [
        ConfigError(f"rope_parameters.{name} is missing with rope_type {kind!r}", "a number")
        for name in sorted(required - given.keys())
    ]
    if kind == "default":
        return None
    return {"type": kind} | {names[key]: value for key, value in given.items() if key in names}


def _hint(key: str) -> str:
    return "; attention_factor says the same" if key.startswith("mscale") else ""
