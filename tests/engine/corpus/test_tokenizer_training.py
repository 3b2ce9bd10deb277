"""Trained tokenizers are the same each time, spell everything, and the converted ones split as SentencePiece does."""

from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, BertTokenizer

from engine.corpus.sources.chunks import read_texts
from engine.corpus.tokenizer_training import (
    PURPOSE_TOKENS,
    SENTENCEPIECE_FILE,
    SMALLEST_VOCABULARY,
    train_tokenizer,
)
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import ConfigError, DataError
from tests.engine.data.corpus import made_up_texts

KINDS = ("bpe", "sentencepiece-unigram", "sentencepiece-bpe")
TRICKY = [
    "a  b\n\n\tc   d \n",
    "<|endoftext|> <|padding|> <|unknown|> <0x41><0x0A> <s>",
    "日本語 naïve 😀 \u0301 \u200b",
    "\r\n x\r",
    "x\0y",
    "",
    " ",
    "================ ----",
]
VOCABULARY = 430


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, train_tokenizer(made_up_texts(200), folder, request.param, VOCABULARY)


def test_every_text_comes_back_and_nothing_is_unknown_or_special(trained):
    _, tokenizer = trained
    texts = made_up_texts(100, seed=1) + TRICKY
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2} & set(ids.tolist())


def test_words_are_learnt(trained):
    _, tokenizer = trained
    texts = made_up_texts(100, seed=1)
    assert sum(map(len, tokenizer.encode(texts))) < 0.7 * sum(len(text.encode()) for text in texts)


def test_the_first_ids_are_agreed(trained):
    kind, tokenizer = trained
    loaded = AutoTokenizer.from_pretrained(tokenizer.folder)
    assert (tokenizer.eos_id, tokenizer.unknown_id) == (0, 2)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id) == (0, 0, 1, 2)
    assert SMALLEST_VOCABULARY[kind] <= tokenizer.vocab_size <= VOCABULARY


def test_training_twice_gives_the_same_files(trained, tmp_path):
    kind, tokenizer = trained
    again = train_tokenizer(iter(made_up_texts(200)), tmp_path, kind, VOCABULARY)
    assert again.hash == tokenizer.hash
    for path in tokenizer.folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_conversion_splits_as_sentencepiece_does(kind, tmp_path):
    """Against SentencePiece itself, on its own file."""
    texts = made_up_texts(200)
    ours = train_tokenizer(texts, tmp_path, kind, 460)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / SENTENCEPIECE_FILE))
    assert ours.vocab_size == theirs.get_piece_size()
    probes = made_up_texts(100, seed=2) + TRICKY
    for text, ids in zip(probes, ours.encode(probes), strict=True):
        expected = theirs.encode(text)
        if kind == "sentencepiece-bpe":
            assert ids.tolist() == expected
            continue
        # unigram may break a tie between equally likely splits the other way round
        scores = [sum(map(theirs.get_score, pieces)) for pieces in (ids.tolist(), expected)]
        # float32 scores of at most 20 each: rounding of a sum of n is below n * 20 * 2^-23
        assert scores[0] == pytest.approx(scores[1], abs=max(1, len(expected)) * 20 * 2**-23)


@pytest.mark.parametrize("name", ["en_docs", "zh"])
def test_real_text_comes_back(trained, name):
    path = Path(__file__).parents[5] / "shared" / "data" / "corpus" / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    _, tokenizer = trained
    # U+2581 is SentencePiece's sign for a space, and comes back as one
    texts = [text.replace("\u2581", " ") for text in read_texts([str(path)], "text", False, max_bytes=300_000)]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_refused_and_nothing_is_left_behind(kind, tmp_path):
    with pytest.raises(DataError, match="there is no text to train a tokenizer on"):
        train_tokenizer([" ", "\n"], tmp_path, kind, VOCABULARY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_without_room_for_the_bytes_is_refused(kind, tmp_path):
    smallest = SMALLEST_VOCABULARY[kind]
    with pytest.raises(ConfigError, match=f"a {kind} vocabulary of {smallest - 1} tokens") as caught:
        train_tokenizer(["text"], tmp_path, kind, smallest - 1)
    assert f"{smallest} or more" in str(caught.value)
    assert train_tokenizer(["the wave rises = 1"] * 50, tmp_path, kind, smallest).vocab_size <= smallest


def test_what_sentencepiece_cannot_train_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="SentencePiece cannot train 370 tokens") as caught:
        train_tokenizer(["".join(map(chr, range(0x4E00, 0x4F00)))], tmp_path, "sentencepiece-unigram", 370)
    assert "name a larger --vocab-size" in str(caught.value)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the tokenizer to .*file"):
        train_tokenizer(["text"], tmp_path / "file", "bpe", VOCABULARY)


def test_what_was_trained_is_what_is_loaded(trained):
    _, tokenizer = trained
    assert load_tokenizer(tokenizer.folder).hash == tokenizer.hash


def test_wordpiece_is_read_by_transformers_as_bert_and_splits_equally(tmp_path):
    """Against transformers' own BertTokenizer on the same vocabulary."""
    ours = train_tokenizer(made_up_texts(200), tmp_path, "wordpiece", 400)
    assert train_tokenizer(made_up_texts(200), tmp_path / "again", "wordpiece", 400).hash == ours.hash
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (ours.eos_id, ours.unknown_id) == (3, 1)
    bert = BertTokenizer(vocab=loaded.get_vocab(), do_lower_case=False)
    for text in [*made_up_texts(50, seed=1), *TRICKY]:
        expected = bert(text)["input_ids"]
        assert loaded(text)["input_ids"] == expected
        assert (
            ours.encode([text.replace("<|", "< |")])[0].tolist() == bert(text.replace("<|", "< |"))["input_ids"][1:-1]
        )
    assert loaded("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]


def test_lowercase_drops_case_and_accents_in_wordpiece_alone(tmp_path):
    ours = train_tokenizer(made_up_texts(200), tmp_path, "wordpiece", 400, lowercase=True)
    one, other = ours.encode(["The Naïve WAVE", "the naive wave"])
    assert one.tolist() == other.tolist()
    with pytest.raises(ConfigError, match="lowercase with a bpe tokenizer"):
        train_tokenizer(["text"], tmp_path, "bpe", VOCABULARY, lowercase=True)


@pytest.mark.parametrize(("purpose", "kind"), [("masked", "bpe"), ("span_corruption", "sentencepiece-unigram")])
def test_what_a_purpose_needs_has_the_last_ids_and_a_vocabulary_has_room_for_it(tmp_path, purpose, kind):
    extra = PURPOSE_TOKENS[purpose]
    ours = train_tokenizer(made_up_texts(200), tmp_path, kind, 500, purpose)
    ids = [ours.model.token_to_id(token) for token in extra]
    assert ids == list(range(ours.vocab_size - len(extra), ours.vocab_size))
    assert ours.vocab_size <= 500
    with pytest.raises(ConfigError, match=f"{SMALLEST_VOCABULARY[kind] + len(extra)} or more"):
        train_tokenizer(["text"], tmp_path, kind, SMALLEST_VOCABULARY[kind] + len(extra) - 1, purpose)
