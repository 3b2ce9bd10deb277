"""Settings of a tokenizer that transformers of any version understands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.tokenizer.files import NAMED_TOKENS, TokenizerFiles, name_of
from engine.data.tokenizer.folder import load_tokenizer, tokenizer_hash
from engine.data.tokenizer.portable import make_portable, portable_settings
from tests.engine.data.corpus import made_up_texts

TREE = {
    "added_tokens": [
        {"id": 0, "content": "<pad>", "special": True},
        {"id": 1, "content": "</s>", "special": True},
        {"id": 2, "content": "<extra_id_0>", "special": True},
        {"id": 3, "content": "word", "special": False},
    ],
    "model": {"type": "Unigram", "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<extra_id_0>", 0.0], ["a", -1.0]]},
}


def settings_of(settings: dict) -> dict:
    names = {role: name for role in NAMED_TOKENS if (name := name_of(settings.get(role)))}
    return portable_settings(TokenizerFiles(Path("nowhere"), TREE, settings, names))


def test_a_class_that_rebuilds_and_lists_that_are_new_do_not_leave():
    """What transformers 5 writes for T5: 4.57 ends in `'list' object has no attribute 'keys'`."""
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "backend": "tokenizers",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "pad_token": "<pad>",
        "unk_token": "<unk>",  # not in the vocabulary: readers would add it
        "extra_special_tokens": ["<extra_id_0>"],
        "extra_ids": 1,
        "add_bos_token": True,
        "model_max_length": 10**30,
        "padding_side": "left",
    }
    assert settings_of(settings) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": ["<extra_id_0>"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    assert settings_of({"model_max_length": 512})["model_max_length"] == 512


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_trained_tokenizer_is_portable_and_keeps_its_hash(kind, tmp_path):
    trained = train_tokenizer(made_up_texts(100), tmp_path / "one", kind, 400, purpose="masked")
    settings = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not settings.keys() & {"backend", "extra_special_tokens", "is_local"}
    make_portable(tmp_path / "one")
    again = load_tokenizer(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "tokenizer_config.json").read_text()) == settings
    assert again.hash == trained.hash == tokenizer_hash(tmp_path / "one")
    assert again.vocabulary == trained.vocabulary
