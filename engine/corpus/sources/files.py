"""Files that a path, a folder or a glob stands for, and the kind of each: JSON lines, text or Parquet.

A folder is searched for names that tell their kind; links to folders are followed. A file that is named itself, or by a
glob, may be called anything: JSON lines without a suffix (`part-00000`) are known by their first line, and what is no
text, or packed in a way that is not read here, is refused instead of being taken for a document. Invariant: paths are
sorted, and a folder that is reached twice is read once.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path

from engine.corpus.sources import text_files
from engine.data.shards.open_shards import too_many_files
from engine.errors import DataError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
"""Suffixes that a folder is searched for beside JSON lines; a file that is named itself may be called anything."""
PARQUET_SUFFIXES = (".parquet", ".pq")
UNREAD_SUFFIXES = (
    ".lz4",
    ".sz",
    ".snappy",
    ".br",
    ".lzo",
    ".z",
    ".7z",
    ".rar",
    ".zip",
    ".tar",
    ".tgz",
    ".tbz2",
    ".txz",
)
"""Suffixes of archives, and of compressions that are not read here."""
_BEGINNINGS = {
    b"\x1f\x8b": ("a gzip file", ".gz"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", ".zst"),
    b"BZh": ("a bzip2 file", ".bz2"),
    b"\xfd7zXZ\x00": ("an xz file", ".xz"),
    b"\x04\x22\x4d\x18": ("an lz4 file", ""),
    b"PK\x03\x04": ("a zip file", ""),
    b"PAR1": ("a Parquet file", ".parquet"),
    b"ARROW1": ("an Arrow file", ""),
}
"""First bytes of files that are no plain text: what they are, and the suffix by which such files are read (or none)."""
# an archive of tar begins with a file name; its magic is at byte 257 of the header
_TAR_AT, _TAR = 257, b"ustar"
_LONGEST_FIRST_LINE = 1 << 20

Found = tuple[Path, str, int]
"""A file, its kind (`json`, `text` or `parquet`), and its size in bytes."""


def find_files(name: str, given: str) -> list[Found]:
    """Return the files that a name stands for. `given` is the user's own spelling, for messages. Raises `DataError`."""
    path = Path(name)
    if path.is_dir():
        return [_described(found) for found in _in_folder(path)]
    paths = [path] if path.exists() else sorted(Path(found) for found in glob.glob(name, recursive=True))
    paths = [found for found in paths if not found.is_dir()]
    if not paths:
        raise DataError(
            f"there is no source {given}", "a file, a folder, a glob, or hf:NAME_OR_FOLDER", "check the path"
        )
    return [_described(found, named=True) for found in paths]


def matches(name: str) -> bool:
    """Return True if a name is a path that exists, or a glob of some."""
    return Path(name).exists() or bool(glob.glob(name, recursive=True))


def foreign_files(name: str) -> list[Path]:
    """Return the files of a folder that are not read, since their names tell no kind of text; none of a file."""
    return (
        [path for path in _walk(Path(name)) if not _is_wanted(path) and path.is_file()] if Path(name).is_dir() else []
    )


def _in_folder(folder: Path) -> list[Path]:
    """Return the text below a folder, sorted. Raises `DataError` where there is none, or some cannot be read."""
    found = sorted(path for path in _walk(folder) if _is_wanted(path))
    if not found:
        raise DataError(
            f"folder {folder} holds no text",
            f"files ending in {', '.join(JSON_SUFFIXES + TEXT_SUFFIXES)}, "
            f"also with {', '.join(text_files.SUFFIXES)}, or in {' or '.join(PARQUET_SUFFIXES)}",
            "name the files or a glob, or hf:FOLDER for a Hugging Face dataset",
        )
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, hidden ones left out; a folder that links reach twice is looked into once."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        # in place: os.walk goes down into what is left in this list, in its order
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise too_many_files(error) or DataError(
        f"{error.filename} cannot be read: {error.strerror or error}", "a readable folder", "check it and its rights"
    ) from error


def _is_wanted(path: Path) -> bool:
    """Return True if a file of a folder is read. Raises `DataError` for text that would be left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in UNREAD_SUFFIXES and suffixes[-2] in JSON_SUFFIXES + TEXT_SUFFIXES:
        raise _unread(path, suffixes[-1])
    wanted = _plain_suffix(path) in JSON_SUFFIXES + TEXT_SUFFIXES or _suffix(path) in PARQUET_SUFFIXES
    return wanted and (path.is_file() or _leads_nowhere(path))


def _described(path: Path, named: bool = False) -> Found:
    """Return a file, its kind and its size; a `named` one is looked into. Raises `DataError` if it is no text."""
    if _leads_nowhere(path):
        raise DataError(f"{path} is a link to {path.readlink()}, which is not there", "a file", "restore or remove it")
    try:
        if _suffix(path) in PARQUET_SUFFIXES:
            return path, "parquet", path.stat().st_size
        kind = "json" if _plain_suffix(path) in JSON_SUFFIXES else "text"
        if named:
            kind = _looked_into(path, kind)
        return path, kind, path.stat().st_size
    except OSError as error:
        if problem := too_many_files(error):
            raise problem from error
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}", "a readable file", "check it and its rights"
        ) from error


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _looked_into(path: Path, kind: str) -> str:
    """Return the kind of a file that was named itself, by its content. Raises `DataError` if it is no text."""
    if _suffix(path) in UNREAD_SUFFIXES or _plain_suffix(path) in UNREAD_SUFFIXES:
        raise _unread(path, _suffix(path))
    if not path.is_file():  # a pipe is read once
        return kind
    head = text_files.head(str(path), _LONGEST_FIRST_LINE)
    for beginning, (what, suffix) in _BEGINNINGS.items():
        if head.startswith(beginning):
            remedy = f"call it {path.name}{suffix}" if suffix else "unpack it"
            raise DataError(f"{path} is {what}", "plain text, or a name that tells what it is", remedy)
    if head[_TAR_AT:].startswith(_TAR):
        raise _unread(path, ".tar")
    known = _plain_suffix(path) in JSON_SUFFIXES + TEXT_SUFFIXES
    return "json" if not known and _is_json_line(head) else kind


def _is_json_line(head: bytes) -> bool:
    """Return True if a file begins with a line that is a JSON object."""
    line, end, _ = head.lstrip().partition(b"\n")
    if not line.startswith(b"{"):
        return False
    # a first line that was cut off cannot be parsed
    if not end and len(head) == _LONGEST_FIRST_LINE:
        return line.startswith(b'{"')  # too long to be read whole
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _unread(path: Path, suffix: str) -> DataError:
    return DataError(
        f"{path} is packed in a way that is not read here ({suffix})",
        f"plain text, or a file that ends in {', '.join(text_files.SUFFIXES)}",
        "unpack it, or pack it with gzip, zstd, bzip2 or xz",
    )


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _plain_suffix(path: Path) -> str:
    """Return the suffix before that of a compression: `.jsonl` of `a.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in text_files.SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
