"""`palimpsest prepare`: writes text as token shards, for training and for validation."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from engine.corpus.assemble import Deduplicate
from engine.corpus.options import PrepareOptions
from engine.corpus.options import Progress as HowFar
from engine.corpus.pool import available_cpus, workers
from engine.corpus.prepare import Prepared, prepare
from engine.corpus.sources.chunks import told_foreign
from engine.data.shards.writer import Compression
from tools.data_tables import counts_table, histogram

_TOLD_EVERY_SECONDS = 30

Sources = Annotated[
    list[str], typer.Argument(metavar="[DOMAIN=]SOURCE...", help="Files, folders, globs, or hf:DATASET.")
]
Deduplicated = Annotated[
    Deduplicate, typer.Option(help="Leave out documents with the text of an earlier one, or nearly.")
]
SentenceLanguage = Annotated[
    str | None, typer.Option(metavar="LANGUAGE", help="Find sentences, which pairs need: en, zh, ...")
]


def main(
    sources: Sources,
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")],
    output: Annotated[Path, typer.Option(help="Folder to write: train/ and validation/, in each a folder per domain.")],
    validation_fraction: Annotated[float, typer.Option(help="Share of documents held out (0: none).")] = 0.05,
    deduplicate: Deduplicated = "none",
    similarity: Annotated[float, typer.Option(help="Jaccard similarity of near duplicates, at least.")] = 0.8,
    sentences: SentenceLanguage = None,
    compress: Annotated[Compression, typer.Option(help="How shards are stored.")] = "none",
    shard_megabytes: Annotated[float, typer.Option(min=0.001, max=65536, help="Size of a shard (MiB).")] = 64,
    num_workers: Annotated[int | None, typer.Option("--workers", help="Processes (one per CPU), 0.5 GiB each.")] = None,
    text_key: Annotated[str, typer.Option(help="Key of the text in JSON lines, Parquet and datasets.")] = "text",
    id_key: Annotated[
        str | None, typer.Option(help="Key of an id of each document, kept for `forget` (default: SHARD_HASH:ROW).")
    ] = None,
    weight_key: Annotated[
        str | None, typer.Option(help="Key of a number of each document, such as its quality, kept for reservoirs.")
    ] = None,
    blank_line_ends: Annotated[
        bool, typer.Option("--blank-line-ends", help="In text files, an empty line ends a document.")
    ] = False,
    max_unspelt: Annotated[
        float, typer.Option(help="Share of the text (bytes) that the tokenizer may fail to spell.")
    ] = 0.05,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
) -> None:
    """Write text as token shards with hashes; each document goes to training or to validation.

    After a kill the same command continues where it was. Under mpirun or srun, rank 0 reads and the others encode.
    """
    options = PrepareOptions(
        sources=tuple(sources),
        tokenizer=tokenizer,
        output=output,
        validation_fraction=validation_fraction,
        shard_bytes=int(shard_megabytes * 2**20),
        text_key=text_key,
        id_key=id_key,
        weight_key=weight_key,
        blank_line_ends=blank_line_ends,
        sentences=sentences,
        deduplicate=deduplicate,
        similarity=similarity,
        compression=compress,
        max_unspelt=max_unspelt,
        overwrite=overwrite,
    )
    started = time.monotonic()
    with workers(available_cpus() if num_workers is None else num_workers) as pool:
        # Under mpirun or srun this is a rank that encodes for rank 0, and it is done.
        if pool is None:
            return
        if (told := told_foreign(sources)) is not None:
            print(told, file=sys.stderr)
        with _shown(started) as show:
            prepared = prepare(options, show, pool)
    _print(prepared, time.monotonic() - started)


@contextmanager
def _shown(started: float) -> Iterator[Callable[[HowFar], None]]:
    """Show a bar with rate and estimate on a terminal, and a line every so often elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    told = started
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading sources", total=None)

        def show(now: HowFar) -> None:
            nonlocal told
            # Without what an earlier, killed command had written already.
            rate = (now.tokens - now.kept_tokens) / max(1e-9, time.monotonic() - started)
            text = f"{now.doing}: {now.documents:,} documents, {now.tokens / 1e6:,.1f} M tokens"
            text += f", {rate / 1e6:.2f} M tokens/s" if now.doing == "encoding" else ""
            text += f", {now.unspelt_bytes / now.text_bytes:.2%} unspelt" if now.unspelt_bytes else ""
            progress.update(task, description=text, completed=now.done, total=now.total or None)
            if not console.is_terminal and time.monotonic() - told > _TOLD_EVERY_SECONDS:
                told = time.monotonic()
                share = f", {now.done / now.total:.0%}" if now.total else ""
                left = progress.tasks[task].time_remaining
                share += f", {left:.0f} s left" if left else ""
                console.print(f"{text}{share}", highlight=False)

        yield show


def _print(prepared: Prepared, seconds: float) -> None:
    console = Console()
    tokens = sum(part.tokens for part in prepared.parts.values())
    if prepared.was_there:
        print(f"{prepared.output} was made from the same before: {tokens:,} tokens, hashes verified; nothing to do")
    else:
        rate = tokens / max(seconds, 1e-9) / 1e6
        print(f"wrote {tokens:,} tokens to {prepared.output} in {seconds:.1f} s ({rate:.2f} M tokens/s)")
    console.print(counts_table(prepared.parts))
    if unspelt := sum(part.unspelt_bytes for part in prepared.parts.values()):
        print(f"{unspelt:,} bytes of the text are lost: the tokenizer cannot spell them (`unspelt` is their share)")
    for name, part in prepared.parts.items():
        console.print(Text(f"tokens per document, {name}:\n{histogram(part)}"))
    _warn_of_single_sentences(prepared)


def _warn_of_single_sentences(prepared: Prepared) -> None:
    names = [name for name, part in prepared.parts.items() if 0 < part.sentences <= part.documents]
    if names:
        print(
            f"each document of {', '.join(names)} is one sentence: objective.pairs needs documents of several, "
            "and a run with it is refused"
        )
