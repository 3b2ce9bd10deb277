"""`palimpsest convert` to formats for deployment: what each conversion calls and says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from tools.conversions import Request
from tools.convert_progress import local

if TYPE_CHECKING:
    from engine.serve.source import Trained


def to_onnx(request: Request) -> None:
    """Write an ONNX graph and run it."""
    from engine.serve.deployment.onnx_export import FILE, export_onnx

    agreement = export_onnx(_opened(request), request.output)
    print(f"wrote {request.output / FILE} ({_megabytes(request.output)})")
    print(agreement)


def to_gguf(request: Request) -> None:
    """Write a GGUF file and load it."""
    from engine.serve.deployment.gguf_export import FILE, export_gguf

    if request.dtype == "int8":
        raise ConfigError("--dtype int8 with --to gguf", "fp32, bf16 or fp16", "quantise the file with llama.cpp")
    agreement = export_gguf(_opened(request), request.output, request.dtype or "fp32")
    print(f"wrote {request.output / FILE} ({_megabytes(request.output)})")
    print(agreement)


def to_int8(request: Request) -> None:
    """Write a Hugging Face folder with int8 weights and load it."""
    from engine.serve.deployment.int8_export import export_int8

    found = export_int8(_opened(request), request.output)
    print(f"wrote {request.output} ({_megabytes(request.output)}): {found.num_layers} linear layers in int8 (torchao)")
    print(found.agreement)


def _opened(request: Request) -> Trained:
    from engine.logs import configure
    from engine.serve.quiet import quiet
    from engine.serve.source import open_trained

    configure()
    quiet()
    source = local(request.source)
    print(f"reading and verifying {source}", flush=True)
    return open_trained(source, request.tokenizer, request.weights == "ema")


def _megabytes(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:,.1f} MB"
