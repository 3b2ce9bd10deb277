"""Forgotten documents: their tokens and targets are emitted by no objective, and no other sample changes by a byte.

Documents that are to be forgotten have tokens of their own (`MARKED`), so that what is emitted tells itself apart. Rows
that hold something of them are found without tombstones: they are those that differ where these documents are written
with other tokens.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.batch import Batch
from engine.data.loader import Loader
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.tombstones import FILE, Tombstones, add_tombstones
from engine.data.stream import Stream
from engine.data.validation import ValidationSamples
from engine.errors import DataError
from tests.engine.data.corpus import EOS, FILL
from tests.engine.data.forgotten import CASES, FORGOTTEN, LENGTH, MARKED, OTHER, tombstones_of, write


def stream_of(dataset: TokenDataset, **how: Any) -> Stream:
    keys: dict[str, Any] = {"attention": "document"} | how
    return Stream(dataset, LENGTH, 4, 11, 2, **keys)


def epochs(dataset: TokenDataset, **how: Any) -> list[dict[str, np.ndarray]]:
    """Rows of two epochs, each as its inputs by keyword."""
    stream = stream_of(dataset, **how)
    loader, rows = Loader(stream), []
    for _ in range(2 * stream.samples_per_epoch() // 4):
        rows += rows_of(loader.step(0, 1, 4)[0])
    return rows


def rows_of(batch: Batch) -> list[dict[str, np.ndarray]]:
    totals = {f"total {name}": weights for name, weights in batch.row_target_weights.items()}
    columns = {name: tensor.numpy() for name, tensor in batch.inputs.items()} | totals
    for loss, weights in totals.items():  # what the denominators are made of is what the weights add up to
        key = {"total mlm": "weights_BM", "total pairs": "pair_weights_B"}.get(loss, "weights_BT")
        assert np.array_equal(weights, columns[key].reshape(len(weights), -1).sum(axis=1))
    return [{name: column[b] for name, column in columns.items()} for b in range(batch.num_rows)]


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def holds(row: dict[str, np.ndarray], tokens: range) -> bool:
    return any(np.isin(column, tokens).any() for name, column in row.items() if "tokens" in name or "targets" in name)


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_a_forgotten_document_is_emitted_and_no_other_row_changes(case: str, tmp_path: Path) -> None:
    how = CASES[case]
    before, other = epochs(write(tmp_path / "a", MARKED), **how), epochs(write(tmp_path / "b", OTHER), **how)
    add_tombstones(tmp_path / "a", tombstones_of(TokenDataset(tmp_path / "a")))
    after = epochs(TokenDataset(tmp_path / "a"), **how)
    assert len(before) == len(after) == len(other)
    touched = [not equal(one, two) for one, two in zip(before, other, strict=True)]
    assert 0.05 < np.mean(touched) < 0.7
    assert [holds(row, MARKED) for row in before] == touched
    for was, now, is_touched in zip(before, after, touched, strict=True):
        if not is_touched and case == "fill in the middle":
            # a row may end with the mark of a forgotten document and hold no token of its own: that is no target, too
            gone = was["weights_BT"] > now["weights_BT"]
            assert np.isin(was["targets_BT"][gone], FILL).all()
            was = {**was, "weights_BT": now["weights_BT"], "total causal": now["total causal"]}
        if not is_touched:
            assert equal(was, now)
            continue
        assert not holds(now, MARKED)
        assert {name: column.shape for name, column in was.items()} == {n: column.shape for n, column in now.items()}
        if "pair_weights_B" in now:  # neither side of a pair tells of a text that is gone
            assert not now["pair_weights_B"]
        if "masked_BM" in now:
            wanted = now["targets_BM"][now["weights_BM"] > 0]
            assert not np.isin(wanted, [EOS]).any()
            assert now["total mlm"] <= was["total mlm"]
            assert set(wanted) <= set(was["tokens_BT"]) | set(was["targets_BM"])


@pytest.mark.parametrize("case", ["causal", "causal, rows", "causal, best fit", "span corruption, rows"])
def test_targets_of_all_other_documents_stay(case: str, tmp_path: Path) -> None:
    dataset = write(tmp_path, MARKED)
    before = epochs(dataset, **CASES[case])
    add_tombstones(tmp_path, tombstones_of(dataset))
    after = epochs(TokenDataset(tmp_path), **CASES[case])
    lost = 0
    for was, now in zip(before, after, strict=True):
        counted, still = was["weights_BT"] > 0, now["weights_BT"] > 0
        marked = np.isin(was["targets_BT"], MARKED)
        assert not (still & (marked | ~counted)).any()
        gone = counted & ~still & ~marked
        lost += int(gone.sum())
        # besides marked tokens, only a forgotten document's own end of text, and sentinels before its spans, are gone
        ends = (was["targets_BT"] == EOS) | (was["targets_BT"] >= 950)
        assert ends[gone].all()
        assert np.array_equal(was["targets_BT"][still], now["targets_BT"][still])
    if "span" not in case:
        # every document's end of text is a target once an epoch, two epochs less the rows of the last step
        assert 2 * len(FORGOTTEN) - 2 <= lost <= 2 * len(FORGOTTEN)


def test_a_row_of_forgotten_documents_alone_has_no_target(tmp_path: Path) -> None:
    dataset = write(tmp_path, MARKED)
    everything = Tombstones({shard.content_hash: range(shard.num_documents) for shard in dataset.index.shards})
    for how in CASES.values():
        for row in epochs(TokenDataset(tmp_path, tombstones=everything), **how):
            assert not any(row[name].any() for name in row if "weights" in name or name.startswith("total"))


def test_compressed_shards_and_validation_forget_alike(tmp_path: Path) -> None:
    plain, packed = write(tmp_path / "plain", MARKED), write(tmp_path / "packed", MARKED, "zstd")
    tombstones = tombstones_of(plain)
    assert tombstones == tombstones_of(packed)  # named by content
    files = {path: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    opened = [TokenDataset(dataset.location, tombstones=tombstones) for dataset in (plain, packed)]
    for number in range(plain.num_shards):
        one, other = (dataset.shard(number) for dataset in opened)
        assert np.array_equal(one.tokens, other.tokens)
        assert not np.isin(one.tokens, MARKED).any()
        assert not one.tokens.flags.writeable
        assert np.array_equal(one.documents, plain.shard(number).documents)
    assert {path: path.read_bytes() for path in (tmp_path / "plain").iterdir()} == files  # pages, not files, changed
    held_out = ValidationSamples([("", opened[0])], LENGTH, "document")
    rows = [row for batch in held_out.batches(0, 1, 4) for row in rows_of(batch)]
    assert rows
    assert not any(holds(row, MARKED) for row in rows)


def test_order_stays_and_the_state_names_what_is_forgotten(tmp_path: Path, caplog) -> None:
    dataset = write(tmp_path, MARKED)
    stream = stream_of(dataset)
    hash_before, state = stream.sample_hash(50), stream.state()
    assert "tombstones" not in state  # states of runs that forget nothing stay as they were
    tombstones = tombstones_of(dataset)
    add_tombstones(tmp_path, Tombstones({tombstones.shards[0]: tombstones.of(tombstones.shards[0])}))
    some = stream_of(TokenDataset(tmp_path))
    assert some.sample_hash(50) == hash_before
    with caplog.at_level(logging.WARNING, "palimpsest"):
        some.restore(state)
    assert "changed since this run was started: tombstones: '' -> " in caplog.text
    middle = some.state()
    assert middle["tombstones"] == [len(some.tombstones), some.tombstones.hash]
    add_tombstones(tmp_path, tombstones)
    whole = stream_of(TokenDataset(tmp_path))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "palimpsest"):
        whole.restore(middle)
        whole.restore(whole.state())
    assert caplog.text.count("changed since") == 1
    # a run that would train again on what was forgotten does not start
    (tmp_path / FILE).unlink()
    with pytest.raises(DataError, match="forgotten documents"):
        stream_of(TokenDataset(tmp_path)).restore(middle)


def test_a_tombstone_of_no_document_is_told(tmp_path: Path) -> None:
    dataset = write(tmp_path, MARKED)
    first = dataset.index.shards[0]
    with pytest.raises(DataError, match=f"names document {first.num_documents} of a shard"):
        TokenDataset(tmp_path, tombstones=Tombstones({first.content_hash: [first.num_documents]}))
    assert not len(TokenDataset(tmp_path, tombstones=Tombstones({"of another data set": [999]})).tombstones)
