"""A tokenizer is known by what it does, wherever it lies, and a folder that is none is refused by name."""

import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from engine.data.tokenizer.folder import END_OF_TEXT, load_tokenizer, tokenizer_hash
from engine.errors import DataError


@pytest.fixture
def copy(tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "copy")
    return tmp_path / "copy"


def change(path, edit):
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def test_it_splits_as_transformers_does_and_gives_the_text_back(tokenizer_folder):
    ours, theirs = load_tokenizer(tokenizer_folder), AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = ["the wave rises\n\n  if x = y:\treturn 1\r\n", "日本 naïve 😀 \x00 ▁", "", " "]
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))


def test_a_document_that_spells_a_special_token_only_quotes_it(tokenizer_folder):
    loaded = load_tokenizer(tokenizer_folder)
    [ids] = loaded.encode([f"what {END_OF_TEXT} means"])
    assert loaded.eos_id not in ids
    assert loaded.decode(ids) == f"what {END_OF_TEXT} means"
    assert loaded.decode(np.array([loaded.eos_id])) == END_OF_TEXT


def test_the_hash_survives_copies_formatting_and_saving_again(tokenizer_folder, copy, tmp_path):
    expected = load_tokenizer(tokenizer_folder).hash
    change(copy / "tokenizer.json", lambda tree: tree.update(truncation=None, padding=None))
    assert tokenizer_hash(copy) == load_tokenizer(copy).hash == expected
    AutoTokenizer.from_pretrained(copy).save_pretrained(tmp_path / "again")
    assert tokenizer_hash(tmp_path / "again") == expected


def test_truncation_that_somebody_left_on_is_switched_off(copy):
    before = load_tokenizer(copy)
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    change(copy / "tokenizer.json", lambda tree: tree.update(truncation=cut))
    after = load_tokenizer(copy)
    assert after.hash == before.hash
    assert after.encode(["the wave rises under"])[0].tolist() == before.encode(["the wave rises under"])[0].tolist()


@pytest.mark.parametrize("what", ["vocabulary", "end of text"])
def test_the_hash_follows_what_the_tokenizer_does(copy, what):
    before = tokenizer_hash(copy)
    if what == "vocabulary":
        change(copy / "tokenizer.json", lambda tree: tree["model"]["merges"].pop())
    else:
        change(copy / "tokenizer_config.json", lambda tree: tree.update(eos_token="<|padding|>"))
    assert tokenizer_hash(copy) != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "holds no tokenizer.json"),
        ("tokenizer_config.json", None, "holds no tokenizer_config.json"),
        ("tokenizer.json", "{", "tokenizer.json is damaged: no JSON"),
        ("tokenizer.json", "[]", "tokenizer.json is damaged: it begins with"),
        ("tokenizer.json", "{}", "tokenizer.json is damaged"),
        ("tokenizer_config.json", "{}", "tokenizer_config.json names neither eos_token nor sep_token"),
        ("tokenizer_config.json", '{"eos_token": "END"}', "names eos_token 'END', which is not in the vocabulary"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json cannot be read"),
    ],
)
def test_a_folder_that_is_no_tokenizer_is_refused(copy, name, content, message):
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load_tokenizer(copy)
    assert message in str(caught.value)
    assert "to do: " in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        tokenizer_hash(tmp_path / "nowhere")


def test_older_files_that_write_tokens_as_trees_are_understood(copy):
    expected = load_tokenizer(copy)
    change(copy / "tokenizer_config.json", lambda tree: tree.update(eos_token={"content": END_OF_TEXT}))
    assert (load_tokenizer(copy).eos_id, load_tokenizer(copy).hash) == (expected.eos_id, expected.hash)
