"""Text that the encoder is pretrained on: the corpus by kind, and the texts of the training rows without their labels.

The second is task-adaptive pretraining (Gururangan et al. 2020, arXiv 2004.10964). Documents of the corpus that hold a
text of a test half are left out: half of the Chinese hotel reviews of ChnSentiCorp are in it. Test texts of fewer than
40 letters are not looked for, and training rows stay as they are: 120 of WikiGold and 3 of SST-2 equal a test text, and
every side trains on them.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.finetune.sets import SETS, Row
from engine.errors import DataError

CORPUS = ("corpus/en_prose.jsonl.gz", "corpus/zh.jsonl.gz")
"""Files below the data folder, of documents with the name of their source."""
WINDOW = 40
"""Characters of a test text, but for blanks and punctuation, by which a document counts as holding it."""


@dataclass(frozen=True)
class Domain:
    """A kind of text and its share of the tokens."""

    name: str
    weight: float
    sources: str | None = None
    """Pattern of the names of sources in the corpus. None: the texts of the task set of the same name."""


DOMAINS = (
    Domain("reviews", 0.15, "movie_reviews"),
    Domain("dictionary", 0.03, "gcide"),
    Domain("prose", 0.20, "brown|abc|webtext|inaugural|state_union|wikitext2-valid"),
    Domain("shopping", 0.14, "online_shopping_.*"),
    Domain("chinese", 0.06, "libreoffice-help-zh|manpages-zh|debian-reference-zh|poetry"),
    Domain("sst2", 0.08),
    Domain("ag_news", 0.12),
    Domain("chnsenticorp", 0.14),
    Domain("wikigold", 0.03),
    Domain("wnut17", 0.05),
)
"""Weights favour text like that of the tasks over the dictionary, which is most of the corpus."""


def write_texts(data: Path, folder: Path) -> None:
    """Write a file of JSON lines for each domain into `folder`. Raises `DataError` where a file cannot be read."""
    folder.mkdir(parents=True, exist_ok=True)
    tested = {window for task in SETS for row in task.rows(data)[1] for window in _first_window(text_of(row))}
    files = {domain.name: (folder / f"{domain.name}.jsonl").open("w", encoding="utf-8") for domain in DOMAINS}
    try:
        for source, text in _corpus(data):
            for domain in DOMAINS:
                is_kind = domain.sources is not None and re.fullmatch(domain.sources, source)
                if is_kind and tested.isdisjoint(_windows(text)):
                    _write(files[domain.name], text)
        by_name = {task.name: task for task in SETS}
        for domain in DOMAINS:
            for row in () if domain.sources else by_name[domain.name].rows(data)[0]:
                _write(files[domain.name], text_of(row))
    finally:
        for file in files.values():
            file.close()


def text_of(row: Row) -> str:
    """Return the text of a row: its words are joined by blanks."""
    return row["context"] if "context" in row else row["text"] if "text" in row else " ".join(row["tokens"])


def _corpus(data: Path) -> Iterator[tuple[str, str]]:
    for name in CORPUS:
        try:
            with gzip.open(data / name, "rt", encoding="utf-8") as file:
                for line in file:
                    document = json.loads(line)
                    yield document["source"], document["text"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{data / name} cannot be read: {error!r}", "a data folder with tasks/ and corpus/", "name it by --data"
            ) from error


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text.lower())


def _first_window(text: str) -> list[str]:
    """Return the first characters of a test text; none of one that is too short to tell."""
    letters = _letters(text)
    return [letters[:WINDOW]] if len(letters) >= WINDOW else []


def _windows(text: str) -> Iterator[str]:
    letters = _letters(text)
    return (letters[start : start + WINDOW] for start in range(len(letters) - WINDOW + 1))


def _write(file: Any, text: str) -> None:
    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
