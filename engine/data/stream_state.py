"""State of a stream as a checkpoint keeps it: what it says of the progress, and what must not have changed since.

A state is JSON of less than 1 KiB, whatever the position. It is refused where data, order, masks or packing are not
those that it was saved with, since the samples to come would be others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from engine.data.mixed_order import Cursor
from engine.data.order.sample_order import SampleId
from engine.data.shards.tombstones import FILE as TOMBSTONES_FILE
from engine.data.shards.tombstones import Tombstones
from engine.data.source import Source, WeightedDataset
from engine.errors import DataError

State = dict[str, Any]
"""Loader state of a checkpoint: JSON of less than 1 KiB, equal on all ranks."""


class Progress(NamedTuple):
    """Progress of a stream: the next sample, and the samples trained on so far by the whole run."""

    cursor: Cursor
    samples: int
    passed_over: tuple[int, ...]
    """Samples of each source that were passed and not trained on: those left out, and those of lost shards."""


def progress_of(state: State, sources: Sequence[Source]) -> Progress:
    """Return the progress that a state tells of. Raises `KeyError`, `TypeError` or `ValueError`: it is damaged."""
    addresses = tuple(SampleId(*map(int, address)) for address in state["addresses"])
    checked = tuple(source.order.check(address) for source, address in zip(sources, addresses, strict=True))
    # no key where all are 0
    passed_over = tuple(int(count) for count in state.get("passed_over", [0] * len(sources)))
    if len(passed_over) != len(sources):
        raise ValueError(f"passed_over has {len(passed_over)} numbers for {len(sources)} sources")
    return Progress(Cursor(int(state["position"]), checked), int(state["samples"]), passed_over)


def identity_of_mixture(parts: Sequence[WeightedDataset]) -> State:
    """Return what must not change of the sources of a mixture."""
    return {
        # without the weights, which may change from a resume on
        "mixture": short_hash([_identity_of(part) for part in parts]),
        # five digits of each suffice to name the source that changed; `fingerprint` covers all of them in full
        "sources": " ".join(part.dataset.fingerprint[:5] for part in parts),
    }


def _identity_of(part: WeightedDataset) -> list[Any]:
    found: list[Any] = [part.name, part.epochs, part.max_samples]
    # no entry for the stage's own objective, which has a key of its own
    return found if part.objective is None else [*found, part.objective.model_dump(mode="json")]


def check_identity(state: State, identity: State, parts: Sequence[WeightedDataset]) -> None:
    """Raise `DataError` where a state was saved with another identity, and name the data sets that differ."""
    for key, now in identity.items():
        if state.get(key) != now:
            raise DataError(
                f"the saved loader state has {key} = {state.get(key)!r}, this run has {now!r} "
                f"(data set {_changed_folders(state, parts)})",
                f"{key} = {state.get(key)!r}, as when the state was saved",
                "restore it, or start a new run in another folder",
            )


def change_of_tombstones(state: State, now: Tombstones, parts: Sequence[WeightedDataset]) -> str:
    """Return the change of the forgotten documents since a state, in words; empty where there is none.

    Raises:
        DataError: documents that were forgotten then are not now, so that they would be trained on again.
    """
    count, digest = state.get("tombstones", (0, ""))
    if digest == now.hash:
        return ""
    if len(now) <= count:
        folders = ", ".join(str(part.dataset.location) for part in parts)
        raise DataError(
            f"the saved loader state has {count:,} forgotten documents (tombstones {digest}), {folders} and the "
            f"run folder name {len(now):,}" + (f" ({now.hash})" if now.hash else ""),
            "those that were forgotten when the state was saved, and more",
            f"restore {TOMBSTONES_FILE} from a copy, or forget the documents again with `palimpsest forget`",
        )
    return f"tombstones: {digest!r} -> {now.hash!r} ({count:,} -> {len(now):,} forgotten documents)"


def short_hash(tree: Any) -> str:
    """Return eight hexadecimal digits that tell JSON values apart."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def _changed_folders(state: State, parts: Sequence[WeightedDataset]) -> str:
    """Return the folders whose data is not that of a state; all where that cannot be told."""
    before = str(state.get("sources", "")).split()
    pairs = list(zip(parts, before, strict=False)) if len(before) == len(parts) > 1 else []
    changed = [part for part, fingerprint in pairs if not part.dataset.fingerprint.startswith(fingerprint)]
    return ", ".join(str(part.dataset.location) for part in changed or parts)
