"""`palimpsest generate`: continues a prompt with a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def main(
    source: Annotated[Path, typer.Argument(help="A run folder, one of its checkpoints, or a Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many likeliest tokens; 0: all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Equal seeds give equal text.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer's folder, if it was moved.")] = None,
) -> None:
    """Continue a prompt; the text appears as it is made."""
    from engine.logs import configure
    from engine.serve.generate import Sampling, generate
    from engine.serve.language_model import open_language_model
    from engine.serve.quiet import quiet

    configure()
    quiet()
    language_model = open_language_model(source, tokenizer)
    # Standard output is the text alone.
    print(f"continuing with {language_model.origin}", file=sys.stderr, flush=True)
    sampling = Sampling(max_new_tokens, temperature, top_k, seed)
    generate(language_model, prompt, sampling, on_text=lambda text: print(text, end="", flush=True))
    print()
