"""The table of conversions: kinds of sources, formats that are written, what each carries, and its options.

`palimpsest convert` and the table of docs/convert.md are made of it. Imports nothing heavy: a conversion's function is
named, and imported when it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.checkpoint.storage import Location

To = Literal["huggingface", "palimpsest", "deepspeed", "universal", "dcp", "onnx", "gguf", "megatron", "shards"]
Kind = Literal["palimpsest", "huggingface", "deepspeed", "universal", "dcp", "megatron-lm", "shards", "megatron"]
KINDS: dict[Kind, str] = {
    "palimpsest": "a run folder or a checkpoint of ours",
    "huggingface": "a Hugging Face folder",
    "deepspeed": "a checkpoint of DeepSpeed's (ZeRO 1 to 3)",
    "universal": "a universal checkpoint of DeepSpeed's",
    "dcp": "a checkpoint of torch's DCP",
    "megatron-lm": "a checkpoint of Megatron-LM's GPT or BERT (its own format, torch_dist)",
    "shards": "a folder of token shards",
    "megatron": "Megatron's token files (.bin, .idx)",
}
USUAL: dict[Kind, To] = {
    "palimpsest": "huggingface",
    "huggingface": "palimpsest",
    "deepspeed": "palimpsest",
    "universal": "palimpsest",
    "dcp": "palimpsest",
    "megatron-lm": "palimpsest",
    "shards": "megatron",
    "megatron": "shards",
}
"""Format that a kind of source is converted to where none is named."""


@dataclass(frozen=True)
class Request:
    """One conversion as it was asked for; None stands for an option that was not given."""

    source: str
    output: Path
    shard_bytes: int
    verify: Literal["full", "sample", "none"]
    with_optimizer: bool
    tokenizer: Path | None
    dtype: str | None
    run: Path | None
    names: Literal["ours", "huggingface"] | None
    weights: Literal["trained", "ema"] | None
    license_id: str | None


@dataclass(frozen=True)
class Conversion:
    """One way from a kind of source to a format."""

    function: str
    """`module:function` that takes a `Request`, writes the output and says what it wrote."""
    carried: str
    """Data that it carries over, for the documentation."""
    options: tuple[str, ...] = ()
    """Options of the command that have a meaning for it, besides --output and --tokenizer."""

    def run(self, request: Request) -> None:
        """Convert. Raises `PalimpsestError` as the function does."""
        module, _, name = self.function.partition(":")
        function: Callable[[Request], None] = getattr(importlib.import_module(module), name)
        function(request)


_WEIGHTS, _MOMENTS = "weights (fp32)", "on request Adam's moments and the step"
_IMPORT = ("--with-optimizer", "--run", "--shard-size", "--verify")
_ONWARD = ("--with-optimizer", "--run", "--names", "--verify")
"""Options of a way between formats that are neither ours nor Hugging Face's."""


def _other_formats() -> dict[tuple[Kind, To], Conversion]:
    """Return the ways between checkpoints of training libraries, and from each of them to ours."""
    targets: dict[To, str] = {
        "deepspeed": f"{_WEIGHTS}, {_MOMENTS}",
        "universal": f"{_WEIGHTS}, Adam's moments, the step",
        "dcp": f"{_WEIGHTS}, {_MOMENTS}",
    }
    kinds: tuple[Kind, ...] = ("palimpsest", "deepspeed", "universal", "dcp")
    found: dict[tuple[Kind, To], Conversion] = {}
    for kind in kinds:
        options = tuple(one for one in _ONWARD if one != "--run") if kind == "palimpsest" else _ONWARD
        if kind != "palimpsest":
            carried = f"{_WEIGHTS}, {_MOMENTS}"
            found[kind, "palimpsest"] = Conversion("tools.convert_models:from_other", carried, _IMPORT)
        for to, carried in targets.items():
            if to != kind:
                found[kind, to] = Conversion(f"tools.convert_models:to_{to}", carried, options)
    return found


CONVERSIONS: dict[tuple[Kind, To], Conversion] = {
    ("palimpsest", "huggingface"): Conversion(
        "tools.convert_models:to_huggingface",
        "weights (fp32, bf16, fp16 or int8), tokenizer, model card",
        ("--license", "--weights", "--dtype", "--shard-size", "--verify"),
    ),
    ("palimpsest", "onnx"): Conversion(
        "tools.convert_deployment:to_onnx", "the graph with its weights (fp32), tokenizer", ("--weights",)
    ),
    ("palimpsest", "gguf"): Conversion(
        "tools.convert_deployment:to_gguf",
        "weights (fp32, bf16 or fp16) and tokenizer, of GPT-2 and Llama form",
        ("--weights", "--dtype"),
    ),
    ("huggingface", "palimpsest"): Conversion(
        "tools.convert_models:from_huggingface",
        "weights (as fp32), tokenizer, all small files for the way back",
        ("--shard-size", "--verify"),
    ),
    ("huggingface", "deepspeed"): Conversion("tools.convert_models:to_deepspeed", _WEIGHTS, ("--names", "--verify")),
    ("huggingface", "dcp"): Conversion("tools.convert_models:to_dcp", _WEIGHTS, ("--names", "--verify")),
    **_other_formats(),
    ("megatron-lm", "palimpsest"): Conversion(
        "tools.convert_models:from_other", "weights (as fp32)", ("--run", "--shard-size", "--verify")
    ),
    ("shards", "megatron"): Conversion("tools.convert_data:to_megatron", "tokens, documents"),
    ("megatron", "shards"): Conversion("tools.convert_data:from_megatron", "tokens, documents (in place)"),
}


def conversion_of(source: str, kind: Kind, to: To) -> Conversion:
    """Return the way from a source to a format. Raises `ConfigError` where there is none."""
    found = CONVERSIONS.get((kind, to))
    if found is None:
        raise ConfigError(
            f"--to {to} of {source}, which is {KINDS[kind]}",
            " or ".join(f"--to {target}" for one, target in CONVERSIONS if one == kind),
            "name another format, or another source",
        )
    return found


def check_options(kind: Kind, to: To, given: Mapping[str, object]) -> None:
    """Raise `ConfigError` for an option that was given (not None, not False) and means nothing for this conversion."""
    for option, value in given.items():
        if value in (None, False) or option in CONVERSIONS[kind, to].options:
            continue
        allowed = dict.fromkeys(f"--to {target}" for (_, target), one in CONVERSIONS.items() if option in one.options)
        said = option if value is True else f"{option} {value}"
        raise ConfigError(
            f"{said} with --to {to} of {KINDS[kind]}",
            " or ".join(f"{option} with {target}" for target in allowed),
            "leave it out",
        )


def kind_of(source: str, to: To | None) -> Kind:
    """Return the kind of a source by its files alone; where these say nothing, the one that `to` is made from.

    Raises:
        ConfigError: it is nothing that can be converted.
        CheckpointError: what is behind a URL cannot be reached.
    """
    from engine.checkpoint.interchange.initial import unreachable
    from engine.checkpoint.storage import location_of

    location = location_of(source)
    try:
        found = _seen(location)
    except OSError as error:
        raise unreachable(location, error) from error
    if found is not None:
        return found
    named: dict[To | None, Kind] = {
        "megatron": "shards",
        "shards": "megatron",
        "dcp": "palimpsest",
        "universal": "palimpsest",
        "onnx": "palimpsest",
        "gguf": "palimpsest",
        "deepspeed": "palimpsest",
    }
    if to in named:  # its reader says what is wrong
        return named[to]
    what = "holds nothing that can be converted" if location.is_dir() else "is not there"
    raise ConfigError(f"{source} {what}", " or ".join(KINDS.values()), "check the path, or train first")


def _seen(location: Location) -> Kind | None:
    from engine.checkpoint.interchange.initial import format_of

    # A prefix of .bin and .idx is no file itself.
    if isinstance(location, Path) and any(Path(f"{location}{end}").is_file() for end in (".idx", ".bin")):
        return "megatron"
    if location.is_file() and location.name.endswith((".bin", ".idx")):
        return "megatron"
    found = format_of(location)
    if found is None and (location / "index.json").is_file():
        return "shards"
    return found
