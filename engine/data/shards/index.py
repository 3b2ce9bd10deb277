"""`index.json` of a folder of token shards: what is there, how long, of which type, and with which hash.

A shard is a set of named flat arrays: `tokens`, `documents` (offsets of the documents' first tokens, then the number
of tokens) and, where asked for, `sentences` (the same of sentences, in which those of the documents appear again),
`ids` (the documents' own, which training does not read) and named `columns`, one number for each document or token.
Each array is a file of its own, plain or compressed; the tokens may also be a range of bytes of a foreign file that
lies elsewhere (`tokens_folder`). A later version may add arrays to the table: this reader ignores names that it does
not know, and the version of a folder is the lowest whose readers understand it: 1, or 2 where something is compressed
or lies elsewhere.
Invariant: the index is written last, in one move, so a folder with an index is complete. Reading the arrays is the
business of `engine.data.shards.arrays`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from engine.atomic import write_atomically
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import DataError

FILE = "index.json"
FORMAT = "palimpsest token shards"
VERSIONS = (1, 2)
TOKEN_DTYPES = ("uint16", "uint32")
FOREIGN_DTYPES = ("uint8", "int16", "uint16", "int32", "int64")
"""Types in which tokens of other formats may be written."""
OFFSET_DTYPE = "uint64"
ID_DTYPE = "uint8"
COLUMN_DTYPES = ("int64", "float64")
COMPRESSION: Literal["zstd"] = "zstd"
ITEM_BYTES = {
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}
_COLUMN_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
PREPARE_AGAIN = "write the folder again with `palimpsest prepare --overwrite`, or restore it from a copy"


# keys that are left out where they hold their default: a plain array is written as version 1 wrote it
_UNUSUAL = ("compressed", "offset", "is_stretch")


@dataclass(frozen=True)
class Compressed:
    """A file as it lies there, where that is not the array itself: its size and XXH3-128."""

    method: Literal["zstd"]
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class ArrayFile:
    """One flat little-endian array; `bytes` and `xxh3` (XXH3-128, in hex) are those of the array itself."""

    file: str
    dtype: str
    length: int
    bytes: int
    xxh3: str
    compressed: Compressed | None = None
    """None where the file holds the array as it is."""
    offset: int = 0
    """Byte of the file at which the array begins."""
    is_stretch: bool = False
    """The file is foreign and may go on behind the array."""

    @property
    def name(self) -> str:
        """Name for messages: the file, and the byte at which a range of it begins."""
        return f"{self.file}@{self.offset}" if self.is_stretch else self.file

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk."""
        return self.bytes if self.compressed is None else self.compressed.bytes

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, without the keys that hold their default."""
        tree = asdict(self)
        return {key: value for key, value in tree.items() if value or key not in _UNUSUAL}


@dataclass(frozen=True)
class ShardEntry:
    """The arrays of one shard; `documents` holds one offset more than there are documents."""

    tokens: ArrayFile
    documents: ArrayFile
    sentences: ArrayFile | None = None
    ids: ArrayFile | None = None
    columns: tuple[tuple[str, ArrayFile], ...] = ()
    """Numbers of the documents or of their tokens, one for each, by the name of the column."""

    def to_json(self) -> dict[str, Any]:
        names = {"tokens": self.tokens, "documents": self.documents, "sentences": self.sentences}
        tree = {name: None if array is None else array.to_json() for name, array in names.items()}
        # no key where there are none, as in folders from before there were any
        tree |= {} if self.ids is None else {"ids": self.ids.to_json()}
        return tree | ({"columns": {name: array.to_json() for name, array in self.columns}} if self.columns else {})

    @property
    def arrays(self) -> tuple[ArrayFile, ...]:
        """The files that training reads."""
        return (self.tokens, self.documents) + (() if self.sentences is None else (self.sentences,))

    @property
    def files(self) -> tuple[ArrayFile, ...]:
        """Every file of the shard."""
        return self.arrays + (() if self.ids is None else (self.ids,)) + tuple(array for _, array in self.columns)

    @property
    def num_tokens(self) -> int:
        return self.tokens.length

    @property
    def num_documents(self) -> int:
        return self.documents.length - 1

    @cached_property
    def content_hash(self) -> str:
        """Hash of the shard's tokens and of the bounds of its documents, as 32 hex digits: its name in a reservoir and
        in document ids, equal for every copy wherever it lies and however it is compressed."""
        # sentences and other arrays move no document, so a shard that gains one keeps its name
        return hashlib.sha256(f"{self.tokens.xxh3} {self.documents.xxh3}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Synthetic:
    """Origin of token shards that a model has sampled: the run, its step, and how tokens were drawn."""

    run: str
    step: int
    seed: int
    temperature: float

    def __str__(self) -> str:
        return f"sampled from step {self.step} of {self.run} (seed {self.seed}, temperature {self.temperature:g})"


@dataclass(frozen=True)
class Index:
    """Everything that is known of a folder of shards without opening one."""

    vocab_size: int
    eos_id: int
    tokenizer_hash: str
    shards: tuple[ShardEntry, ...]
    vocabulary: Vocabulary | None = None
    """None in folders that were written before it was recorded."""
    tokens_folder: str | None = None
    """Folder of the files of tokens, seen from the index's, where they are foreign and lie elsewhere."""
    synthetic: Synthetic | None = None
    """Model that has sampled the tokens; None where people's text was prepared. It does not enter the fingerprint."""

    @property
    def version(self) -> int:
        """Lowest version of a reader that understands the folder."""
        is_plain = all(array.compressed is None for shard in self.shards for array in shard.arrays)
        return 1 if is_plain and self.tokens_folder is None else 2

    @property
    def has_sentences(self) -> bool:
        return all(shard.sentences is not None for shard in self.shards)

    @property
    def num_sentences(self) -> int:
        return sum(shard.sentences.length - 1 for shard in self.shards if shard.sentences is not None)

    @property
    def dtype(self) -> str:
        """Type in which tokens are written."""
        return self.shards[0].tokens.dtype if self.shards else token_dtype(self.vocab_size)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def has_ids(self) -> bool:
        """True if every document has an id of its own."""
        return all(shard.ids is not None for shard in self.shards)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that every shard has."""
        named = [{name for name, _ in shard.columns} for shard in self.shards]
        return tuple(sorted(set[str]().union(*named).intersection(*named)))

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays as they are used."""
        return sum(array.bytes for shard in self.shards for array in shard.files)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all arrays as they lie there."""
        return sum(array.stored_bytes for shard in self.shards for array in shard.files)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tokenizer and of the shards' contents in their order, as 32 hex digits.

        Columns enter it, since labels and weights are among them; ids and arrays of later versions do not.
        """
        content = [
            [
                shard.tokens.length,
                *(array.xxh3 for array in shard.arrays),
                *([name, array.xxh3] for name, array in shard.columns),
            ]
            for shard in self.shards
        ]
        whole = [self.tokenizer_hash, self.eos_id, self.vocab_size, content]
        # folders from before vocabularies were recorded keep the fingerprint that they were written with
        if self.vocabulary is not None:
            whole.append(self.vocabulary.to_json())
        text = json.dumps(whole, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def token_dtype(vocab_size: int) -> str:
    """Return the narrowest type that holds every token id."""
    # ids run from 0 to vocab_size - 1, so that 2**16 tokens still fit
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_index(folder: Path, index: Index) -> None:
    """Put the index in place in one move, after everything it names is on disk. Raises `OSError`."""
    tree = {
        "format": FORMAT,
        "version": index.version,
        "fingerprint": index.fingerprint,
        "tokenizer_hash": index.tokenizer_hash,
        "vocab_size": index.vocab_size,
        "eos_id": index.eos_id,
        "tokens": index.num_tokens,
        "documents": index.num_documents,
        "vocabulary": None if index.vocabulary is None else index.vocabulary.to_json(),
        **({} if index.tokens_folder is None else {"tokens_folder": index.tokens_folder}),
        **({} if index.synthetic is None else {"synthetic": asdict(index.synthetic)}),
        "shards": [shard.to_json() for shard in index.shards],
    }
    write_atomically(folder / FILE, json.dumps(tree, indent=1) + "\n")


def read_index(folder: Path) -> Index:
    """Return the index of a folder of shards, checked against itself.

    Raises:
        DataError: no folder, no index, an index of another format or version, or one that contradicts itself.
    """
    return _checked(_read_tree(folder, folder / FILE), folder / FILE)


def parse_index(content: bytes, place: str) -> Index:
    """Return the index in a file's content; `place` names it in errors. Raises `DataError` as `read_index`."""
    return _checked(_load(content, place), place)


def _checked(tree: dict[str, Any], path: Path | str) -> Index:
    if tree.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {tree.get('format')!r}", repr(FORMAT), "name a folder that `palimpsest prepare` wrote"
        )
    if tree.get("version") not in VERSIONS:
        raise DataError(
            f"{path} has version {tree.get('version')!r}",
            f"version {' or '.join(map(str, VERSIONS))}",
            f"update palimpsest, or {PREPARE_AGAIN}",
        )
    with _damage(path):
        return _parse(tree)


def _read_tree(folder: Path, path: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DataError(
            f"no folder of token shards at {folder}",
            "a folder that `palimpsest prepare` wrote, or its URL (s3://..., https://...)",
            # Path turns "s3://bucket" into "s3:/bucket"
            "check the path" + ("; a URL has two slashes behind its colon" if ":/" in str(folder) else ""),
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        parts = sorted(part.parent.name for part in folder.glob(f"*/{FILE}"))
        hint = f"name one of its folders: {', '.join(parts)}" if parts else f"finish or {PREPARE_AGAIN}"
        raise DataError(f"{folder} holds no {FILE}", "a folder that `palimpsest prepare` finished", hint) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", remedy="check the path and its rights") from error
    return _load(content, path)


def _load(content: bytes, path: Path | str) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is damaged: no JSON ({error})", "the file as written", PREPARE_AGAIN) from error
    # anything but an object has no format, which `_checked` reports
    return tree if isinstance(tree, dict) else {}


@contextmanager
def _damage(path: Path | str) -> Iterator[None]:
    """Turn errors of parsing into one about the file."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{path} is damaged: {error} is missing", "the file as written", PREPARE_AGAIN) from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}", "the file as written", PREPARE_AGAIN) from error


def _parse(tree: dict[str, Any]) -> Index:
    """Return the index in a tree. Raises `KeyError`, `TypeError` or `ValueError` where it contradicts itself."""
    foreign = tree.get("tokens_folder")
    index = Index(
        vocab_size=_whole(tree["vocab_size"], "vocab_size"),
        eos_id=_whole(tree["eos_id"], "eos_id"),
        tokenizer_hash=str(tree["tokenizer_hash"]),
        shards=tuple(_shard(number, item, foreign is not None) for number, item in enumerate(tree["shards"])),
        vocabulary=_vocabulary(tree),
        tokens_folder=None if foreign is None else str(foreign),
        synthetic=None if tree.get("synthetic") is None else Synthetic(**tree["synthetic"]),
    )
    if not 0 <= index.eos_id < index.vocab_size:
        raise ValueError(f"eos_id {index.eos_id} is no token of a vocabulary of {index.vocab_size}")
    for number, shard in enumerate(index.shards):
        if foreign is None and shard.tokens.dtype != (written := token_dtype(index.vocab_size)):
            raise ValueError(
                f"shards.{number} has dtype {shard.tokens.dtype}, but a vocabulary of {index.vocab_size} is written "
                f"as {written}"
            )
    for key, found in (("tokens", index.num_tokens), ("documents", index.num_documents)):
        if tree[key] != found:
            raise ValueError(f"{key} is {tree[key]}, but the shards' {key} add up to {found}")
    if tree["fingerprint"] != index.fingerprint:
        raise ValueError(f"fingerprint is {tree['fingerprint']}, but the contents give {index.fingerprint}")
    return index


def _vocabulary(tree: dict[str, Any]) -> Vocabulary | None:
    found = tree.get("vocabulary")
    return None if found is None else Vocabulary.from_json(found, tree["vocab_size"])


def _shard(number: int, item: dict[str, Any], is_foreign: bool) -> ShardEntry:
    where = f"shards.{number}"
    tokens = _array(item["tokens"], f"{where}.tokens", FOREIGN_DTYPES if is_foreign else TOKEN_DTYPES)
    documents = _array(item["documents"], f"{where}.documents", (OFFSET_DTYPE,))
    if documents.length < 1:
        raise ValueError(f"{where}.documents is empty")
    ids = None if item.get("ids") is None else _array(item["ids"], f"{where}.ids", (ID_DTYPE,))
    columns = _columns(item.get("columns", {}), f"{where}.columns", documents.length - 1, tokens.length)
    if item.get("sentences") is None:
        return ShardEntry(tokens, documents, ids=ids, columns=columns)
    sentences = _array(item["sentences"], f"{where}.sentences", (OFFSET_DTYPE,))
    if sentences.length < documents.length:
        raise ValueError(f"{where}.sentences has {sentences.length} offsets for {documents.length} of documents")
    return ShardEntry(tokens, documents, sentences, ids, columns)


def _columns(
    items: dict[str, Any], where: str, num_documents: int, num_tokens: int
) -> tuple[tuple[str, ArrayFile], ...]:
    found = []
    for name, item in items.items():
        require_column_name(name)
        array = _array(item, f"{where}.{name}", COLUMN_DTYPES)
        if array.length not in (num_documents, num_tokens):
            raise ValueError(
                f"{where}.{name} has {array.length} numbers for {num_documents} documents of {num_tokens} tokens"
            )
        found.append((name, array))
    return tuple(found)


def require_column_name(name: str) -> None:
    """Raise `ValueError` for a name that no column can have: it is part of a file's name."""
    if not _COLUMN_NAME.fullmatch(name):
        raise ValueError(f"a column is named {name!r}, expected up to 32 of a-z, 0-9 and _, the first one a letter")


def _array(item: dict[str, Any], where: str, dtypes: tuple[str, ...]) -> ArrayFile:
    array = ArrayFile(
        file=str(item["file"]),
        dtype=str(item["dtype"]),
        length=_whole(item["length"], f"{where}.length"),
        bytes=_whole(item["bytes"], f"{where}.bytes"),
        xxh3=str(item["xxh3"]),
        compressed=_compressed(item.get("compressed"), f"{where}.compressed"),
        offset=_whole(item.get("offset", 0), f"{where}.offset"),
        is_stretch=bool(item.get("is_stretch", False)),
    )
    if array.dtype not in dtypes:
        raise ValueError(f"{where}.dtype is {array.dtype!r}, expected {' or '.join(dtypes)}")
    if array.bytes != array.length * ITEM_BYTES[array.dtype]:
        raise ValueError(f"{where} has {array.bytes} bytes for {array.length} items of {array.dtype}")
    # an index from elsewhere must not lead out of its folder
    if Path(array.file).name != array.file:
        raise ValueError(f"{where}.file {array.file!r} is no plain file name")
    return array


def _compressed(item: dict[str, Any] | None, where: str) -> Compressed | None:
    if item is None:
        return None
    if item["method"] != COMPRESSION:
        raise ValueError(f"{where}.method is {item['method']!r}, expected {COMPRESSION}")
    return Compressed(COMPRESSION, _whole(item["bytes"], f"{where}.bytes"), str(item["xxh3"]))


def _whole(value: Any, where: str) -> int:
    # not isinstance: JSON's true and false are instances of int
    if type(value) is not int or value < 0:
        raise ValueError(f"{where} is {value!r}, expected a whole number")
    return value
