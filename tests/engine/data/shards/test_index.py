"""An index says what is there, is refused when it contradicts itself, and has room for what comes later."""

import json
import re

import numpy as np
import pytest

from engine.data.shards.index import FILE, read_index, token_dtype
from engine.errors import DataError
from tests.engine.data.corpus import made_up_documents, write_shards


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "data", made_up_documents(40))
    return tmp_path / "data"


def change(folder, edit):
    tree = json.loads((folder / FILE).read_text())
    edit(tree)
    (folder / FILE).write_text(json.dumps(tree))


def test_it_tells_counts_types_and_hashes(folder):
    documents = made_up_documents(40)
    tree = json.loads((folder / FILE).read_text())
    assert tree["version"] == 1
    assert tree["documents"] == 40
    assert tree["tokens"] == sum(document.size for document in documents)
    for shard in tree["shards"]:
        assert shard["tokens"]["dtype"] == "uint16"
        assert (
            shard["tokens"]["bytes"]
            == 2 * shard["tokens"]["length"]
            == (folder / shard["tokens"]["file"]).stat().st_size
        )
    index = read_index(folder)
    assert index.num_tokens == tree["tokens"]
    assert index.fingerprint == tree["fingerprint"]


def test_width_of_a_token_follows_the_vocabulary():
    assert (token_dtype(2**16), token_dtype(2**16 + 1)) == ("uint16", "uint32")


def test_fingerprint_follows_tokens_boundaries_and_tokenizer(tmp_path):
    documents = made_up_documents(10)
    same = [write_shards(tmp_path / name, documents).fingerprint for name in ("a", "b")]
    assert same[0] == same[1]
    other_token = [documents[0].copy(), *documents[1:]]
    other_token[0][0] += 1
    split = [documents[0][:1], documents[0][1:], *documents[1:]]
    others = [write_shards(tmp_path / "c", other_token), write_shards(tmp_path / "d", split)]
    assert len({same[0], *(item.fingerprint for item in others)}) == 3


def test_arrays_of_a_later_version_are_passed_over(folder):
    before = read_index(folder)
    array = {"file": "shard-000000.later", "dtype": "uint64", "length": 1, "bytes": 8, "xxh3": "0"}
    change(folder, lambda tree: tree["shards"][0].update(later=array))
    assert read_index(folder) == before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tree: tree.update(version=3), "has version 3"),
        (lambda tree: tree.update(format="other"), "has format 'other'"),
        (lambda tree: tree.pop("eos_id"), "'eos_id' is missing"),
        (lambda tree: tree.update(eos_id=1000), "eos_id 1000 is no token of a vocabulary of 1000"),
        (lambda tree: tree.update(eos_id=True), "eos_id is True, expected a whole number"),
        (lambda tree: tree.update(tokens=1), "tokens is 1, but the shards' tokens add up to"),
        (lambda tree: tree.update(documents=1), "documents is 1, but the shards' documents add up to"),
        (lambda tree: tree.update(tokenizer_hash="other"), "fingerprint is"),
        (lambda tree: tree["shards"].reverse(), "fingerprint is"),
        (
            lambda tree: tree.update(vocab_size=70000),
            "has dtype uint16, but a vocabulary of 70000 is written as uint32",
        ),
        (lambda tree: tree["shards"][0]["tokens"].update(dtype="float32"), "dtype is 'float32', expected uint16"),
        (lambda tree: tree["shards"][0]["tokens"].update(length=5), "bytes for 5 items of uint16"),
        (lambda tree: tree["shards"][0]["tokens"].update(length=-5), "length is -5, expected a whole number"),
        (lambda tree: tree["shards"][0]["tokens"].update(file="../x"), "'../x' is no plain file name"),
        (lambda tree: tree["shards"][0]["documents"].update(length=0, bytes=0), "documents is empty"),
        (lambda tree: tree.update(shards=3), "is damaged"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(folder, edit, message):
    change(folder, edit)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_index(folder)
    assert str(folder / FILE) in str(caught.value)
    assert "to do: " in str(caught.value)


def test_what_is_no_index_at_all_is_refused(folder, tmp_path):
    (folder / FILE).write_text('{"format": ')
    with pytest.raises(DataError, match="is damaged: no JSON"):
        read_index(folder)
    (folder / FILE).write_text("[]")
    with pytest.raises(DataError, match="has format None"):
        read_index(folder)
    with pytest.raises(DataError, match="no folder of token shards"):
        read_index(tmp_path / "nowhere")
    (folder / FILE).unlink()
    (folder / FILE).mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_index(folder)


def test_the_parts_are_named_where_their_parent_is_given(folder):
    with pytest.raises(DataError, match=r"holds no index\.json") as caught:
        read_index(folder.parent)
    assert "name one of its folders: data" in str(caught.value)


def test_a_shard_is_named_by_its_tokens_and_documents_wherever_it_lies(tmp_path):
    documents = made_up_documents(40)
    plain = write_shards(tmp_path / "plain", documents)
    names = [shard.content_hash for shard in plain.index.shards]
    packed = write_shards(tmp_path / "packed", documents, compression="zstd")
    assert [shard.content_hash for shard in packed.index.shards] == names
    assert len(set(names)) == len(names) > 2
    # one text cut into documents in another way
    joined = write_shards(tmp_path / "joined", [np.concatenate(documents[:2]), *documents[2:]])
    assert joined.index.shards[0].tokens.xxh3 == plain.index.shards[0].tokens.xxh3
    assert joined.index.shards[0].content_hash != names[0]
