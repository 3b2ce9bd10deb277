"""Bytes of text that no token spells are counted, whatever the model does with them; the figures are by hand."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.tokenizer.folder import load_tokenizer
from tests.engine.data.corpus import made_up_texts
from tests.engine.data.tokenizer import foreign
from tests.engine.data.tokenizer.foreign import letters


def lost(tokenizer, text):
    [count] = tokenizer.unspelt_bytes([text], tokenizer.encode([text])).tolist()
    return count


def test_bpe_without_unknown_or_bytes_drops_text_and_it_is_counted(tmp_path):
    tokenizer = letters(tmp_path)
    assert tokenizer.unknown_id is None
    assert tokenizer.encode(["a日b", "日"])[0].tolist() == [3], "as the library does: both sides even join"
    counts = tokenizer.unspelt_bytes(["a日b", "日é", "ab a", ""], tokenizer.encode(["a日b", "日é", "ab a", ""]))
    assert counts.tolist() == [3, 5, 0, 0]
    assert tokenizer.unknown_becomes == "it is dropped"


def test_text_that_spells_the_end_of_a_text_is_dropped_and_counted_rather_than_read(tmp_path):
    tokenizer = letters(tmp_path)
    assert tokenizer.encode(["a</s>b"])[0].tolist() == [3]
    assert lost(tokenizer, "a</s>b") == 4


def test_byte_level_bpe_that_lacks_bytes(tmp_path):
    folder = foreign.merged(tmp_path)
    tree = json.loads((folder / "tokenizer.json").read_text())
    del tree["model"]["vocab"]["Ã"]  # the first byte of é and its neighbours
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    tokenizer = load_tokenizer(folder)
    assert [lost(tokenizer, text) for text in ("the", "éa", "日")] == [0, 2, 0]


def test_what_spells_every_byte_looks_for_nothing(tmp_path):
    for name, make in (("merged", foreign.merged), ("bytes", foreign.byte_pieces)):
        tokenizer = load_tokenizer(make(tmp_path / name))
        assert tokenizer.dropping is None
        assert lost(tokenizer, "the 日本 é \x00") == 0


def test_unigram_that_names_its_unknown_token_by_number_alone(tmp_path):
    model = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *foreign.PIECES], 0))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = load_tokenizer(foreign.save(model, tmp_path, eos_token="</s>"))
    assert tokenizer.unknown_id == 0
    assert not tokenizer.vocabulary.ordinary_V[0]
    assert lost(tokenizer, "the 日本é a") == 3 + 3 + 2
    assert tokenizer.unknown_becomes == "it becomes <unk>"


def test_wordpiece_loses_runs_of_more_than_a_hundred_letters(tmp_path):
    tokenizer = train_tokenizer(made_up_texts(100), tmp_path, "wordpiece", 400)
    assert [lost(tokenizer, f"the {'a' * count} wave") for count in (100, 101, 500)] == [0, 101, 500]
    assert lost(tokenizer, "the 日本ж rank") == 2, "ideographs are words of their own"
    assert "any run of more than 100 letters" in tokenizer.unknown_becomes


def test_whole_words(tmp_path):
    tokenizer = load_tokenizer(foreign.word_level(tmp_path))
    texts = ["the rank é", "</s> the", "a"]
    found = tokenizer.unspelt_bytes(texts, tokenizer.encode(texts))
    assert found.dtype == np.int64
    assert found.tolist() == [2, 4, 0]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece-unigram", "sentencepiece-bpe"])
def test_what_is_trained_here_spells_everything(kind, tmp_path):
    tokenizer = train_tokenizer(made_up_texts(100), tmp_path, kind, 430)
    assert lost(tokenizer, "ภาษาไทย <|endoftext|> \x00 😀") == 0
