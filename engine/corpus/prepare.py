"""Text -> folders of token shards, to train on and held out, and a recipe that says what they were made from.

Three steps: every chunk of the sources is encoded into a part file, by any worker; which documents stay is decided
over all of them, in their order; every shard is written from the parts, by any worker. Invariant: the same sources (by
content), tokenizer and options give the same bytes, whatever the number of workers or MPI ranks, and after any number
of kills: finished parts verify and are not made again. An output made from something else is never touched without
`overwrite`, and then only once the new one is whole.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from engine.config.home import refuse_url
from engine.corpus import minhash, spread
from engine.corpus.assemble import (
    Corpus,
    Deduplicate,
    EncodedFile,
    removed,
    shard_bounds,
    shard_tasks,
    statistics,
    write,
)
from engine.corpus.encode import Encoded, EncodeOptions, Task, encode_to_file
from engine.corpus.encoded_chunks import load
from engine.corpus.pool import Pool
from engine.corpus.recipe import (
    RECIPE_FILE,
    TRAIN,
    VALIDATION,
    Recipe,
    begin,
    complete_before,
    parts_before,
    refuse_foreign,
    remove_tree,
    write_recipe,
)
from engine.corpus.sentences import check_language
from engine.corpus.sources.chunks import Source, find_sources, named_hash, read_chunks, shelves
from engine.corpus.spread import ChunkKey
from engine.corpus.statistics import Statistics
from engine.corpus.unspelt import refuse_unspelt, unspelt_before, unspelt_in
from engine.data.shards.index import FILE as INDEX_FILE
from engine.data.shards.index import Index, ShardEntry, token_dtype
from engine.data.shards.writer import (
    DEFAULT_SHARD_BYTES,
    Compression,
    finish_folder,
    start_folder,
    sweep,
    tokens_per_shard,
)
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.errors import ConfigError, DataError

_BLANK_LINES = "a text file is one document; --blank-line-ends if an empty line ends a document in it; otherwise "


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare, and how; every field but `max_unspelt` and `overwrite` can change the bytes."""

    sources: tuple[str, ...]
    """Files, folders, globs, or `hf:NAME_OR_FOLDER[:CONFIG][@SPLIT]`; all or none with `DOMAIN=` before them."""
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
    deduplicate: Deduplicate = "none"
    """Leaves out documents with the text of an earlier one (`exact`), or nearly (`near`, which includes exact)."""
    similarity: float = 0.8
    """Least share of their runs of five tokens that near duplicates have in common (Jaccard's)."""
    compression: Compression = "none"
    max_unspelt: float = 0.05
    """Largest share of the bytes of a domain's text that the tokenizer may fail to spell."""
    overwrite: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a preparation is; bytes are those of the sources as they lie there (0 in all when unknown)."""

    doing: str
    documents: int
    tokens: int
    kept_tokens: int
    """Tokens that an earlier attempt had finished."""
    done: int
    """Bytes read, bands compared, or shards written."""
    total: int
    text_bytes: int = 0
    """Bytes of the text that has been encoded."""
    unspelt_bytes: int = 0
    """Those of them that no token spells."""


@dataclass(frozen=True)
class Prepared:
    """The outcome: the counts of each folder by its name, and whether it was all there before."""

    output: Path
    parts: dict[str, Statistics]
    was_there: bool


Show = Callable[[Progress], None]


def prepare(options: PrepareOptions, progress: Show = lambda _: None, pool: Pool = Pool(1)) -> Prepared:  # noqa: B008
    """Writes the folders `train` and `validation` under the output, or a folder per domain in each of these.

    Raises:
        ConfigError: an option that makes no sense.
        DataError: missing, damaged or empty sources or tokenizer, another output in the way, no room.
        EnvironmentProblem: a worker process died.
    """
    _check(options)
    refuse_foreign(options.output)
    tokenizer = load_tokenizer(options.tokenizer)
    sources = find_sources(options.sources)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        if not os.access(options.output, os.W_OK):  # told before the sources are read for their hashes
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with _alone(options.output):
            hashes = dict(pool.run(named_hash, sources))
            recipe = _recipe(options, tokenizer, sources, hashes)
            if not options.overwrite and (found := complete_before(options.output, recipe)) is not None:
                refuse_unspelt(unspelt_before(found), options.max_unspelt, tokenizer)
                return Prepared(options.output, found, was_there=True)
            work = begin(options.output, recipe, options.overwrite)
            parts = _encode(options, tokenizer, sources, hashes, work, pool, progress)
            refuse_unspelt(unspelt_in(parts), options.max_unspelt, tokenizer)
            counts = _assemble(options, tokenizer, parts, work, pool, progress)
            _put_in_place(options.output, work, recipe, counts)
    except OSError as error:
        raise _unwritable(options.output, error) from error
    return Prepared(options.output, counts, was_there=False)


def _check(options: PrepareOptions) -> None:
    if not 0 <= options.validation_fraction < 1:
        raise ConfigError(
            f"--validation-fraction {options.validation_fraction}", "from 0 to less than 1", "0 holds nothing out"
        )
    if not 0 < options.similarity <= 1:
        raise ConfigError(f"--similarity {options.similarity}", "above 0 and up to 1", "0.8 is the default")
    if not 0 <= options.max_unspelt <= 1:
        raise ConfigError(f"--max-unspelt {options.max_unspelt}", "from 0 to 1", "0.05 is the default, 1 allows all")
    if options.shard_bytes < 1:
        raise ConfigError(f"shards of {options.shard_bytes} bytes", "1 or more", "name a larger --shard-megabytes")
    if options.sentences is not None:
        check_language(options.sentences)
    refuse_url(str(options.output), "--output")
    if not options.sources:
        raise ConfigError("no source is named", "files, folders, globs, or hf:NAME_OR_FOLDER", "name one")


def _recipe(options: PrepareOptions, tokenizer: TextTokenizer, sources: list[Source], hashes: dict[str, str]) -> Recipe:
    """What decides the bytes of the output; sources count by content, their names are kept for the reader."""
    near = options.deduplicate == "near"
    return {
        "sources": [
            {"name": item.name, "domain": item.domain, "bytes": item.num_bytes, "xxh3": hashes[item.name]}
            for item in sources
        ],
        "tokenizer": str(options.tokenizer),
        "tokenizer_hash": tokenizer.hash,
        # earlier versions left it to such a model to read special tokens out of text, and wrote no key
        "special_tokens_in_text": "spelt" if tokenizer.knows_special_spellings else None,
        "validation_fraction": options.validation_fraction,
        "shard_bytes": options.shard_bytes,
        "text_key": options.text_key,
        "blank_line_ends": options.blank_line_ends,
        "sentences": options.sentences,
        "deduplicate": options.deduplicate,
        "similarity": options.similarity if near else None,
        "signatures": minhash.algorithm() if near else None,
        "compression": options.compression,
        "order": spread.NAME,
    }


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Holds the output folder for one preparation at a time. Raises `DataError` where another one holds it."""
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another preparation is writing to {output}", "one at a time", "wait for it, or name another --output"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _encode(
    options: PrepareOptions,
    tokenizer: TextTokenizer,
    sources: list[Source],
    hashes: dict[str, str],
    work: Path,
    pool: Pool,
    progress: Show,
) -> list[EncodedFile]:
    """Encodes every chunk that no earlier attempt has finished; the parts in the order of the sources."""
    near = options.similarity if options.deduplicate == "near" else None
    how = EncodeOptions(options.text_key, options.validation_fraction, options.sentences, near)
    named: list[tuple[Path, ChunkKey, str]] = []
    found: dict[int, Encoded] = {}
    tally = {"documents": 0, "tokens": 0, "kept_tokens": 0, "done": 0, "text_bytes": 0, "unspelt_bytes": 0}
    total = sum(source.num_bytes for source in sources)

    def count(encoded: Encoded, was_there: bool) -> None:
        found[encoded.place] = encoded
        tokens = int(encoded.documents.lengths.sum())
        tally["documents"] += encoded.documents.lengths.size
        tally["tokens"] += tokens
        tally["kept_tokens"] += tokens if was_there else 0
        tally["done"] += encoded.read_bytes
        lost = int(encoded.documents.empty_unspelt)
        tally["text_bytes"] += int(encoded.documents.text_bytes.sum()) + lost
        tally["unspelt_bytes"] += int(encoded.documents.unspelt.sum()) + lost
        progress(Progress("encoding", **tally, total=total))

    def missing() -> Iterator[Task]:
        for order, shelf in enumerate(shelves(sources)):
            key = xxhash.xxh3_64_hexdigest(" ".join(hashes[source.name] for source in shelf).encode())
            folder = work / f"{order:06d}-{key}"
            folder.mkdir(exist_ok=True)
            for number, chunk in enumerate(read_chunks(shelf, options.text_key, options.blank_line_ends)):
                place, path = len(named), folder / f"{number:06d}.part"
                named.append((path, (order, number), shelf[0].domain))
                if (part := load(path)) is not None:
                    count(Encoded(place, *part, chunk.read_bytes), True)
                else:
                    yield Task(chunk, tokenizer.folder, tokenizer.hash, how, path, (order, number), place)

    for encoded in pool.run(encode_to_file, missing()):
        count(encoded, False)
    return [EncodedFile(*names, found[place].documents, found[place].bands) for place, names in enumerate(named)]


def _assemble(
    options: PrepareOptions, tokenizer: TextTokenizer, parts: list[EncodedFile], work: Path, pool: Pool, progress: Show
) -> dict[str, Statistics]:
    """Decides which documents stay and writes them as shards into the working folder."""
    corpus = Corpus(parts, np.dtype(token_dtype(tokenizer.vocab_size)))
    documents = corpus.documents
    counts = (documents.lengths.size, int(documents.lengths.sum()))
    gone = removed(
        corpus,
        options.deduplicate,
        options.similarity,
        pool,
        lambda done, total: progress(Progress("comparing near duplicates", *counts, 0, done, total)),
    )
    sides = _sides(options, parts, corpus)
    found = {name: statistics(documents, mine, gone, *empty) for name, (mine, empty) in sides.items()}
    try:
        _refuse_empty(options, found)
    except DataError:
        remove_tree(work)  # what is told to do next is another command, which could not go on with these parts
        raise
    shard_tokens = tokens_per_shard(options.shard_bytes, tokenizer.vocab_size)
    orders = {
        _new(work, name): shard_bounds(corpus, np.flatnonzero(mine & ~gone.any), shard_tokens)
        for name, (mine, _) in sides.items()
    }
    for folder in orders:
        start_folder(folder)
    tasks = (
        task
        for folder, order in orders.items()
        for task in shard_tasks(folder, corpus, *order, options.sentences is not None, options.compression)
    )
    entries: dict[Path, dict[int, ShardEntry]] = {folder: {} for folder in orders}
    kept = (sum(part.documents for part in found.values()), sum(part.tokens for part in found.values()))
    total = sum(bounds.size - 1 for _, bounds in orders.values())
    for done, (folder, number, entry) in enumerate(pool.run(write, tasks), 1):
        entries[folder][number] = entry
        progress(Progress("writing shards", *kept, 0, done, total))
    for folder, mine in entries.items():
        shards = tuple(mine[number] for number in range(len(mine)))
        shape = (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.hash, shards, tokenizer.vocabulary)
        finish_folder(folder, Index(*shape))
    return found


def _sides(
    options: PrepareOptions, parts: list[EncodedFile], corpus: Corpus
) -> dict[str, tuple[np.ndarray, tuple[int, int]]]:
    """Of each folder of the output, by name: its documents (n,) bool, and how many without a token it counts, with
    how many bytes that no token spells."""
    domains = list(dict.fromkeys(part.domain for part in parts))
    counts = [part.documents.lengths.size for part in parts]
    of_document = np.repeat([domains.index(part.domain) for part in parts], counts)
    found = {}
    for number, domain in enumerate(domains):
        own = [part.documents for part in parts if part.domain == domain]
        empty = (sum(int(part.empty) for part in own), sum(int(part.empty_unspelt) for part in own))
        for side in (TRAIN, VALIDATION) if options.validation_fraction else (TRAIN,):
            mine = (of_document == number) & (corpus.documents.is_validation == (side == VALIDATION))
            found[f"{side}/{domain}" if domain else side] = (mine, empty if side == TRAIN else (0, 0))
    return found


def _new(work: Path, name: str) -> Path:
    """Where a folder of the output lies until all of them are whole."""
    return work / "whole" / name


def _put_in_place(output: Path, work: Path, recipe: Recipe, counts: dict[str, Statistics]) -> None:
    """Moves the whole output to where it belongs: what was there before goes first, the recipe comes last."""
    (output / RECIPE_FILE).unlink(missing_ok=True)
    for name in parts_before(output):
        sweep(output / name)
        for folder in (output / name, (output / name).parent):
            if folder != output and not any(folder.iterdir()):
                folder.rmdir()
    for name in counts:
        target = output / name
        target.mkdir(parents=True, exist_ok=True)
        sweep(target)
        for path in sorted(_new(work, name).iterdir(), key=lambda path: path.name == INDEX_FILE):
            path.replace(target / path.name)
    write_recipe(output, recipe, counts)
    remove_tree(work)


def _refuse_empty(options: PrepareOptions, parts: dict[str, Statistics]) -> None:
    named = ", ".join(options.sources[:3]) + (" ..." if len(options.sources) > 3 else "")
    if not any(part.documents for part in parts.values()):
        raise DataError(f"there is no text in {named}", "at least one document with a token", "name other sources")
    total = sum(part.documents for part in parts.values())
    for name, part in parts.items():
        left_out = part.exact_duplicates + part.near_duplicates
        if left_out and not part.documents:
            raise DataError(
                f"all documents of {name} have duplicates before them: {part.exact_duplicates:,} exact, "
                f"{part.near_duplicates:,} near",
                "at least one that is left",
                "name that source first, or not at all, or change --deduplicate or --similarity",
            )
        if not part.documents:
            raise DataError(
                f"none of {total:,} documents of {named} falls into {name} with validation fraction "
                f"{options.validation_fraction}",
                "documents on both sides",
                _more_documents(options, total),
            )


def _more_documents(options: PrepareOptions, total: int) -> str:
    """What works where one side of the split is empty."""
    files = [source for source in find_sources(options.sources) if source.kind == "text"]
    split = "" if options.blank_line_ends or not files else _BLANK_LINES
    others = ", or name a larger fraction, or more text" if total > 1 else ", or name more text"
    return f"{split}--validation-fraction 0 holds nothing out{others}"


def _unwritable(output: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write to {output}: {error.strerror or error}",
        "a writable folder with room",
        "make room or name another --output; the same command goes on where this one stopped",
    )
