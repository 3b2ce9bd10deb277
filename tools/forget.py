"""`palimpsest forget`: documents are trained on no more, from the next start of a run on; shards are not rewritten."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.data.visible import visible
from engine.errors import ConfigError, DataError
from engine.redact import redact

if TYPE_CHECKING:  # pydantic would make --help slow
    from engine.data.shards.dataset import TokenDataset
    from engine.data.shards.tombstones import Tombstones
    from engine.train.forgotten import RunOfDocuments

_SHARDS_SHOWN = 20


def main(
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="Folders or URLs of token shards, or what prepare wrote.")
    ],
    document_ids: Annotated[
        Path, typer.Option(help='File of ids: one a line, or {"id": ...}; `prepare --id-key`\'s, or SHARD_HASH:ROW.')
    ],
    run: Annotated[
        list[Path] | None, typer.Option(help="Run folder: tell its checkpoints; needed for URLs. May be repeated.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Go on where ids name no document, and list them.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
) -> None:
    """Append documents to tombstones.jsonl of the data folder: no run reads or predicts them from its next start on.

    Tells the shards and checkpoints that still hold them, and proves by reading them that loader and reservoir emit
    them no more. For data at a URL, or in a folder that cannot be written to, tombstones go into the folders of the
    runs.
    """
    from engine.data.forgetting import read_ids
    from engine.train.forgotten import RunOfDocuments

    wanted = read_ids(document_ids)
    runs = [RunOfDocuments(folder) for folder in dict.fromkeys(run or [])]
    with tempfile.TemporaryDirectory(prefix="forget-") as cache:
        sets = [found for given in dict.fromkeys(data) for found in _opened(given, Path(cache))]
        targets = {dataset.location: _targets(dataset, runs) for dataset in sets}
        found = _find(sets, wanted, allow_missing)
        everything = _append(sets, found, targets, dry_run)
        _scan_shards(sets, everything, Path(cache))
        for one in runs:
            _tell_run(one, everything)


def _opened(given: str, cache: Path) -> list[TokenDataset]:
    """Return the data sets that an argument stands for. Raises `DataError`."""
    from engine.config.paths import expand
    from engine.data.shards.dataset import TokenDataset
    from engine.data.shards.remote import is_remote
    from tools.inspect_data import open_url, parts_of, parts_of_url

    if is_remote(given):
        return [open_url(url, cache, None) for url in parts_of_url(given, cache)]
    return [TokenDataset(folder) for folder in parts_of(Path(expand(given)))]


def _targets(dataset: TokenDataset, runs: list[RunOfDocuments]) -> list[Path]:
    """Return the folders that take the tombstones of a data set. Raises `ConfigError` where there is none."""
    if not dataset.is_remote and _is_writable(dataset.folder):
        return [dataset.folder]
    if not runs:
        what = "is a URL" if dataset.is_remote else "cannot be written to"
        raise ConfigError(
            f"{dataset.location} {what}, so its tombstones have no place there",
            "--run RUN, the folder of each run that reads this data",
            "name them: tombstones.jsonl then lies in these folders",
        )
    return [one.folder for one in runs]


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK)


def _find(sets: list[TokenDataset], wanted: list[str], allow_missing: bool) -> list[Tombstones]:
    """Return the documents of each data set that the ids name. Raises `DataError` for ids that name none."""
    from engine.data.forgetting import find_documents, refuse_unknown

    pairs = [find_documents(dataset, wanted) for dataset in sets]
    matched = set().union(*(names for _, names in pairs))
    try:
        refuse_unknown(wanted, matched)
    except DataError as error:
        if not allow_missing or not matched:
            raise
        print(f"passed over: {error.wrong}")
    return [found for found, _ in pairs]


def _append(
    sets: list[TokenDataset], found: list[Tombstones], targets: dict[str, list[Path]], dry_run: bool
) -> Tombstones:
    """Write the tombstones, tell the shards that hold the documents, and return all of these."""
    from engine.data.shards.tombstones import FILE, NO_TOMBSTONES, add_tombstones, read_tombstones

    everything = NO_TOMBSTONES
    for dataset, documents in zip(sets, found, strict=True):
        everything = everything | documents
        place = visible(redact(dataset.location))
        print(f"{place}: {len(documents):,} documents in {len(documents.shards):,} shards")
        for entry in [entry for entry in dataset.index.shards if documents.of(entry.content_hash).size][:_SHARDS_SHOWN]:
            numbers = documents.of(entry.content_hash)
            print(f"  {entry.tokens.name} ({entry.content_hash}) still holds {numbers.size:,} on the disk")
        if len(documents.shards) > _SHARDS_SHOWN:
            print(f"  and {len(documents.shards) - _SHARDS_SHOWN:,} more shards")
        for folder in targets[dataset.location] if len(documents) else []:
            if dry_run:
                print(f"  {len(documents - read_tombstones(folder)):,} lines would go into {folder / FILE}")
            else:
                print(f"  {add_tombstones(folder, documents):,} new lines in {folder / FILE}")
    return everything


def _scan_shards(sets: list[TokenDataset], everything: Tombstones, cache: Path) -> None:
    """Read the documents as loaders and buffers do, and tell that nothing of them is read. Raises `DataError`."""
    from engine.data.forgetting import scan
    from engine.data.shards.dataset import TokenDataset

    for dataset in sets:
        store = dataset.cache
        now = TokenDataset(dataset.location, None, store, everything)
        if len(now.tombstones):
            read = scan(now, now)
            print(
                f"scan of {visible(redact(dataset.location))}: {read.documents:,} forgotten documents, {read.tokens:,} "
                "tokens, each read as the end of the text"
            )


def _tell_run(one: RunOfDocuments, everything: Tombstones) -> None:
    """Tell the checkpoints that were trained on the documents, and what the run's loader makes of them."""
    from engine.run_folder import current_user

    print(f"run {one.folder}:")
    if current_user(one.folder) is not None:
        print("  it is going on now, and reads them until it ends: it learns of this at its next start")
    for held in one.held(everything):
        if held.unknown:
            print(f"  {held.name}  cannot be told: {held.unknown}")
        elif len(held.documents):
            print(f"  {held.name}  was trained on {len(held.documents):,} of {len(everything):,} documents")
        else:
            print(f"  {held.name}  was trained on none of them")
    for name, documents in one.pinned(everything):
        if len(documents):
            print(f"  files/{name}  still holds {len(documents):,} of them, until the next run stage ends")
    for name, read in one.scan(everything):
        if isinstance(read, DataError):
            print(f"  scan of {name}: {read.wrong}")
        else:
            print(
                f"  scan of {name}: {read.documents:,} documents in {read.rows:,} rows, no token of which is read or "
                "predicted"
            )
