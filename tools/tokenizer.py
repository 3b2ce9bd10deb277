"""`palimpsest tokenizer`: trains a tokenizer, takes one over or extends one, as a folder that transformers loads."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from engine.config.paths import expand
from engine.corpus.sources.chunks import find_sources, read_texts, told_foreign
from engine.corpus.tokenizer_extension import Texts, extend_tokenizer
from engine.corpus.tokenizer_folder import UNFINISHED
from engine.corpus.tokenizer_training import Purpose, TokenizerKind, train_tokenizer
from engine.errors import ConfigError, DataError

LARGEST_VOCABULARY = 10_000_000
"""Largest vocabulary, far beyond any use; libraries panic at sizes that do not fit memory."""
_TOLD_EVERY_SECONDS = 30
_USUALLY_LEARNT = 1000

Sources = Annotated[list[str] | None, typer.Argument(metavar="SOURCE...", help="Files, folders, globs, or hf:DATASET.")]
Imported = Annotated[
    str | None,
    typer.Option("--import", metavar="NAME_OR_FOLDER", help="Take over this Hugging Face tokenizer instead."),
]
Extended = Annotated[
    Path | None,
    typer.Option("--extend", metavar="FOLDER", help="Write this tokenizer with further tokens behind its own."),
]
Tokens = Annotated[
    Path | None,
    typer.Option(help="Tokens to add (--extend): a text file, one a line; a leading blank is a part of it."),
]
Added = Annotated[
    int | None, typer.Option(min=1, help="Tokens to learn from SOURCE (--extend); default 1000, none with --tokens.")
]


def main(
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    sources: Sources = None,
    imported: Imported = None,
    extended: Extended = None,
    tokens: Tokens = None,
    add: Added = None,
    kind: Annotated[TokenizerKind, typer.Option(help="What to train.")] = "bpe",
    vocab_size: Annotated[int, typer.Option(max=LARGEST_VOCABULARY, help="Tokens, special ones included.")] = 32000,
    purpose: Annotated[Purpose, typer.Option(help="Objective whose special tokens are added.")] = "causal",
    lowercase: Annotated[bool, typer.Option("--lowercase", help="Drop case and accents (wordpiece).")] = False,
    text_key: Annotated[str, typer.Option(help="Key of the text in JSON lines, Parquet and datasets.")] = "text",
    blank_line_ends: Annotated[
        bool, typer.Option("--blank-line-ends", help="In text files, an empty line ends a document.")
    ] = False,
    max_megabytes: Annotated[
        int | None, typer.Option(min=1, help="Train on so many MB of text, of every source its share.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
) -> None:
    """Train a tokenizer on text (byte-level BPE, SentencePiece unigram or BPE, WordPiece), or import or extend one."""
    _check_extension(extended, tokens, add, sources, imported)
    if extended is None and bool(sources) == bool(imported):
        what = "both sources and --import" if sources else "neither sources nor --import"
        raise ConfigError(what, "one of them", "name text to train on, or a tokenizer to take over")
    # What a killed training left may be written over.
    if not overwrite and output.is_dir() and any(path.name != UNFINISHED for path in output.iterdir()):
        raise ConfigError(
            f"{output} holds something already; shards and checkpoints may depend on it",
            "a new or empty folder",
            "name another --output, or --overwrite",
        )
    limit = max_megabytes * 1_000_000 if max_megabytes else None
    if imported:
        _import(expand(imported), output, purpose)
        return
    if extended is not None:
        texts = None
        if sources:
            find_sources(sources)
            texts = partial(read_texts, sources, text_key, blank_line_ends, limit)
        _extend(extended, output, tokens, texts, add or (0 if tokens else _USUALLY_LEARNT))
        return
    assert sources
    find_sources(sources)  # a wrong name is told before anything is written
    if (told := told_foreign(sources)) is not None:
        print(told, file=sys.stderr)
    _train(read_texts(sources, text_key, blank_line_ends, limit), output, kind, vocab_size, purpose, lowercase)


def _train(
    texts: Iterator[str], output: Path, kind: TokenizerKind, vocab_size: int, purpose: Purpose, lowercase: bool
) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress, _told(progress):
        trained = train_tokenizer(_shown(texts, progress), output, kind, vocab_size, purpose, lowercase)
    print(f"{kind} tokenizer {trained.hash} with {trained.vocab_size:,} tokens in {output}")
    if trained.vocab_size < vocab_size:
        print(f"fewer than the {vocab_size:,} tokens asked for: the text has no more")


def _import(source: str, output: Path, purpose: Purpose) -> None:
    from engine.corpus.tokenizer_import import import_tokenizer

    taken, added = import_tokenizer(source, output, purpose)
    print(f"took over {source}: tokenizer {taken.hash} with {taken.vocab_size:,} tokens in {output}")
    if added:
        named = ", ".join(added[:3]) + (f" and {len(added) - 3} more" if len(added) > 3 else "")
        print(f"added for {purpose}: {named}")


def _check_extension(
    extended: Path | None, tokens: Path | None, add: int | None, sources: list[str] | None, imported: str | None
) -> None:
    if extended is None:
        if given := [name for name, value in (("--tokens", tokens), ("--add", add)) if value is not None]:
            raise ConfigError(f"{given[0]} without --extend", "--extend FOLDER", "name the tokenizer to extend")
        return
    if imported:
        raise ConfigError("both --import and --extend", "one of them", "take the tokenizer over first, then extend it")
    if not sources and (tokens is None or add is not None):
        what = "--add without sources" if add is not None else "--extend with neither sources nor --tokens"
        raise ConfigError(what, "text to learn tokens from, or a file of tokens", "name SOURCE..., or --tokens FILE")


def _extend(source: Path, output: Path, tokens: Path | None, texts: Texts | None, num_learnt: int) -> None:
    given = [] if tokens is None else _lines_of(tokens)
    found = extend_tokenizer(source, output, given, texts, num_learnt)
    made = found.tokenizer
    print(f"extended {source}: tokenizer {made.hash} with {made.vocab_size:,} tokens in {output}")
    print(f"ids up to {found.first_id - 1:,} are as before; new: {made.vocab_size - found.first_id:,}")
    if found.left_behind:
        print(f"left out, as it knows no new token: {', '.join(found.left_behind)}; readers take tokenizer.json")
    if given:
        parts = f", and {found.num_parts:,} on the way to them" if found.num_parts else ""
        print(f"of {len(given):,} tokens in {tokens} {found.num_given:,} were new{parts}")
    if texts is not None and num_learnt:
        fewer = f" of {num_learnt:,}: the text has no more" if found.num_learnt < num_learnt else ""
        print(f"learnt {found.num_learnt:,}{fewer}")
    if found.usage is not None:
        before, after = found.usage
        print(
            f"tokens per byte of the text: {before.tokens_per_byte:.4f} before, {after.tokens_per_byte:.4f} now "
            f"({after.num_tokens / max(1, before.num_tokens) - 1:+.1%}); bytes that no token spells: "
            f"{before.unspelt_bytes:,} before, {after.unspelt_bytes:,} now"
        )


def _lines_of(path: Path) -> list[str]:
    """Return the lines of a file of tokens. Raises `DataError` where it cannot be read."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "a text file in UTF-8, a token a line", "mend it") from error


@contextmanager
def _told(progress: Progress) -> Iterator[None]:
    """Print a line every so often where nobody watches: training is one call into a library."""
    ended = threading.Event()
    started = time.monotonic()

    def tell() -> None:
        while not ended.wait(_TOLD_EVERY_SECONDS):
            for task in progress.tasks:
                seconds = time.monotonic() - started
                progress.console.print(f"{task.description}, {seconds:.0f} s", highlight=False)

    # A thread: the library gives no call back while it trains, and Ctrl-C has to end the process all the same.
    thread = threading.Thread(target=tell, daemon=True)
    if not progress.console.is_terminal:
        thread.start()
    try:
        yield
    finally:
        ended.set()


def _shown(texts: Iterable[str], progress: Progress) -> Iterator[str]:
    """Yield the texts, and count them on the screen."""
    task = progress.add_task("reading text")
    documents = size = 0
    for text in texts:
        documents, size = documents + 1, size + len(text)
        progress.update(task, description=f"reading text: {documents:,} documents, {size / 1e6:,.1f} M characters")
        yield text
    description = f"training on {documents:,} documents, {size / 1e6:,.1f} M characters"
    progress.update(task, description=description)
    if not progress.console.is_terminal:
        progress.console.print(description, highlight=False)
