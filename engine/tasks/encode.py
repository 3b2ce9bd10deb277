"""Examples as token shards: the rows that the model sees, with their numbers beside them.

A folder is named by a hash of all that its content follows from: it is written once, whole, and found again by the next
start.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.schema.objective import ObjectiveConfig
from engine.data.shards.index import FILE
from engine.data.shards.writer import ShardWriter
from engine.data.tokenizer.folder import TextTokenizer
from engine.errors import DataError, EnvironmentProblem
from engine.serve.new_folder import new_folder
from engine.tasks.framing import Framing
from engine.tasks.kind import EncodedRow, Kind

VERSION = 2
"""Raised when examples are encoded otherwise."""
EXAMPLES = "examples"
"""Folder of encoded examples in the run folder."""
LOCK = ".writing"
"""File that the process which writes the folder holds a lock on."""
NOTES = "notes.jsonl"
"""File beside the shards with the notes of the rows, a line for each; not there where rows have none."""


def longest(rows: Iterable[EncodedRow]) -> tuple[int, int]:
    """Return the largest numbers of tokens: of a row, and of the decoder's row in T5 (else 0)."""
    sizes = np.array([(row.ids.size - row.num_decoder_tokens, row.num_decoder_tokens) for row in rows])
    tokens, decoder = sizes.max(axis=0).tolist()
    return tokens, decoder


def encoded_folder(
    kind: Kind[Any], examples: Any, objective: ObjectiveConfig, framing: Framing, length: int, folder: Path, part: str
) -> Path:
    """Return the folder of the encoded examples in `folder`, written if it is not there.

    Several processes may call it at the same time: one writes, and the others wait for it.

    Raises:
        DataError: an example cannot be encoded.
        EnvironmentProblem: the folder cannot be written.
    """
    facts = {
        "version": VERSION,
        "frame": framing.frame,
        "length": length,
        "objective": objective.model_dump(mode="json"),
        "examples": {key: value for key, value in asdict(examples).items() if key != "location"},
    }
    name = f"{part}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"

    def write(partial: Path) -> None:
        _write(partial, framing.tokenizer, kind.encode(examples, objective, framing, length))

    return written_once(folder, name, write)


def written_once(folder: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Return the folder of token shards `name` in `folder`, whose files `write` writes if it is not there; several
    processes may call it at the same time.

    Raises:
        EnvironmentProblem: the folder cannot be written.
    """
    output = folder / name
    if (output / FILE).is_file():
        return output
    with alone_in(folder):
        if not (output / FILE).is_file():  # else another process was first, with the same content
            for left in folder.glob(".*.partial"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with new_folder(output) as partial:
                write(partial)
    return output


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder and wait until no other process writes there in this way: the ranks of a start all prepare it.

    Raises:
        EnvironmentProblem: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A file that can be written: file systems over a network lock no others. Its lock ends with its holder.
        lock = (folder / LOCK).open("ab")
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder} cannot be written: {error.strerror or error}",
            "a folder that can be written, on a disk with room",
            "make room, or change `folder`",
        ) from error
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks: then each writes over the other's
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(folder: Path, tokenizer: TextTokenizer, rows: Iterable[EncodedRow]) -> None:
    shape = (folder, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.hash)
    notes = []
    with ShardWriter(*shape, vocabulary=tokenizer.vocabulary) as writer:
        for row in rows:
            writer.add(row.ids, row.parts, row.columns)
            if row.note is not None:
                notes.append(json.dumps(row.note, ensure_ascii=False))
    if notes:
        (folder / NOTES).write_text("".join(f"{line}\n" for line in notes), encoding="utf-8")


def notes(folder: Path) -> list[dict[str, Any]]:
    """Return the notes of a folder of encoded examples, one for each row.

    Raises:
        DataError: there are none, or they are damaged.
    """
    path = folder / NOTES
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            "the notes that `palimpsest finetune` wrote beside the encoded examples",
            "remove the folder of the examples and start again: it is written anew",
        ) from error
