"""Columns: one number for each document, verified like tokens, and part of the fingerprint."""

import json

import numpy as np
import pytest

from engine.data.shards.dataset import TokenDataset
from engine.data.shards.index import FILE
from engine.data.shards.writer import ShardWriter
from engine.errors import DataError
from tests.engine.data.corpus import made_up_documents

DOCUMENTS = made_up_documents(40)
LABELS = np.random.default_rng(1).integers(-3, 4, 40).tolist()
QUALITY = np.random.default_rng(2).random(40).tolist()


def write(folder, labels=LABELS, **how):
    with ShardWriter(folder, 1000, 0, "hash", 800, **how) as writer:
        for document, label, quality in zip(DOCUMENTS, labels, QUALITY, strict=True):
            writer.add(document, columns={"label": label, "quality": quality})
    return TokenDataset(folder)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_columns_come_back_in_their_types(tmp_path, compression):
    dataset = write(tmp_path, compression=compression)
    assert dataset.num_shards > 3
    assert dataset.index.columns == ("label", "quality")
    labels = [dataset.column("label", number) for number in range(dataset.num_shards)]
    quality = [dataset.column("quality", number) for number in range(dataset.num_shards)]
    assert np.concatenate(labels).tolist() == LABELS
    assert np.concatenate(quality).tolist() == QUALITY
    assert (labels[0].dtype, quality[0].dtype) == (np.int64, np.float64)
    dataset.verify()


def test_a_column_may_have_a_number_for_each_token(tmp_path):
    with ShardWriter(tmp_path, 1000, 0, "hash", shard_bytes=8) as writer:
        for document in DOCUMENTS:
            writer.add(document, columns={"tag": document % 5})
    dataset = TokenDataset(tmp_path)
    assert dataset.num_shards > 1
    assert dataset.whole_column("tag").tolist() == (np.concatenate(DOCUMENTS) % 5).tolist()


def test_columns_are_part_of_the_fingerprint_and_not_of_the_shards_name(tmp_path):
    one, other = write(tmp_path / "one"), write(tmp_path / "other", labels=[LABELS[0] + 1, *LABELS[1:]])
    plain = ShardWriter(tmp_path / "plain", 1000, 0, "hash", 800)
    with plain:
        for document in DOCUMENTS:
            plain.add(document)
    assert len({one.fingerprint, other.fingerprint, plain.index.fingerprint}) == 3
    hashes = [[shard.content_hash for shard in index.shards] for index in (one.index, other.index, plain.index)]
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_column_that_is_not_there_is_one_clear_error(tmp_path):
    dataset = write(tmp_path)
    with pytest.raises(DataError, match="have no column labels") as caught:
        dataset.column("labels", 0)
    assert "one of label, quality" in str(caught.value)


def test_a_damaged_column_is_refused(tmp_path):
    dataset = write(tmp_path)
    path = tmp_path / "shard-000000.column-label"
    path.write_bytes(bytes([9] * 8) + path.read_bytes()[8:])
    with pytest.raises(DataError, match="column-label is damaged"):
        dataset.column("label", 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda column: column | {"length": 1, "bytes": 8}, "1 numbers for"),
        (lambda column: column | {"dtype": "uint8"}, "expected int64 or float64"),
        (lambda column: column | {"file": "../x"}, "no plain file name"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path, change, said):
    write(tmp_path)
    tree = json.loads((tmp_path / FILE).read_text())
    tree["shards"][0]["columns"]["label"] = change(tree["shards"][0]["columns"]["label"])
    (tmp_path / FILE).write_text(json.dumps(tree))
    with pytest.raises(DataError, match=said):
        TokenDataset(tmp_path)


def test_names_that_are_no_part_of_a_file_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a column is named"), ShardWriter(tmp_path, 1000, 0, "hash") as writer:
        writer.add(DOCUMENTS[0], columns={"../label": 1})


def test_writing_again_sweeps_columns(tmp_path):
    write(tmp_path)
    with ShardWriter(tmp_path, 1000, 0, "hash") as writer:
        writer.add(DOCUMENTS[0])
    assert not list(tmp_path.glob("*column*"))
