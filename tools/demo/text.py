"""Text that every Python installation carries: pydoc's topics, and the standard library's source or its docstrings.

The choice depends on the interpreter alone, never on chance. Each module gives either its source or its docstrings,
so that no document repeats another's words and the held-out part stays unseen. Nothing is imported: docstrings are
read from the syntax tree.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SOURCE_BYTES = 5_000_000
"""Bytes of source; the modules that are left give docstrings."""
TOTAL_BYTES = 8_000_000
PASSED_OVER = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "__pycache__"}
"""Folders of other people's code, tests, and tables that are no text."""
SMALLEST_CHARACTERS = 200
"""Shorter documents teach nothing."""

Document = tuple[str, str]
"""Name and text."""


def collect(folder: Path) -> dict[str, int]:
    """Write `topics.jsonl`, `source.jsonl` and `docstrings.jsonl` into a folder; return the bytes of text of each."""
    folder.mkdir(parents=True, exist_ok=True)
    left = TOTAL_BYTES
    sizes = {}
    for name, documents in (("topics", topics()), *modules(Path(sysconfig.get_paths()["stdlib"]))):
        written = _write(folder / f"{name}.jsonl", documents, left)
        left -= written
        sizes[f"{name}.jsonl"] = written
    return sizes


def topics() -> list[Document]:
    """Return the topics of `help()` about the language; none where the distribution leaves them out."""
    try:
        from pydoc_data.topics import topics as found  # pyright: ignore[reportMissingImports]
    except ImportError:
        return []
    return sorted(found.items())


def modules(library: Path, source_bytes: int = SOURCE_BYTES) -> list[tuple[str, list[Document]]]:
    """Return the library's modules in an order that mixes them: the first ones as source, the others as docstrings."""
    source: list[Document] = []
    docstrings: list[Document] = []
    taken = 0
    for name, text in _shuffled(library):
        size = len(text.encode())
        if taken + size <= source_bytes:
            source.append((name, text))
            taken += size
        elif documentation := "\n\n".join(docstrings_of(text)):
            docstrings.append((name, documentation))
    return [("source", source), ("docstrings", docstrings)]


def docstrings_of(source: str) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, unchanged; none where it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text if isinstance(node, ast.Module) else f"{node.name}: {text}"


def _shuffled(library: Path) -> Iterator[Document]:
    """Yield (path inside the library, text) of every module that can be read, ordered by the hash of its path."""
    names = [path.relative_to(library) for path in library.rglob("*.py")]
    wanted = [name for name in names if not PASSED_OVER.intersection(name.parts) and "pydoc_data" not in name.parts]
    # A hash of the path mixes the modules of all packages in an order that every machine agrees on.
    for name in sorted(wanted, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        try:
            yield name.as_posix(), (library / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def _write(path: Path, documents: list[Document], most_bytes: int) -> int:
    """Write documents as JSON lines, at most so many bytes of text; return how many were written."""
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for name, text in documents:
            size = len(text.encode())
            if len(text) < SMALLEST_CHARACTERS or total + size > most_bytes:
                continue
            file.write(json.dumps({"name": name, "text": text}) + "\n")
            total += size
    return total
