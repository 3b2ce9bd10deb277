"""Texts of the experiments, written as token shards: prose or another corpus first, Python source behind it.

Both domains are about `TEXT_BYTES` large. The standard library's modules give either their docstrings or their source;
beside docstrings it is without them and without comments: a model forgets no prose that the new domain repeats.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.corpus.tokenizer_training import SMALLEST_VOCABULARY, Purpose, train_tokenizer
from engine.errors import DataError
from tools.demo.text import modules, topics

OLD, NEW = "old", "new"
TEXT_BYTES = 1_100_000
DOCUMENT_CHARACTERS = 8_000
"""Longer documents are cut there: a domain of few long ones would have hardly any that differ to be held out."""
HELD_OUT = 0.1
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
"""Nodes of a syntax tree that may begin with a docstring."""


def standard_library(num_bytes: int, with_comments: bool = False) -> tuple[list[str], list[str]]:
    """Return (prose, source): help topics and docstrings of the standard library, and the source of other modules, as
    it is or without docstrings and comments."""
    library = Path(sysconfig.get_paths()["stdlib"])
    # more than will be used: most modules are cut, and comments go
    (_, source), (_, docstrings) = modules(library, (3 if with_comments else 4) * num_bytes)
    prose = topics() + docstrings
    licence = library / "LICENSE.txt"
    if licence.is_file():
        prose.append((licence.name, licence.read_text(encoding="utf-8")))
    prose.sort(key=lambda document: hashlib.sha256(document[0].encode()).digest())  # mixed, equally on every machine
    code = (text if with_comments else code_of(text) for _, text in source)
    return _cut((text for _, text in prose), num_bytes), _cut(code, num_bytes)


def code_of(source: str) -> str:
    """Return a module's code without docstrings and comments; nothing where it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
            node.body = node.body or [ast.Pass()]
    return ast.unparse(ast.fix_missing_locations(tree))


def read_texts(path: Path, num_bytes: int) -> list[str]:
    """Return the first documents of a file of JSON lines with the key `text`, which may be packed by gzip.

    Raises:
        DataError: the file is missing, or is something else.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            return _cut((json.loads(line)["text"] for line in file), num_bytes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "JSON lines with the key `text`, or such a file packed by gzip"
        ) from error


def _cut(texts: Iterable[str], num_bytes: int) -> list[str]:
    return list(_first(texts, num_bytes))


def _first(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
    """Yield the beginnings of documents, until they have so many bytes together."""
    left = num_bytes
    for text in texts:
        if left <= 0:
            return
        text = text[:DOCUMENT_CHARACTERS]
        left -= len(text.encode())
        yield text


def write(folder: Path, texts: dict[str, list[str]], purpose: Purpose) -> dict[str, int]:
    """Write a tokenizer of bytes, and each domain as `train` and `validation`; return the tokens of each domain's
    training half."""
    # The smallest vocabulary: bytes and special tokens (and one pair of bytes), so every text is spelt alike.
    smallest = SMALLEST_VOCABULARY["bpe"]
    train_tokenizer(texts[OLD], folder / "tokenizer", "bpe", smallest + (3 if purpose == "masked" else 0), purpose)
    found = {}
    for name, documents in texts.items():
        source = folder / f"{name}.jsonl"
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        source.write_text("".join(lines), encoding="utf-8")
        options = PrepareOptions((str(source),), folder / "tokenizer", folder / name, validation_fraction=HELD_OUT)
        found[name] = prepare(options).parts["train"].tokens
    return found
