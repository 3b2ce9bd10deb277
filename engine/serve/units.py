"""Finished units of sampled documents, a file each, in a folder that several processes write into.

A file is named by its unit's number and its number of tokens, so that a listing of the folder tells how far all are:
`unit-00000012-8001.npz`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine.atomic import write_atomically

_NAME = re.compile(r"unit-(\d{8,})-(\d+)\.npz")


class Units:
    """The units in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def found(self) -> dict[int, int]:
        """Return the tokens of each finished unit by its number. Raises `OSError`."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return {int(name[1]): int(name[2]) for name in names if name is not None}

    def needed(self, number: int, wanted: int) -> bool:
        """Return True if the finished units before this one do not hold `wanted` tokens."""
        return sum(tokens for other, tokens in self.found().items() if other < number) < wanted

    def first_missing(self, wanted: int) -> int | None:
        """Return the first unit that is not finished; None where those before it hold `wanted` tokens."""
        found, held, number = self.found(), 0, 0
        while held < wanted:
            if number not in found:
                return number
            held += found[number]
            number += 1
        return None

    def save(self, number: int, documents: list[np.ndarray]) -> None:
        """Write a finished unit. Raises `OSError`."""
        lengths = np.array([document.size for document in documents])
        content = io.BytesIO()
        np.savez(content, tokens=np.concatenate(documents), ends=np.cumsum(lengths))
        write_atomically(self.folder / f"unit-{number:08d}-{lengths.sum()}.npz", content.getvalue())

    def documents(self, wanted: int) -> Iterator[np.ndarray]:
        """Yield the documents of the units in order, until they hold `wanted` tokens. Raises `OSError`."""
        held = 0
        for number, tokens in sorted(self.found().items()):
            with np.load(self.folder / f"unit-{number:08d}-{tokens}.npz") as file:
                for document in np.split(file["tokens"], file["ends"][:-1]):
                    if held >= wanted:
                        return
                    held += document.size
                    yield document
