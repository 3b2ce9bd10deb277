"""A tokenizer of transformers' splits text as before, and has what an objective needs."""

import io
import json

import pytest
import sentencepiece
from tokenizers import Tokenizer

from engine.corpus.tokenizer_import import import_tokenizer
from engine.corpus.tokenizer_training import NUM_SENTINELS, train_tokenizer
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import DataError
from tests.engine.data.corpus import made_up_texts
from tests.engine.data.tokenizer import foreign


def test_one_of_ours_is_taken_over_as_it_is(tokenizer_folder, tmp_path):
    taken, added = import_tokenizer(str(tokenizer_folder), tmp_path / "taken")
    before = load_tokenizer(tokenizer_folder)
    assert (taken.hash, added) == (before.hash, [])


def test_berts_own_class_is_taken_over(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "rank", "##s", "of"]
    theirs = transformers.BertTokenizerFast(vocab={token: number for number, token in enumerate(vocabulary)})
    theirs.save_pretrained(tmp_path / "theirs")
    taken, added = import_tokenizer(str(tmp_path / "theirs"), tmp_path / "taken", "masked")
    assert added == []
    assert (taken.vocabulary.classify, taken.vocabulary.separate, taken.vocabulary.mask) == (2, 3, 4)
    assert taken.encode(["The ranks of"])[0].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("purpose", "count"), [("masked", 3), ("span_corruption", NUM_SENTINELS), ("fill_in_the_middle", 3)]
)
def test_what_an_objective_needs_is_added_behind_all_others(tokenizer_folder, tmp_path, purpose, count):
    before = load_tokenizer(tokenizer_folder)
    taken, added = import_tokenizer(str(tokenizer_folder), tmp_path / "taken", purpose)
    assert len(added) == count
    assert taken.vocab_size == before.vocab_size + count
    texts = made_up_texts(20)
    assert [ids.tolist() for ids in taken.encode(texts)] == [ids.tolist() for ids in before.encode(texts)]
    known = taken.vocabulary
    needed = {"masked": [known.mask, known.classify, known.separate], "span_corruption": list(known.sentinels)}
    assert sorted(needed.get(purpose, list(known.fill))) == list(range(before.vocab_size, taken.vocab_size))


def test_what_is_no_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        import_tokenizer(str(tmp_path / "empty"), tmp_path / "taken")
    assert "check the name or the folder" in str(caught.value)
    train_tokenizer(made_up_texts(100), tmp_path / "bpe", "bpe", 300)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the tokenizer"):
        import_tokenizer(str(tmp_path / "bpe"), tmp_path / "file" / "taken")


@pytest.mark.parametrize("tokenizer_class", foreign.REBUILT_CLASSES)
def test_text_is_split_as_the_file_says_whatever_the_class(tokenizer_class, tmp_path):
    """Against `tokenizers` alone, on the source's own file."""
    source = foreign.other_splitting(tmp_path / "theirs", tokenizer_class)
    library = Tokenizer.from_file(str(source / "tokenizer.json"))
    taken, added = import_tokenizer(str(source), tmp_path / "taken", "masked")
    assert "[MASK]" in added
    texts = [*made_up_texts(20), "the 2024 rank,  don't\n\n\tx=1", " the", "the</s>"]
    plain = [text.replace("</s>", "< /s>") for text in texts]
    assert [ids.tolist() for ids in taken.encode(plain)] == [
        library.encode(text, add_special_tokens=False).ids for text in plain
    ]
    assert [ids.tolist() for ids in load_tokenizer(source).encode(texts)] == [
        ids.tolist() for ids in taken.encode(texts)
    ]
    assert (taken.eos_id, taken.vocabulary.padding) == (0, 1)


def test_a_cased_bert_keeps_its_case_and_the_names_of_its_class(tmp_path):
    source = foreign.cased_bert(tmp_path / "theirs")
    taken, added = import_tokenizer(str(source), tmp_path / "taken", "masked")
    library = Tokenizer.from_file(str(source / "tokenizer.json"))
    text = "The RANK of \u00c9"
    assert taken.encode([text])[0].tolist() == library.encode(text, add_special_tokens=False).ids
    assert (added, taken.eos_id, taken.vocabulary.mask, taken.vocabulary.padding) == ([], 3, 4, 0)


@pytest.mark.parametrize("name", foreign.UNIGRAM_CLASSES)
def test_unigram_classes_keep_their_splitting(name, tmp_path):
    source = foreign.class_folder(name, tmp_path / "theirs")
    library = Tokenizer.from_file(str(source / "tokenizer.json"))
    taken, _ = import_tokenizer(str(source), tmp_path / "taken")
    for text in ("the rank  a", "a rank\nthe, 12"):
        assert taken.encode([text])[0].tolist() == library.encode(text, add_special_tokens=False).ids
    assert taken.vocab_size == load_tokenizer(source).vocab_size


def test_settings_that_rebuild_a_tokenizer_are_not_taken_over(tmp_path):
    """A blank before the text, as one reader of the folder would add and another would not."""
    source = foreign.save(foreign.byte_level(), tmp_path / "theirs", eos_token="</s>", add_prefix_space=True)
    taken, _ = import_tokenizer(str(source), tmp_path / "taken")
    expected = Tokenizer.from_file(str(source / "tokenizer.json")).encode("the", add_special_tokens=False).ids
    assert taken.encode(["the"])[0].tolist() == expected
    assert not json.loads((tmp_path / "taken" / "tokenizer_config.json").read_text()).get("add_prefix_space")


def test_a_folder_without_a_file_of_rules_is_converted_by_its_class(tmp_path):
    (tmp_path / "theirs").mkdir()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the", "rank", "##s"]
    (tmp_path / "theirs" / "vocab.txt").write_text("\n".join(pieces) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(settings))
    taken, added = import_tokenizer(str(tmp_path / "theirs"), tmp_path / "taken", "masked")
    assert (taken.encode(["The the ranks"])[0].tolist(), added) == ([5, 6, 7, 8], [])


def test_a_sentencepiece_model_is_converted_and_splits_as_sentencepiece_does(tmp_path):
    """T5's own files: control symbols in the model, sentinels behind it."""
    (tmp_path / "theirs").mkdir()
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(made_up_texts(200)),
        model_writer=content,
        vocab_size=150,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "theirs" / "spiece.model").write_bytes(content.getvalue())
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    taken, _ = import_tokenizer(str(tmp_path / "theirs"), tmp_path / "taken", "span_corruption")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
    assert taken.eos_id == theirs.eos_id() == 1
    assert len(taken.vocabulary.sentinels) == NUM_SENTINELS
    for text in ("the wave rises over", "a</s> rank <pad> <extra_id_0>", "return x"):
        [ids] = taken.encode([text])
        assert not {0, 1} & set(ids.tolist())
        assert not set(taken.vocabulary.sentinels) & set(ids.tolist())
        assert ids.tolist() == theirs.encode(text)


@pytest.mark.parametrize("name", foreign.FOLDERS)
def test_a_folder_is_read_alike_directly_and_taken_over(name, tmp_path):
    source = foreign.FOLDERS[name](tmp_path / "theirs")
    direct = load_tokenizer(source)
    taken, added = import_tokenizer(str(source), tmp_path / "taken")
    texts = ["the rank  a", "a</s>b [MASK] <0x41> <|fim_prefix|>", "é"]
    assert [ids.tolist() for ids in taken.encode(texts)] == [ids.tolist() for ids in direct.encode(texts)]
    assert (added, taken.eos_id, taken.unknown_id) == ([], direct.eos_id, direct.unknown_id)
    assert taken.vocabulary == direct.vocabulary
