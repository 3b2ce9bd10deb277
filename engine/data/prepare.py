"""Text -> two folders of token shards, `train` and `validation`, and a recipe that says what they were made from.

Invariant: the same sources (by content), tokenizer and options give the same bytes, whatever the number of workers;
`prepare.json` is written last, so a folder with a recipe is complete. An output made from something else is never
touched without `overwrite`; one made from the same is verified and kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.dataset import TokenDataset
from engine.data.encode import Encoded, EncodeOptions, encode_chunks
from engine.data.index import FILE as INDEX_FILE
from engine.data.index import write_atomically
from engine.data.sentences import check_language
from engine.data.shards import DEFAULT_SHARD_BYTES, ShardWriter, sweep
from engine.data.sources import Source, content_hash, find_sources, read_chunks
from engine.data.statistics import Statistics
from engine.data.tokenizer import TextTokenizer, load_tokenizer
from engine.errors import ConfigError, DataError

RECIPE_FILE = "prepare.json"
TRAIN, VALIDATION = "train", "validation"
PARTS = (TRAIN, VALIDATION)
VERSION = 1
ASIDE = ".previous"
"""Where a complete earlier output lies while another one is written over it."""


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare, and how; every field but `workers` and `overwrite` can change the bytes."""

    sources: tuple[str, ...]
    """Files, folders, globs, or `hf:NAME_OR_FOLDER[:CONFIG][@SPLIT]`."""
    tokenizer: Path
    output: Path
    validation_fraction: float = 0.05
    """Share of the documents that is held out; 0 writes no `validation` folder."""
    shard_bytes: int = DEFAULT_SHARD_BYTES
    text_key: str = "text"
    blank_line_ends: bool = False
    """Text files hold many documents, each ended by an empty line; otherwise a file is a document."""
    sentences: str | None = None
    """Language whose rules find the sentences, which pairs need; None finds none."""
    workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a preparation is; bytes are those of the sources as they lie there (0 in all when unknown)."""

    documents: int
    tokens: int
    read_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Prepared:
    """The outcome: the counts of each part, and whether it was all there before."""

    output: Path
    parts: dict[str, Statistics]
    was_there: bool


def prepare(options: PrepareOptions, progress: Callable[[Progress], None] = lambda _: None) -> Prepared:
    """Writes the folders `train` and `validation` under the output.

    Raises:
        ConfigError: an option that makes no sense.
        DataError: missing, damaged or empty sources or tokenizer, another output in the way, no room.
        EnvironmentProblem: a worker process died.
    """
    _check(options)
    tokenizer = load_tokenizer(options.tokenizer)
    sources = find_sources(list(options.sources))
    recipe = _recipe(options, tokenizer, sources)
    if not options.overwrite and (found := _existing(options, recipe)) is not None:
        return Prepared(options.output, found, was_there=True)
    parts = _write(options, tokenizer, sources, progress)
    report = {name: statistics.to_json() for name, statistics in parts.items()}
    text = json.dumps({"version": VERSION, "recipe": recipe, "report": report}, indent=1) + "\n"
    try:
        write_atomically(options.output / RECIPE_FILE, text)
    except OSError as error:
        raise _unwritable(options.output, error) from error
    return Prepared(options.output, parts, was_there=False)


def _check(options: PrepareOptions) -> None:
    if not 0 <= options.validation_fraction < 1:
        raise ConfigError(f"validation fraction {options.validation_fraction}", "from 0 to less than 1")
    if options.workers < 1:
        raise ConfigError(f"{options.workers} workers", "1 or more")
    if options.shard_bytes < 1:
        raise ConfigError(f"shards of {options.shard_bytes} bytes", "1 or more")
    if options.sentences is not None:
        check_language(options.sentences)
    if not options.sources:
        raise ConfigError("no source is named", "files, folders, globs, or hf:NAME_OR_FOLDER")


def _recipe(options: PrepareOptions, tokenizer: TextTokenizer, sources: list[Source]) -> dict[str, Any]:
    """What decides the bytes of the output; sources count by content, their names are kept for the reader."""
    return {
        "sources": [{"name": item.name, "bytes": item.num_bytes, "xxh3": content_hash(item)} for item in sources],
        "tokenizer": str(options.tokenizer),
        "tokenizer_hash": tokenizer.hash,
        "validation_fraction": options.validation_fraction,
        "shard_bytes": options.shard_bytes,
        "text_key": options.text_key,
        "blank_line_ends": options.blank_line_ends,
        "sentences": options.sentences,
    }


def _existing(options: PrepareOptions, recipe: dict[str, Any]) -> dict[str, Statistics] | None:
    """The counts of an output that is there already and was made from the same, verified; None where there is none.

    Raises `DataError` where another output is in the way, or this one is damaged.
    """
    path = options.output / RECIPE_FILE
    if not path.exists():
        others = [name for name in PARTS if (options.output / name / INDEX_FILE).exists()]
        if others:
            raise _in_the_way(options.output, f"token shards without a {RECIPE_FILE} in {', '.join(others)}")
        return None
    try:
        tree = json.loads(path.read_bytes())
        before = tree["recipe"]
        parts = {name: Statistics.from_json(item) for name, item in tree["report"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _in_the_way(options.output, f"a {RECIPE_FILE} that cannot be read ({error})") from error
    differences = [
        f"{key}: {_shown(before.get(key))} -> {_shown(recipe[key])}"
        for key in recipe
        if _compared(key, before.get(key)) != _compared(key, recipe[key])
    ]
    if differences:
        raise _in_the_way(options.output, "token shards made otherwise:\n  " + "\n  ".join(differences))
    for name in parts:
        TokenDataset(options.output / name).verify()
    return parts


def _compared(key: str, value: Any) -> Any:
    """What counts of a recipe's value: contents, not names and places."""
    if key == "tokenizer":
        return None  # the hash tells
    if key == "sources" and isinstance(value, list):
        return [item.get("xxh3") for item in value]
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        names = [Path(item["name"]).name for item in value]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return repr(value)


def _write(
    options: PrepareOptions, tokenizer: TextTokenizer, sources: list[Source], progress: Callable[[Progress], None]
) -> dict[str, Statistics]:
    names = PARTS if options.validation_fraction else (TRAIN,)
    parts = {name: Statistics() for name in names}
    with ExitStack() as stack:
        stack.enter_context(_earlier_kept(options.output))
        writers = {name: stack.enter_context(_writer(options, tokenizer, name)) for name in names}
        for encoded, read_bytes in _encoded(options, tokenizer, sources):
            parts[TRAIN].empty_documents += encoded.empty_documents
            documents = zip(encoded.ids, encoded.sentences, encoded.held_out, encoded.text_bytes, strict=True)
            for ids, sentences, held_out, size in documents:
                name = VALIDATION if held_out else TRAIN
                writers[name].add(ids, sentences)
                parts[name].add(ids, size, tokenizer.unknown_id, 0 if sentences is None else sentences.size)
            count = sum(part.documents for part in parts.values())
            tokens = sum(part.tokens for part in parts.values())
            progress(Progress(count, tokens, read_bytes, sum(source.num_bytes for source in sources)))
        _refuse_empty(options, parts)
    return parts


def _encoded(options: PrepareOptions, tokenizer: TextTokenizer, sources: list[Source]) -> Iterator[tuple[Encoded, int]]:
    """Each chunk encoded, and the bytes of all sources read by its end."""
    chunks = (chunk for item in sources for chunk in read_chunks(item, options.text_key, options.blank_line_ends))
    read: dict[str, int] = {}
    how = EncodeOptions(options.text_key, options.validation_fraction, options.sentences)
    for encoded in encode_chunks(chunks, tokenizer, how, options.workers):
        read[encoded.source] = encoded.read_bytes
        yield encoded, sum(read.values())


def _writer(options: PrepareOptions, tokenizer: TextTokenizer, name: str) -> ShardWriter:
    return ShardWriter(
        options.output / name,
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.hash,
        options.shard_bytes,
        tokenizer.vocabulary,
    )


@contextmanager
def _earlier_kept(output: Path) -> Iterator[None]:
    """A complete earlier output steps aside, into `.previous`, and comes back where the new one fails."""
    aside, names = output / ASIDE, (RECIPE_FILE, *PARTS)
    complete = (output / RECIPE_FILE).exists()
    if not complete:
        _clear(output)
        yield
        return
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name in names:
            if (output / name).exists():
                (output / name).rename(aside / name)
        _clear(output)
    except OSError as error:
        raise _unwritable(output, error) from error
    try:
        yield
    except BaseException:
        for name in names:
            if (output / name).is_dir():
                shutil.rmtree(output / name)
            if (aside / name).exists():
                (aside / name).rename(output / name)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def _clear(output: Path) -> None:
    """Removes the recipe first, so that a half-written output never has one, then what it spoke of."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / RECIPE_FILE).unlink(missing_ok=True)
        for name in PARTS:
            if (output / name).is_dir():
                sweep(output / name)
        if (output / VALIDATION).is_dir() and not any((output / VALIDATION).iterdir()):
            (output / VALIDATION).rmdir()
    except OSError as error:
        raise _unwritable(output, error) from error


def _refuse_empty(options: PrepareOptions, parts: dict[str, Statistics]) -> None:
    named = ", ".join(options.sources[:3]) + (" ..." if len(options.sources) > 3 else "")
    if not any(part.documents for part in parts.values()):
        raise DataError(f"there is no text in {named}", "at least one document with a token", "name other sources")
    for name, part in parts.items():
        if not part.documents:
            raise DataError(
                f"no document of {named} falls into {name} with validation fraction {options.validation_fraction}",
                "documents on both sides",
                "give more text or another --validation-fraction (0 holds nothing out)",
            )


def _in_the_way(output: Path, what: str) -> DataError:
    return DataError(
        f"{output} holds {what}",
        "a new or empty folder, or one made from the same",
        "name another --output, or --overwrite",
    )


def _unwritable(output: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write to {output}: {error.strerror or error}", "a writable folder", "name another --output"
    )
