"""Preparation of text as folders of token shards, for training and validation, with a recipe of their making.

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.corpus import minhash, spread
from engine.corpus.encode_sources import encode_sources
from engine.corpus.options import PrepareOptions, Show, check_options
from engine.corpus.pool import Pool
from engine.corpus.recipe import Recipe, begin, complete_before, refuse_foreign
from engine.corpus.sources.chunks import Source, find_sources, named_hash
from engine.corpus.statistics import Statistics
from engine.corpus.unspelt import refuse_unspelt, unspelt_before, unspelt_in
from engine.corpus.write_folders import put_in_place, write_folders
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.errors import ConfigError, DataError


@dataclass(frozen=True)
class Prepared:
    """The outcome: the counts of each folder by its name, and whether it was all there before."""

    output: Path
    parts: dict[str, Statistics]
    was_there: bool


def prepare(options: PrepareOptions, progress: Show = lambda _: None, pool: Pool = Pool(1)) -> Prepared:  # noqa: B008
    """Write the folders `train` and `validation` under the output, or a folder per domain in each of these.

    Raises:
        ConfigError: an option that makes no sense.
        DataError: missing, damaged or empty sources or tokenizer, another output in the way, no room.
        EnvironmentProblem: a worker process died.
    """
    check_options(options)
    refuse_foreign(options.output)
    tokenizer = load_tokenizer(options.tokenizer)
    sources = find_sources(options.sources)
    _refuse_no_keys(options, sources)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        if not os.access(options.output, os.W_OK):  # told before the sources are read for their hashes
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with _alone(options.output):
            hashes = dict(pool.run(named_hash, sources))
            recipe = _recipe(options, tokenizer, sources, hashes)
            # an output of the same recipe is kept, but its share of unspelt text is held to today's limit
            if not options.overwrite and (found := complete_before(options.output, recipe)) is not None:
                refuse_unspelt(unspelt_before(found), options.max_unspelt, tokenizer)
                return Prepared(options.output, found, was_there=True)
            work = begin(options.output, recipe, options.overwrite)
            parts = encode_sources(options, tokenizer, sources, hashes, work, pool, progress)
            # after encoding, before any shard: the parts are kept for a higher limit
            refuse_unspelt(unspelt_in(parts), options.max_unspelt, tokenizer)
            counts = write_folders(options, tokenizer, parts, work, pool, progress)
            put_in_place(options.output, work, recipe, counts)
    except OSError as error:
        raise _unwritable(options.output, error) from error
    return Prepared(options.output, counts, was_there=False)


def _recipe(options: PrepareOptions, tokenizer: TextTokenizer, sources: list[Source], hashes: dict[str, str]) -> Recipe:
    """Return all that decides the bytes of the output; sources count by content, names are kept for the reader."""
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
        "id_key": options.id_key,
        # no key where there are none, as in recipes from before there were any
        **({} if options.weight_key is None else {"weight_key": options.weight_key}),
        "blank_line_ends": options.blank_line_ends,
        "sentences": options.sentences,
        "deduplicate": options.deduplicate,
        "similarity": options.similarity if near else None,
        "signatures": minhash.algorithm() if near else None,
        "compression": options.compression,
        "order": spread.NAME,
    }


def _refuse_no_keys(options: PrepareOptions, sources: list[Source]) -> None:
    """Raise `ConfigError` where ids or weights are asked for of files that hold text alone."""
    plain = [source.name for source in sources if source.kind == "text"]
    left_out = {"--id-key": " (ids are then SHARD_HASH:ROW)", "--weight-key": ""}
    for option, key in (("--id-key", options.id_key), ("--weight-key", options.weight_key)):
        if key is not None and plain:
            more = f" (and {len(plain) - 1:,} more)" if len(plain) > 1 else ""
            raise ConfigError(
                f"{option} {key}: {plain[0]}{more} is plain text, which has no keys",
                "JSON lines, Parquet or a dataset",
                f"leave {option} out{left_out[option]}, or write the texts as JSON lines",
            )


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the output folder for one preparation at a time. Raises `DataError` where another one holds it."""
    # the folder itself is locked: no lock file is left in an output
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


def _unwritable(output: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write to {output}: {error.strerror or error}",
        "a writable folder with room",
        "make room or name another --output; the same command goes on where this one stopped",
    )
