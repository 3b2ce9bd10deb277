"""`palimpsest prepare`: writes text as token shards, in a part to train on and a part held out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from engine.data.encode import available_cpus
from engine.data.prepare import Prepared, PrepareOptions, prepare
from engine.data.prepare import Progress as HowFar
from engine.data.statistics import Statistics

_BAR_WIDTH = 30


def main(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Files, folders, globs, or hf:DATASET.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")],
    output: Annotated[Path, typer.Option(help="Folder to write: train/ and validation/.")],
    validation_fraction: Annotated[float, typer.Option(help="Share of documents held out (0: none).")] = 0.05,
    shard_megabytes: Annotated[float, typer.Option(min=0.001, max=65536, help="Size of a shard (MiB).")] = 64,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one per CPU).")] = None,
    text_key: Annotated[str, typer.Option(help="Key of the text in JSON lines and datasets.")] = "text",
    blank_line_ends: Annotated[
        bool, typer.Option("--blank-line-ends", help="In text files, an empty line ends a document.")
    ] = False,
    sentences: Annotated[
        str | None, typer.Option(metavar="LANGUAGE", help="Find sentences, which pairs need: en, zh, ...")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies in the output folder.")] = False,
) -> None:
    """Write text as token shards with hashes, each document on one side of a held-out split."""
    options = PrepareOptions(
        sources=tuple(sources),
        tokenizer=tokenizer,
        output=output,
        validation_fraction=validation_fraction,
        shard_bytes=int(shard_megabytes * 2**20),
        text_key=text_key,
        blank_line_ends=blank_line_ends,
        sentences=sentences,
        workers=available_cpus() if workers is None else workers,
        overwrite=overwrite,
    )
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading sources", total=None)

        def show(now: HowFar) -> None:
            rate = now.tokens / max(1e-9, time.monotonic() - started)
            text = f"{now.documents:,} documents, {now.tokens / 1e6:,.1f} M tokens, {rate / 1e6:.2f} M tokens/s"
            progress.update(task, description=text, completed=now.read_bytes, total=now.total_bytes or None)

        prepared = prepare(options, show)
    _print(prepared, time.monotonic() - started)


def _print(prepared: Prepared, seconds: float) -> None:
    console = Console()
    tokens = sum(part.tokens for part in prepared.parts.values())
    if prepared.was_there:
        print(f"{prepared.output} was made from the same before: {tokens:,} tokens, hashes verified, nothing to do")
    else:
        rate = tokens / max(seconds, 1e-9) / 1e6
        print(f"wrote {tokens:,} tokens to {prepared.output} in {seconds:.1f} s ({rate:.2f} M tokens/s)")
    table = Table("part", "documents", "empty", "sentences", "tokens", "bytes per token", "unknown")
    for name, part in prepared.parts.items():
        counts = (part.documents, part.empty_documents, part.sentences, part.tokens)
        figures = tuple(f"{count:,}" for count in counts)
        table.add_row(name, *figures, f"{part.bytes_per_token:.2f}", f"{part.unknown_rate:.4%}")
    console.print(table)
    for name, part in prepared.parts.items():
        console.print(f"tokens per document, {name}:")
        console.print(histogram(part), highlight=False)


def histogram(part: Statistics) -> str:
    """Documents by length, one line per power of two."""
    largest = max(part.lengths.values(), default=1)
    lines = []
    for power in range(min(part.lengths, default=0), max(part.lengths, default=-1) + 1):
        count = part.lengths[power]
        bar = "#" * round(_BAR_WIDTH * count / largest)
        lines.append(f"  {2**power:>9,} to {2 ** (power + 1) - 1:>9,} {count:>10,} {bar}".rstrip())
    return "\n".join(lines)
