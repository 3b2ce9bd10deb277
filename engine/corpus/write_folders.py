"""Writing of encoded chunks as the folders of the output: the documents that stay, their folder, and their shards.

The folders are written whole into the working folder, and then moved to their location.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.corpus.assemble import (
    Corpus,
    EncodedFile,
    refuse_repeated_ids,
    removed,
    shard_bounds,
    shard_tasks,
    statistics,
    write,
)
from engine.corpus.options import PrepareOptions, Progress, Show
from engine.corpus.pool import Pool
from engine.corpus.recipe import RECIPE_FILE, Recipe, parts_before, remove_tree, write_recipe
from engine.corpus.sources.chunks import find_sources
from engine.corpus.statistics import Statistics
from engine.data.shards.folders import TRAIN, VALIDATION
from engine.data.shards.index import FILE as INDEX_FILE
from engine.data.shards.index import Index, ShardEntry, token_dtype
from engine.data.shards.writer import finish_folder, start_folder, sweep, tokens_per_shard
from engine.data.tokenizer.folder import TextTokenizer
from engine.errors import DataError

_BLANK_LINES = "a text file is one document; --blank-line-ends if an empty line ends a document in it; otherwise "


def write_folders(
    options: PrepareOptions, tokenizer: TextTokenizer, parts: list[EncodedFile], work: Path, pool: Pool, progress: Show
) -> dict[str, Statistics]:
    """Decide which documents stay, and write them as shards into the working folder; return the counts of each folder.

    Raises:
        DataError: a folder would be empty, there is no room, or an encoded chunk is damaged.
        EnvironmentProblem: a worker process died.
    """
    corpus = Corpus(parts, np.dtype(token_dtype(tokenizer.vocab_size)))
    documents = corpus.documents
    counts = (documents.lengths.size, int(documents.lengths.sum()))
    # over all documents, also those that are left out below: an id that two had would name either
    refuse_repeated_ids(corpus)
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
    """Return each folder's documents (n,) bool by the folder's name, and the documents without a token that it counts,
    with their bytes that no token spells."""
    domains = list(dict.fromkeys(part.domain for part in parts))
    counts = [part.documents.lengths.size for part in parts]
    of_document = np.repeat([domains.index(part.domain) for part in parts], counts)
    found = {}
    for number, domain in enumerate(domains):
        own = [part.documents for part in parts if part.domain == domain]
        empty = (sum(int(part.empty) for part in own), sum(int(part.empty_unspelt) for part in own))
        for side in (TRAIN, VALIDATION) if options.validation_fraction else (TRAIN,):
            mine = (of_document == number) & (corpus.documents.is_validation == (side == VALIDATION))
            # documents without a token belong to no side: counted once, on the training side
            found[f"{side}/{domain}" if domain else side] = (mine, empty if side == TRAIN else (0, 0))
    return found


def _new(work: Path, name: str) -> Path:
    """Return the path of a folder of the output until all of them are whole."""
    return work / "whole" / name


def put_in_place(output: Path, work: Path, recipe: Recipe, counts: dict[str, Statistics]) -> None:
    """Move the whole output to its location: an earlier output is removed first, the recipe is written last.

    Raises `OSError`.
    """
    (output / RECIPE_FILE).unlink(missing_ok=True)
    for name in parts_before(output):
        sweep(output / name)
        # also `train` above an empty `train/DOMAIN`; a folder with files of others stays
        for folder in (output / name, (output / name).parent):
            if folder != output and not any(folder.iterdir()):
                folder.rmdir()
    for name in counts:
        target = output / name
        target.mkdir(parents=True, exist_ok=True)
        sweep(target)
        # the index last: until it is there, the folder counts as unfinished
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
    """Return the remedy where one side of the split is empty."""
    files = [source for source in find_sources(options.sources) if source.kind == "text"]
    split = "" if options.blank_line_ends or not files else _BLANK_LINES
    others = ", or name a larger fraction, or more text" if total > 1 else ", or name more text"
    return f"{split}--validation-fraction 0 holds nothing out{others}"
