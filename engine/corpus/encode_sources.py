"""Encoding of all chunks of the sources to part files, by any worker; those of an earlier attempt are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import xxhash

from engine.corpus.assemble import EncodedFile
from engine.corpus.encode import Encoded, EncodeOptions, Task, encode_to_file
from engine.corpus.encoded_chunks import load
from engine.corpus.options import PrepareOptions, Progress, Show
from engine.corpus.pool import Pool
from engine.corpus.sources.chunks import LARGEST_CHUNK, Source, TextChunk, read_chunks, shelves
from engine.corpus.spread import ChunkKey
from engine.data.tokenizer.folder import TextTokenizer
from engine.logs import logger

_log = logger(__name__)
_MEMORY_PER_BYTE = 128
"""Bytes that a tokenizer's library takes for each byte of a text in one call: measured 450 for each token, at about
3.5 bytes a token."""


def encode_sources(
    options: PrepareOptions,
    tokenizer: TextTokenizer,
    sources: list[Source],
    hashes: dict[str, str],
    work: Path,
    pool: Pool,
    progress: Show,
) -> list[EncodedFile]:
    """Encode every chunk that no earlier attempt has finished; return all of them in the order of the sources.

    Raises:
        DataError: a source cannot be read, or there is no room.
        EnvironmentProblem: a worker process died.
    """
    near = options.similarity if options.deduplicate == "near" else None
    how = EncodeOptions(options.text_key, options.validation_fraction, options.sentences, near, options.keys)
    named: list[tuple[Path, ChunkKey, str]] = []
    found: dict[int, Encoded] = {}
    tally = {"documents": 0, "tokens": 0, "kept_tokens": 0, "done": 0, "text_bytes": 0, "unspelt_bytes": 0}
    total = sum(source.num_bytes for source in sources)

    def count(encoded: Encoded, was_there: bool) -> None:
        found[encoded.file_number] = encoded
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
            # named by content: a source that has changed since the last attempt does not find its old parts
            key = xxhash.xxh3_64_hexdigest(" ".join(hashes[source.name] for source in shelf).encode())
            folder = work / f"{order:06d}-{key}"
            folder.mkdir(exist_ok=True)
            for number, chunk in enumerate(read_chunks(shelf, options.text_key, options.blank_line_ends, options.keys)):
                file_number, path = len(named), folder / f"{number:06d}.part"
                named.append((path, (order, number), shelf[0].domain))
                # a part that an earlier attempt finished; one that does not verify is encoded again
                if (part := load(path)) is not None:
                    count(Encoded(file_number, *part, chunk.read_bytes), True)
                else:
                    _tell_long_document(chunk)
                    yield Task(chunk, tokenizer.folder, tokenizer.hash, how, path, (order, number), file_number)

    # `missing` is read as workers become free: no more chunks are in memory than they need
    for encoded in pool.run(encode_to_file, missing()):
        count(encoded, False)
    encoded_files = (found[number] for number in range(len(named)))
    return [
        EncodedFile(*names, encoded.documents, encoded.bands)
        for names, encoded in zip(named, encoded_files, strict=True)
    ]


def _tell_long_document(chunk: TextChunk) -> None:
    """Log the memory that a document takes which is longer than a chunk: it is tokenized in one call.

    It cannot be cut: where a tokenizer may cut a text without changing a token depends on its model.
    """
    name, number, content = max(chunk.items, key=lambda item: len(item[2]), default=("", 0, b""))
    # an item of JSON is a whole chunk of lines, and the last of them may be as long as it likes
    num_bytes = len(content) - (LARGEST_CHUNK if chunk.kind == "json" else 0)
    if num_bytes > LARGEST_CHUNK:
        _log.warning(
            "%s:%d is a document of %.0f MiB, which is encoded whole: a worker takes about %.1f GiB of memory for it",
            name,
            number,
            num_bytes / 2**20,
            num_bytes * _MEMORY_PER_BYTE / 2**30,
        )
