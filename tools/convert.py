"""`palimpsest convert`: a trained model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def main(
    source: Annotated[Path, typer.Argument(help="A run folder (its newest whole checkpoint) or one checkpoint.")],
    output: Annotated[Path, typer.Option(help="The folder to write; must be new or empty.")],
    to: Annotated[Literal["huggingface"], typer.Option(help="The format to write.")] = "huggingface",
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer's folder, if it was moved.")] = None,
) -> None:
    """Write fp32 weights, configuration and tokenizer; load them with transformers; compare logits."""
    from engine.logs import configure
    from engine.serve.export import LARGEST_DIFFERENCE, export
    from engine.serve.quiet import quiet
    from engine.serve.source import open_trained

    configure()
    quiet()
    print(f"reading and verifying {source}", flush=True)
    trained = open_trained(source, tokenizer)
    print(f"writing {output} from {trained.checkpoint.name} and reading it back", flush=True)
    exported = export(trained, output)
    print(
        f"wrote {exported.folder}: {exported.num_parameters:,} parameters of step {trained.step} ({to}, fp32)\n"
        f"transformers agrees on {exported.num_tokens} tokens: largest logit difference "
        f"{exported.largest_difference:.2e} (allowed {LARGEST_DIFFERENCE:.0e}, largest logit "
        f"{exported.largest_logit:.2f}); every weight is bitwise equal"
    )
