"""Megatron's indexed data sets (`PREFIX.bin` and `PREFIX.idx`): read where they lie, and written.

The layout is megatron-core's IndexedDataset, version 1: `.bin` holds the tokens of all sequences, `.idx` a header
(`MMIDIDX`, two zero bytes, version uint64, dtype code uint8, number of sequences uint64, length of the document
indices uint64), then int32 lengths of the sequences, int64 places of their first bytes, int64 document indices
(sequences before each document, and all of them). All little-endian. A sequence is a document, or one sentence of it
where `preprocess_data.py --split-sentences` wrote it; documents end with the end-of-text token as our own do.
How a set becomes training data without a copy is in `engine.corpus.megatron_import`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.atomic import replacing, sweep, write_atomically
from engine.data.shards.dataset import Shard, TokenDataset
from engine.errors import DataError

HEADER = b"MMIDIDX\x00\x00"
VERSION = 1
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_CODES = {name: code for code, name in _DTYPES.items()}
_TOKENS = ("uint8", "int16", "uint16", "int32", "int64")
# magic, version, dtype code, number of sequences, length of the document indices
_HEAD = struct.Struct("<9sQBQQ")
_LARGEST_UINT16_VOCABULARY = 65499
"""Largest vocabulary that Megatron writes as uint16 (`DType.optimal_dtype`: below 65,500); above it, int32."""
_PREPROCESS = "write it again with Megatron's preprocess_data.py"

Progress = Callable[[int], None]
"""Called with the tokens of each shard that is done."""


@dataclass(frozen=True)
class Sequences:
    """An `.idx`: dtype of the tokens, `lengths` (sequences,) int32, `documents` (documents + 1,) int64: sequences
    before each document, and all of them."""

    dtype: str
    lengths: np.ndarray
    documents: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Bytes of the `.bin`."""
        return int(self.lengths.sum(dtype=np.int64)) * np.dtype(self.dtype).itemsize


def prefix_of(path: Path) -> Path:
    """Return PREFIX of a set that is named by PREFIX itself or by one of its two files."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def read_sequences(prefix: Path) -> Sequences:
    """Return the `.idx` of a set, checked against itself and against the size of the `.bin`.

    Raises:
        DataError: a file is missing, of another format or version, truncated, or contradicts itself.
    """
    path = file_of(prefix, "idx")
    content = _content(path)
    if len(content) < _HEAD.size or not content.startswith(HEADER):
        raise DataError(f"{path} is no index of Megatron's: it begins with {content[:9]!r}", repr(HEADER), _PREPROCESS)
    _, version, code, num_sequences, num_documents = _HEAD.unpack_from(content)
    if version != VERSION or _DTYPES.get(code) not in _TOKENS:
        raise DataError(
            f"{path} has version {version} and dtype code {code} ({_DTYPES.get(code, 'unknown')})",
            f"version {VERSION} and one of {', '.join(f'{_CODES[name]} ({name})' for name in _TOKENS)}",
            _PREPROCESS,
        )
    at, parts = _HEAD.size, []
    # lengths, first bytes and document indices, one array behind the other
    for dtype, count in (("<i4", num_sequences), ("<i8", num_sequences), ("<i8", num_documents)):
        end = at + count * np.dtype(dtype).itemsize
        if end > len(content):
            raise DataError(f"{path} is truncated: {len(content):,} bytes", f"{end:,} bytes or more", _PREPROCESS)
        parts.append(np.frombuffer(content, dtype, count, at))
        at = end
    sequences = Sequences(_DTYPES[code], parts[0], parts[2])
    _check(prefix, sequences, parts[1])
    return sequences


def sweep_unfinished(prefix: Path) -> None:
    """Remove what a killed `write_indexed_dataset` has left at a prefix, and nothing else. Raises `OSError`."""
    if sweep(file_of(prefix, "bin")) and not file_of(prefix, "bin").exists():
        file_of(prefix, "idx").unlink(missing_ok=True)
    sweep(file_of(prefix, "idx"))


def write_indexed_dataset(dataset: TokenDataset, prefix: Path, progress: Progress = lambda tokens: None) -> Sequences:
    """Write a data set as `PREFIX.bin` and `PREFIX.idx`: one sequence per sentence where the data set has sentences,
    otherwise per document. Each file is there whole or not at all.

    The bytes are those that megatron-core's builder writes. Raises `DataError`: a damaged shard, no room.
    """
    dtype = "uint16" if dataset.index.vocab_size <= _LARGEST_UINT16_VOCABULARY else "int32"
    lengths, counts = [], []
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        file_of(prefix, "idx").unlink(missing_ok=True)
        with replacing(file_of(prefix, "bin")) as file:
            for shard in _shards(dataset):
                file.write(shard.tokens.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
                starts = shard.documents if shard.sentences is None else shard.sentences
                lengths.append(np.diff(starts))
                # sentences from 0, 2, 5 to 7 and documents from 0, 5 to 7: searchsorted [0, 2, 3], counts [2, 1]
                counts.append(np.diff(np.searchsorted(starts, shard.documents)))
                progress(shard.tokens.size)
            sequences = Sequences(dtype, _joined(lengths), np.concatenate([[0], np.cumsum(_joined(counts))]))
            # Before the .bin takes its name: a kill between the two leaves a mark by which `sweep_unfinished` knows
            # that this .idx is ours.
            write_atomically(file_of(prefix, "idx"), _idx(sequences))
    except OSError as error:
        raise DataError(
            f"cannot write {prefix}.bin and .idx: {error.strerror or error}",
            f"a writable place with room for {dataset.index.num_tokens * np.dtype(dtype).itemsize:,} bytes",
            "make room or name another --output",
        ) from error
    return sequences


def _shards(dataset: TokenDataset) -> Iterator[Shard]:
    for number in range(dataset.num_shards):
        yield dataset.shard(number)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _idx(sequences: Sequences) -> bytes:
    lengths = sequences.lengths.astype("<i4")
    # int64 as Megatron has it: lengths (3, 2, 4) of uint16 begin at bytes 0, 6 and 10
    pointers = np.cumsum(lengths, dtype="<i8")[:-1] * np.dtype(sequences.dtype).itemsize
    pointers_of_bytes = np.concatenate([np.zeros(min(1, lengths.size), "<i8"), pointers.astype("<i8")])
    head = _HEAD.pack(HEADER, VERSION, _CODES[sequences.dtype], lengths.size, sequences.documents.size)
    return head + lengths.tobytes() + pointers_of_bytes.tobytes() + sequences.documents.astype("<i8").tobytes()


def _check(prefix: Path, sequences: Sequences, pointers: np.ndarray) -> None:
    """Raise `DataError` for a set that is not the plain concatenation of its sequences, grouped into documents."""
    path, lengths, documents = file_of(prefix, "idx"), sequences.lengths.astype(np.int64), sequences.documents
    item_bytes = np.dtype(sequences.dtype).itemsize
    # sequences may lie anywhere in Megatron's format; ranges of the file are shards only if they lie one behind the
    # other
    follow = np.array_equal(pointers, (np.cumsum(lengths) - lengths) * item_bytes)
    rise = documents.size > 0 and documents[0] == 0 and documents[-1] == lengths.size
    rise = bool(rise and np.all(np.diff(documents) >= 0))
    refuse_if(
        not follow or not rise or bool(np.any(lengths < 0)),
        f"{path} contradicts itself",
        "sequences that follow each other in the .bin, and documents that rise from 0 to their number",
        _PREPROCESS,
    )
    try:
        found = file_of(prefix, "bin").stat().st_size
    except OSError as error:
        raise unreadable(file_of(prefix, "bin"), error) from error
    if found != sequences.num_bytes:
        raise DataError(
            f"{file_of(prefix, 'bin')} has {found:,} bytes",
            f"{sequences.num_bytes:,} bytes, as {path.name} has it",
            "copy both files again from one place",
        )


def file_of(prefix: Path, suffix: str) -> Path:
    """Return the path of one of the two files of a set: `bin` or `idx`."""
    return prefix.with_name(f"{prefix.name}.{suffix}")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read: {error.strerror or error}",
        "PREFIX.bin and PREFIX.idx side by side",
        "name PREFIX, or either file",
    )


def refuse_if(condition: bool, wrong: str, allowed: str, remedy: str) -> None:
    """Raise `DataError` where the condition holds."""
    if condition:
        raise DataError(wrong, allowed, remedy)
