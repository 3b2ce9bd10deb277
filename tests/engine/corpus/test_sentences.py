"""Sentences are where a reader sees them, in English and in Chinese, and finding them moves no token."""

import numpy as np
import pytest

from engine.corpus.encode import EncodeOptions, encode
from engine.corpus.sentences import check_language, sentence_starts, sentences_in_tokens
from engine.corpus.sources.chunks import TextChunk
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import ConfigError

ENGLISH = [
    "Dr. Smith paid $3.50 to Mr. Jones, e.g. for tea. ",
    '"Really?" she asked. ',
    "It was 5 p.m.\n\n",
    "And so on",
]
CHINESE = ["床前明月光，疑是地上霜。", "举头望明月！", "你好吗？", "“我很好。”", "价格是3.5元。"]  # noqa: RUF001


@pytest.mark.parametrize(("sentences", "language"), [(ENGLISH, "en"), (CHINESE, "zh"), (CHINESE, "en")])
def test_sentences_are_where_a_reader_sees_them(sentences, language):
    expected = np.cumsum([0, *map(len, sentences[:-1])])
    assert sentence_starts("".join(sentences), language).tolist() == expected.tolist()


@pytest.mark.parametrize("text", ["", " ", "\n\n", "one"])
def test_a_text_without_a_boundary_is_one_sentence(text):
    assert sentence_starts(text, "en").tolist() == [0]


def test_tokens_belong_to_the_sentence_in_which_they_begin():
    # characters:  0123456789; tokens begin at 0, 2, 5, 5, 9; sentences at 0, 3, 5, 7, 8, 10
    token_starts = np.array([0, 2, 5, 5, 9])
    # the sentences at 3 and 7 have no token of their own that another one has not, and the last one has none at all
    assert sentences_in_tokens(np.array([0, 3, 5, 7, 8, 10]), token_starts).tolist() == [0, 2, 4]


@pytest.mark.parametrize("language", [None, "en"])
def test_the_tokens_are_the_same_with_and_without(tokenizer_folder, language):
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = ["".join(ENGLISH), "".join(CHINESE), "x"]
    chunk = TextChunk("text", [("here", number, text.encode()) for number, text in enumerate(texts, 2)], 1)
    encoded = encode(chunk, tokenizer, EncodeOptions("text", 0.0, language))
    documents = np.split(encoded.tokens, np.cumsum(encoded.documents.lengths)[:-1])
    assert [tokenizer.decode(ids[:-1]) for ids in documents] == texts
    if language is None:
        assert encoded.documents.sentences.tolist() == [0, 0, 0]
        return
    found = np.split(encoded.sentence_starts, np.cumsum(encoded.documents.sentences)[:-1])
    for sentences, ids, starts in zip((ENGLISH, CHINESE, ["x"]), documents, found, strict=True):
        assert [tokenizer.decode(part) for part in np.split(ids[:-1], starts[1:])] == sentences


def test_what_is_no_language_is_refused():
    check_language("zh")
    with pytest.raises(ConfigError, match="sentences in language 'English'"):
        check_language("English")
