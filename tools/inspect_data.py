"""`palimpsest inspect-data`: verifies token shards and shows their counts and some samples as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from engine.data.dataset import TokenDataset
from engine.data.index import FILE as INDEX_FILE
from engine.data.packing import Row
from engine.data.prepare import PARTS, RECIPE_FILE
from engine.data.samples import first_samples
from engine.data.tokenizer import TextTokenizer, load_tokenizer
from engine.errors import DataError

BOUNDARY = "──── next document ────"


def main(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of shards, or what prepare wrote.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer (default: the one that prepare noted).")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Samples to show of each part.")] = 2,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order that the samples are the first of.")] = 0,
) -> None:
    """Verify every hash, then show counts and the first samples that a run with this seed would see."""
    loaded = _tokenizer(folder, tokenizer)
    for part in parts_of(folder):
        dataset = TokenDataset(part, loaded.hash if loaded else None)
        _verify(dataset)
        print_counts(dataset)
        for place, row in first_samples(dataset, sequence_length, seed, samples):
            _print_sample(f"{part.name} {place}", row, loaded)


def parts_of(folder: Path) -> list[Path]:
    """The folders of shards that a folder stands for: itself, or the parts that prepare wrote into it.

    Raises:
        DataError: a part that the recipe speaks of is not there.
    """
    for name in _noted_parts(folder):
        if not (folder / name / INDEX_FILE).exists():
            raise DataError(
                f"{folder / name} has no {INDEX_FILE}, but {folder / RECIPE_FILE} says that it was written",
                "every part that was prepared",
                "prepare again with --overwrite, or restore the folder",
            )
    parts = [folder / name for name in PARTS if (folder / name / INDEX_FILE).exists()]
    return [folder] if (folder / INDEX_FILE).exists() or not parts else parts


def _noted_parts(folder: Path) -> list[str]:
    """The parts that the folder's recipe reports on; none where there is no recipe that can be read."""
    try:
        report = json.loads((folder / RECIPE_FILE).read_bytes())["report"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in PARTS if name in report]


def _tokenizer(folder: Path, named: Path | None) -> TextTokenizer | None:
    """The named tokenizer, else the one in the recipe if it is still there, else None."""
    if named is not None:
        return load_tokenizer(named)
    for recipe in (folder / RECIPE_FILE, folder.parent / RECIPE_FILE):
        try:
            noted = json.loads(recipe.read_bytes())["recipe"]
            loaded = load_tokenizer(noted["tokenizer"])
        except (OSError, ValueError, KeyError, TypeError, DataError):
            continue
        if loaded.hash == noted.get("tokenizer_hash"):
            return loaded
    return None


def _verify(dataset: TokenDataset) -> None:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"verifying {dataset.folder}", total=dataset.index.num_bytes)
        dataset.verify(lambda num_bytes: progress.advance(task, num_bytes))


def print_counts(dataset: TokenDataset) -> None:
    """Counts of a data set whose shards have been verified."""
    index = dataset.index
    table = Table(title=str(dataset.folder), title_justify="left", show_header=False)
    table.add_row("documents", f"{index.num_documents:,}")
    table.add_row("tokens", f"{index.num_tokens:,} ({index.dtype}, vocabulary {index.vocab_size:,})")
    table.add_row("shards", f"{dataset.num_shards:,}, {index.num_bytes:,} bytes")
    table.add_row("hashes", f"{2 * dataset.num_shards:,} files verified (xxh3)")
    table.add_row("tokenizer", index.tokenizer_hash)
    table.add_row("fingerprint", index.fingerprint)
    Console().print(table)


def _print_sample(title: str, row: Row, tokenizer: TextTokenizer | None) -> None:
    body = f"\n{BOUNDARY}\n".join(_shown(ids, tokenizer) for ids in row.documents())
    Console().print(Panel(Text(body), title=title, title_align="left"))


def _shown(ids: np.ndarray, tokenizer: TextTokenizer | None) -> str:
    return tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids.tolist()))
