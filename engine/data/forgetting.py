"""Forgetting of documents: their places by id, the samples that held them, and a proof that no reader emits them.

Invariant of the proof (`scan`): what stands at a forgotten document is the end of the text, and what a row predicts
does not depend on it: a row is made twice, once with another token in that place, and must have equal targets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.data.objectives.sampling import Sampler
from engine.data.order.sample_order import SampleId, SampleOrder
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.tombstones import Tombstones
from engine.data.source import Source
from engine.data.visible import visible
from engine.errors import DataError

_DEFAULT_ID = re.compile(r"([0-9a-f]{32}):(\d{1,18})")
_ROWS_AT_ONCE = 256
_SHOWN = 20


def read_ids(path: Path) -> list[str]:
    """Return the ids in a file, each once: one a line, as it is, as a JSON string, or `{"id": ...}`.

    Raises:
        DataError: the file cannot be read, is no text, or names no id.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}", "a readable file of ids", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8: {error.reason} at byte {error.start}", "ids as text, one a line", "convert the file"
        ) from error
    found = [_id_in(line.rstrip("\r"), f"{path}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not found:
        raise DataError(f"{path} names no id", "an id a line", "write the ids of the documents into it")
    return list(dict.fromkeys(found))


def _id_in(line: str, where: str) -> str:
    if line[0] not in '{"':
        return line
    try:
        found = json.loads(line)
        value = found["id"] if isinstance(found, dict) else found
        if value is None or not isinstance(value, str | int | float):
            raise ValueError("the id is no text or number")
    except (ValueError, KeyError, RecursionError) as error:
        reason = "it has no key 'id'" if isinstance(error, KeyError) else error
        raise DataError(
            f"{where} names no id: {reason}",
            'an id as it is, as a JSON string, or {"id": ...}',
            "mend the line; an id that begins with { or a quotation mark is written as a JSON string",
        ) from error
    return value if isinstance(value, str) else json.dumps(value)


def find_documents(dataset: TokenDataset, wanted: Iterable[str]) -> tuple[Tombstones, set[str]]:
    """Return the documents of a data set that have one of the ids, and the ids that name one there.

    `SHARD_HASH:ROW` names a document also where it has an id of its own. Reads ids alone, no token. Raises `DataError`:
    damaged ids.
    """
    own = set(wanted)
    by_shard: dict[str, dict[int, str]] = {}
    for name in own:
        if found := _DEFAULT_ID.fullmatch(name):
            by_shard.setdefault(found[1], {})[int(found[2])] = name
    documents: dict[str, list[int]] = {}
    matched: set[str] = set()
    for number, entry in enumerate(dataset.index.shards):
        named = by_shard.get(entry.content_hash, {})
        hits = {row: name for row, name in named.items() if row < entry.num_documents}
        if entry.ids is not None:
            hits |= {row: name for row, name in enumerate(dataset.ids(number)) if name in own}
            dataset.release()
        matched |= set(hits.values()) | {name for row, name in named.items() if row < entry.num_documents}
        documents.setdefault(entry.content_hash, []).extend(hits)
    return Tombstones(documents), matched


def refuse_unknown(wanted: Sequence[str], matched: set[str]) -> None:
    """Raise `DataError` where ids name no document."""
    unknown = [name for name in wanted if name not in matched]
    if unknown:
        shown = ", ".join(visible(name) for name in unknown[:_SHOWN])
        raise DataError(
            f"{len(unknown):,} of {len(wanted):,} ids name no document of this data: {shown}"
            + (f" and {len(unknown) - _SHOWN:,} more" if len(unknown) > _SHOWN else ""),
            "ids that `prepare --id-key` kept, or SHARD_HASH:ROW as `palimpsest inspect-data` prints",
            "check the ids and the data folders; nothing is forgotten yet; --allow-missing goes on without them",
        )


def trained_on(source: Source, address: SampleId, number: int, documents: np.ndarray) -> np.ndarray:
    """Return True for documents (n,) of a shard of which a sample came before an address, (n,) bool.

    Samples that a rollback left out count as trained on.
    """
    order = source.order
    assert isinstance(order, SampleOrder)
    rows = _rows_before(order, address, number)
    found = [source.sampler.rows_of(number, documents[i : i + 1], 0) for i in range(documents.size)]
    return np.array([mine.size > 0 if rows is None else np.isin(mine, rows).any() for mine in found], bool)


def _rows_before(order: SampleOrder, address: SampleId, number: int) -> np.ndarray | None:
    """Return the rows of a shard that came before an address; None: all of them."""
    if address.epoch > 0:  # with pairs, too, each epoch has a sample of every segment
        return None
    for window in range(address.window):
        if number in order.shards(0, window):
            return None
    if number not in order.shards(0, address.window):
        return np.empty(0, np.int64)
    slots = np.arange(address.slot)
    addresses_N3 = np.stack([np.zeros_like(slots), np.full_like(slots, address.window), slots], axis=1)
    shard_rows_N2 = order.shard_rows_at(addresses_N3)
    return shard_rows_N2[shard_rows_N2[:, 0] == number, 1]


@dataclass(frozen=True)
class Scan:
    """Outcome of a scan that found nothing of the documents."""

    documents: int
    tokens: int
    """Tokens of these documents, all read as ends of text."""
    rows: int
    """Rows that hold a place of theirs, none of which predicts anything there."""


def scan(dataset: TokenDataset, other: TokenDataset, samplers: tuple[Sampler, Sampler] | None = None) -> Scan:
    """Read the forgotten documents of a data set as training does, and return what was read.

    `other` is the same data set with another token in the place of forgotten ones (`fill_id`). `samplers` make the rows
    of both; without them shards alone are read, which is what every reader, a reservoir's too, is handed.

    Raises:
        DataError: a token of a forgotten document is emitted, or something is predicted there: a defect.
    """
    eos, found, tokens, rows = dataset.index.eos_id, 0, 0, 0
    for number, entry in enumerate(dataset.index.shards):
        documents = dataset.forgotten_documents(number)
        if not documents.size:
            continue
        found += documents.size
        shard = dataset.shard(number)
        for first, end in zip(shard.documents[documents], shard.documents[documents + 1], strict=True):
            if (shard.tokens[first:end] != eos).any():
                raise _emitted(dataset, entry.content_hash, "its tokens are read")
            tokens += int(end - first)
        if samplers is not None:
            mine = samplers[0].rows_of(number, documents, 0)
            for at in range(0, mine.size, _ROWS_AT_ONCE):
                if not _predicts_nothing(samplers, number, mine[at : at + _ROWS_AT_ONCE]):
                    raise _emitted(dataset, entry.content_hash, "what stands there is predicted")
            rows += mine.size
        dataset.release()
        other.release()
    return Scan(found, tokens, rows)


def _predicts_nothing(samplers: tuple[Sampler, Sampler], number: int, rows: np.ndarray) -> bool:
    """Return True if rows have equal targets and weights, whatever stands in the place of forgotten documents."""
    samples_B3 = np.stack([np.zeros_like(rows), np.full_like(rows, number), rows], axis=1)
    one, other = (sampler.make(samples_B3, samples_B3[:, 1:], rows.size) for sampler in samplers)
    for key, weights in one.inputs.items():
        if not key.startswith(("weights", "pair_weights")):
            continue
        # a pair's label tells of a text that is gone, whatever the label
        if not np.array_equal(weights, other.inputs[key]) or (key.startswith("pair") and weights.any()):
            return False
        targets = key.replace("weights", "targets")
        # (B, T), (B, M) or (B,): compared where they count
        if (one.inputs[targets] != other.inputs[targets])[weights > 0].any():
            return False
    return True


def _emitted(dataset: TokenDataset, shard: str, what: str) -> DataError:
    return DataError(
        f"a forgotten document of shard {shard} in {dataset.location} is still emitted: {what}",
        "ends of text without a target in its place",
        "report this: it is a defect",
    )
