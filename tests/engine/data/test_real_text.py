"""English and Chinese through every kind of tokenizer: round trip, unknown tokens, bytes per token, sentences."""

import gzip
import itertools
import json
from pathlib import Path

import pytest

from engine.corpus.sentences import sentence_starts
from engine.corpus.tokenizer_training import SMALLEST_VOCABULARY, train_tokenizer

CORPUS = Path(__file__).parents[4] / "shared" / "data" / "corpus"
pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason=f"there is no {CORPUS}")

TRAINED_ON, TRIED_ON = 120, 30
VOCABULARY = 6000


def texts_of(name: str, first: int, count: int) -> list[str]:
    with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in itertools.islice(lines, first, first + count)]


@pytest.mark.parametrize("kind", sorted(SMALLEST_VOCABULARY))
def test_both_languages_are_spelt_back_in_few_tokens(kind, tmp_path):
    """Byte-level kinds lose nothing; WordPiece loses blanks, and characters beyond a third of its vocabulary. Bounds
    are wide: a vocabulary of bytes would give 1 byte per token, and 6,000 tokens of both languages are far from 8."""
    names = ("en_docs", "zh")
    training = [text for name in names for text in texts_of(name, 0, TRAINED_ON)]
    tokenizer = train_tokenizer(training, tmp_path, kind, VOCABULARY, "masked")
    for name in names:
        texts = texts_of(name, TRAINED_ON, TRIED_ON)
        encoded = tokenizer.encode(texts)
        bytes_per_token = sum(len(text.encode()) for text in texts) / sum(ids.size for ids in encoded)
        assert 1.5 < bytes_per_token < 8, (name, bytes_per_token)
        unknown = sum(int((ids == tokenizer.unknown_id).sum()) for ids in encoded)
        if kind == "wordpiece":
            alphabet = {token.removeprefix("##") for token in tokenizer.model.get_vocab()}
            written = [character for text in texts for character in text if not character.isspace()]
            uncovered = sum(character not in alphabet for character in written)
            assert unknown <= uncovered < 0.1 * len(written)
            continue
        assert unknown == 0
        assert [tokenizer.decode(ids) for ids in encoded] == [text.replace("▁", " ") for text in texts]


@pytest.mark.parametrize(("name", "language"), [("en_prose", "en"), ("zh", "zh"), ("zh", "en")])
def test_sentences_are_of_a_sane_length(name, language):
    """In characters: an English sentence has some hundred, a Chinese one some tens; documents are no sentences."""
    texts = texts_of(name, 0, TRIED_ON)
    per_sentence = sum(map(len, texts)) / sum(sentence_starts(text, language).size for text in texts)
    assert 8 < per_sentence < 250, per_sentence
