"""`palimpsest convert`: models and token files from one format to another; kinds are detected, or named."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from engine.errors import ConfigError
from tools.conversions import USUAL, Request, To, check_options, conversion_of, kind_of

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Source = Annotated[
    str,
    typer.Argument(
        help="A run folder or a checkpoint, a Hugging Face folder, a checkpoint of DeepSpeed's, torch's DCP or "
        "Megatron-LM's (a path or a URL), a folder of shards, or a .bin/.idx."
    ),
]
Dtype = Annotated[
    Literal["fp32", "bf16", "fp16", "int8"] | None,
    typer.Option(help="Dtype of the written weights (default: fp32, or that of their source)."),
]
Verify = Annotated[
    Literal["full", "sample", "none"] | None,
    typer.Option(help="Weights that are read back and compared (default: full)."),
]
Weights = Annotated[
    Literal["trained", "ema"] | None,
    typer.Option(help="Which weights: as trained (default), or their average (a stage's `ema`)."),
]


def main(
    source: Source,
    output: Annotated[Path, typer.Option(help="What to write (megatron: PREFIX of .bin and .idx); must be new.")],
    to: Annotated[
        To | None, typer.Option(help="The format to write; by default Hugging Face's of ours, and ours of others.")
    ] = None,
    with_optimizer: Annotated[
        bool, typer.Option("--with-optimizer", help="Carry the optimizer's moments, too, where both sides know them.")
    ] = False,
    dtype: Dtype = None,
    shard_size: Annotated[str | None, typer.Option(help="Size of one file at the most, such as 5GB (default).")] = None,
    verify: Verify = None,
    run: Annotated[
        Path | None, typer.Option(help="Run file of the model, for files that do not say which model they are of.")
    ] = None,
    names: Annotated[
        Literal["ours", "huggingface"] | None, typer.Option(help="Whose parameter names are written.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer's folder: needed for shards, else if it was moved.")
    ] = None,
    weights: Weights = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="The model's license, for the card of --to huggingface.")
    ] = None,
) -> None:
    """Convert a model between our checkpoints, Hugging Face folders, DeepSpeed's checkpoints (ZeRO and universal) and
    torch's DCP, from Megatron-LM's checkpoints, or for deployment to ONNX and GGUF; or token files: shards ->
    Megatron's, and those -> shards, without a copy.

    What was written is read back and compared; a conversion to ours or to Hugging Face that was killed goes on where it
    stood.
    """
    kind = kind_of(source, to)
    to = to or USUAL[kind]
    conversion = conversion_of(source, kind, to)
    given = {"--names": names, "--license": license_id, "--dtype": dtype, "--shard-size": shard_size}
    given |= {"--weights": weights, "--verify": verify, "--run": run, "--with-optimizer": with_optimizer}
    check_options(kind, to, given)
    shard_bytes = 5 * 10**9 if shard_size is None else _bytes(shard_size)
    request = Request(
        source=source,
        output=output,
        shard_bytes=shard_bytes,
        verify=verify or "full",
        with_optimizer=with_optimizer,
        tokenizer=tokenizer,
        dtype=dtype,
        run=run,
        names=names,
        weights=weights,
        license_id=license_id,
    )
    conversion.run(request)


def _bytes(text: str) -> int:
    """Return the bytes of a size such as 5GB or 512MiB. Raises `ConfigError` where it is none."""
    number = text.strip().upper()
    unit = next((unit for unit in ("KIB", "MIB", "GIB", "KB", "MB", "GB") if number.endswith(unit)), "")
    try:
        found = int(float(number.removesuffix(unit)) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise ConfigError(f"--shard-size {text}", "a size such as 5GB, 500MB or 2GiB", "mend it")
    return found
