"""Words begin where a reader says so, whatever the tokenizer's spelling, and special tokens are no ordinary ones."""

import json

import numpy as np
import pytest
from tokenizers import normalizers, pre_tokenizers

from engine.corpus.tokenizer_training import PURPOSE_TOKENS, train_tokenizer
from engine.data.tokenizer.vocabulary import Vocabulary, word_edges
from tests.engine.data.corpus import made_up_texts

KINDS = ("bpe", "sentencepiece-unigram", "sentencepiece-bpe", "wordpiece")
TEXT = "the wave,little  (ranks) naïve 水月 x_1 don't\nof 😀 Ωmega"
WORDS = ["the", "wave", ",", "little", "(", "ranks", ")", "naïve", "水", "月", "x", "_", "1", "don", "'", "t", "of"]
WORDS += ["😀", "Ωmega"]
"""By eye; BERT's own splitter agrees."""


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return train_tokenizer(made_up_texts(200), tmp_path_factory.mktemp("t"), request.param, 600, "masked")


def words_of(tokenizer, text):
    """The text cut where the vocabulary says that a word begins."""
    vocabulary, ids = tokenizer.vocabulary, tokenizer.encode([text])[0]
    begins = vocabulary.begins_word_V[ids]
    begins[1:] |= vocabulary.ends_word_V[ids[:-1]]
    begins[0] = True
    return [tokenizer.decode(part).strip() for part in np.split(ids, np.flatnonzero(begins)[1:])]


def test_words_are_those_that_a_reader_sees(tokenizer):
    found = [word for word in words_of(tokenizer, TEXT) if word]
    expected = [word if tokenizer.encode([word])[0].tolist() != [tokenizer.unknown_id] else "[UNK]" for word in WORDS]
    assert found == expected
    text = normalizers.BertNormalizer(lowercase=False).normalize_str(TEXT)
    assert [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)] == WORDS


def test_special_tokens_are_not_ordinary_and_play_their_parts(tokenizer):
    vocabulary, ids = tokenizer.vocabulary, tokenizer.model.token_to_id
    assert (vocabulary.classify, vocabulary.separate, vocabulary.mask) == tuple(map(ids, ("[CLS]", "[SEP]", "[MASK]")))
    special = {vocabulary.padding, vocabulary.classify, vocabulary.separate, vocabulary.mask, tokenizer.eos_id}
    assert None not in special
    assert not set(vocabulary.ordinary_ids.tolist()) & (special | {tokenizer.unknown_id})
    assert vocabulary.ordinary_ids.size == tokenizer.vocab_size - len(special | {tokenizer.unknown_id})


def test_sentinels_descend_as_in_t5_and_fill_marks_are_found(tmp_path):
    t5 = train_tokenizer(made_up_texts(100), tmp_path / "t5", "sentencepiece-unigram", 600, "span_corruption")
    assert t5.vocabulary.sentinels == tuple(range(t5.vocab_size - 1, t5.vocab_size - 101, -1))
    assert t5.model.id_to_token(t5.vocab_size - 1) == "<extra_id_0>"
    fill = train_tokenizer(made_up_texts(100), tmp_path / "fill", "bpe", 300, "fill_in_the_middle")
    names = [fill.model.id_to_token(number) for number in fill.vocabulary.fill]
    assert tuple(names) == PURPOSE_TOKENS["fill_in_the_middle"]
    assert (t5.vocabulary.fill, fill.vocabulary.sentinels, fill.vocabulary.mask) == ((), (), None)


def test_it_survives_json(tokenizer):
    vocabulary = tokenizer.vocabulary
    tree = json.loads(json.dumps(vocabulary.to_json()))
    assert Vocabulary.from_json(tree, tokenizer.vocab_size) == vocabulary


@pytest.mark.parametrize(
    ("change", "message"),
    [({"mask": 10**6}, "names tokens"), ({"ordinary": "AAAA"}, "has bits of 24 tokens"), ({"ordinary": "%"}, "base64")],
)
def test_what_contradicts_itself_is_refused(tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.from_json(tokenizer.vocabulary.to_json() | change, tokenizer.vocab_size)


def test_byte_level_tokens_that_begin_or_end_inside_a_character():
    assert word_edges("Ġthe", "bytes") == (True, False)
    assert word_edges("the", "bytes") == (False, False)
    assert word_edges("Ġ", "bytes") == (True, False)
    assert word_edges("Ċ", "bytes") == (True, True)
    assert word_edges("Ã¯", "bytes") == (False, False)  # ï
    assert word_edges("Ã", "bytes") == (False, False)  # its first half
    assert word_edges("æĹ¥", "bytes") == (True, True)  # 日
    assert word_edges("æĹ", "bytes") == (True, False)  # two thirds of it
    assert word_edges("¥", "bytes") == (False, False)  # the last third
