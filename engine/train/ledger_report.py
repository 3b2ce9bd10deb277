"""The ledger of a run as JSON: measures, bits per byte, tokens, the distance of the weights, and what is checked."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.checkpoint.compare import Opened
from engine.checkpoint.folder import CHECKPOINTS, committed, step_of
from engine.checkpoint.manifest import WEIGHT, key_of
from engine.config.schema.data import CacheConfig
from engine.data.overlap import shared_documents
from engine.data.shards.cache import ShardCache
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.remote import is_remote
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import CheckpointError, DataError
from engine.train import ledger as measures
from engine.train.ledger_records import Domain, Ledger

RECIPE = "prepare.json"
"""Report of `palimpsest prepare`, which counts the bytes of the text."""
MOST_DECODED_TOKENS = 20_000_000
"""Largest set whose bytes are counted by decoding it, where no report has counted them."""


def report(ledger: Ledger, others: Sequence[tuple[str, Ledger]], check: bool = True) -> dict[str, Any]:
    """Return everything about a run as JSON; `others` are runs to compare with, by name.

    With `check`, held-out documents are looked for in the training data of all stages, which is read whole.
    """
    matrix = ledger.matrix
    sizes = [size_of(ledger, domain) for domain in ledger.domains]
    return {
        "run": ledger.config.name,
        "stages": [
            {"name": name, "end_step": end, "tokens": tokens}
            for name, end, tokens in zip(matrix.stages, ledger.ends, ledger.tokens, strict=True)
        ],
        "is_complete": ledger.is_complete,
        "domains": [
            asdict(one) | {"home": matrix.stages[domain.home], "location": domain.location, **_size(size)}
            for one, domain, size in zip(measures.measure(matrix), ledger.domains, sizes, strict=True)
        ],
        "loss": [list(row) for row in matrix.losses],
        "bits_per_byte": [
            [measures.bits_per_byte(loss, *size) for loss, size in zip(row, sizes, strict=True)]
            for row in matrix.losses
        ],
        "initial_loss": list(matrix.first),
        "measures": ledger.measures,
        "average": measures.average(matrix),
        "backward_transfer": measures.backward_transfer(matrix),
        "forward_transfer": measures.forward_transfer(matrix),
        "forgetting_from_first": measures.forgetting(matrix),
        "forgetting_from_best": measures.forgetting(matrix, from_best=True),
        "distance": distances(ledger),
        "shared_documents": _shared(ledger) if check else None,
        "compared_with": [compared(ledger, name, other) for name, other in others],
    }


def compared(ledger: Ledger, name: str, other: Ledger) -> dict[str, Any]:
    """Return what a run has spared and paid beside another one, by domain that both have: a run without replay, say."""
    theirs = {one.domain: one for one in measures.measure(other.matrix)}
    newest = ledger.matrix.stages[ledger.matrix.last]
    rows: dict[str, dict[str, float | None]] = {}
    for one in measures.measure(ledger.matrix):
        if (reference := theirs.get(one.domain)) is None:
            continue
        is_new = one.home == newest
        rows[one.domain] = {
            "loss": reference.loss,
            "recovered_share": None
            if is_new
            else measures.recovered_share(one.forgetting_from_first, reference.forgetting_from_first),
            "cost": measures.cost(one.loss, reference.loss) if is_new else None,
        }
    return {"run": name, "domains": rows}


def size_of(ledger: Ledger, domain: Domain) -> tuple[int, int]:
    """Return (tokens, UTF-8 bytes of text) of a held-out set; 0 bytes where nobody has counted them.

    A loss of an objective that does not predict every token in turn is no code length: 0, too."""
    if domain.objective != "causal" or is_remote(domain.location):
        return 0, 0
    try:
        dataset = TokenDataset(domain.location)
        num_tokens = dataset.index.num_tokens
        return num_tokens, told_bytes(Path(domain.location), num_tokens) or _decoded_bytes(ledger, dataset)
    except (DataError, OSError):  # gone since
        return 0, 0


def told_bytes(location: Path, num_tokens: int) -> int:
    """Return the bytes that the report of `palimpsest prepare` counts for a folder of shards; 0 where there is none."""
    location = location.absolute()
    for output in (location.parent, location.parent.parent):
        try:
            told = json.loads((output / RECIPE).read_bytes())["report"][str(location.relative_to(output))]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if told.get("tokens") == num_tokens:
            return int(told.get("text_bytes", 0))
    return 0


def _decoded_bytes(ledger: Ledger, dataset: TokenDataset) -> int:
    """Return the bytes of a small set's text, by decoding it."""
    if dataset.index.num_tokens > MOST_DECODED_TOKENS:
        return 0
    tokenizer, end = load_tokenizer(ledger.config.tokenizer), dataset.index.eos_id
    total = 0
    for number in range(dataset.num_shards):
        tokens = dataset.shard(number).tokens
        total += len(tokenizer.decode(tokens[tokens != end]).encode())
    return total


def distances(ledger: Ledger) -> dict[str, float | None]:
    """Return the Euclidean distance of the weights at each later stage's end (or of the newest checkpoint in it) from
    those at its beginning, by the norm of the latter; None where one of both checkpoints is gone."""
    kept = {step_of(path): path for path in committed(ledger.config.folder / CHECKPOINTS)}
    found: dict[str, float | None] = {}
    for name, begin, end in zip(ledger.matrix.stages[1:], ledger.ends, ledger.ends[1:], strict=False):
        newest = max((step for step in kept if begin < step <= end), default=None)
        found[name] = None
        if begin in kept and newest is not None:
            try:
                found[name] = _distance(Opened(kept[begin]), Opened(kept[newest]))
            except CheckpointError:  # damaged, or removed meanwhile
                continue
    return found


def _distance(first: Opened, last: Opened) -> float:
    moved = size = 0.0
    for name in sorted(first.manifest.specs.keys() & last.manifest.specs.keys()):
        # One parameter at a time, in fp64: a sum of squares over a large model loses digits in fp32.
        before, after = (opened.read(name)[key_of(WEIGHT, name)].double() for opened in (first, last))
        moved += float((after - before).square().sum())
        size += float(before.square().sum())
    return math.sqrt(moved / size) if size else math.sqrt(moved)


def _shared(ledger: Ledger) -> dict[str, int | None]:
    """Return the number of documents of each held-out set that stand in the training data of any stage that has begun,
    or in what it replays; None where some of it is not there to be read."""
    stages = ledger.config.stages[: len(ledger.ends)]
    locations: dict[str, CacheConfig | None] = {}
    for run_stage in stages:
        data = run_stage.data
        locations |= dict.fromkeys(data.training_locations, data.cache)
        if run_stage.replay is not None and run_stage.replay.source is not None:
            locations[run_stage.replay.source] = data.cache
    found: dict[str, int | None] = {}
    for domain in ledger.domains:
        cache = stages[domain.home].data.cache
        try:
            training = [_open(location, own) for location, own in locations.items()]
            found[domain.name] = shared_documents(_open(domain.location, cache), training)
        except (DataError, OSError):
            found[domain.name] = None
    return found


def _open(location: str, cache: CacheConfig | None) -> TokenDataset:
    return TokenDataset(location, cache=None if cache is None else ShardCache(cache.folder, cache.bytes))


def _size(size: tuple[int, int]) -> dict[str, int]:
    return {"tokens": size[0], "text_bytes": size[1]} if size[1] else {}
