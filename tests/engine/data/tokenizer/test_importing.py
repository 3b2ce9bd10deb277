"""A tokenizer of transformers' splits text as before, and has what an objective needs."""

import pytest

from engine.data.tokenizer.folder import load_tokenizer
from engine.data.tokenizer.importing import import_tokenizer
from engine.data.tokenizer.training import NUM_SENTINELS, train_tokenizer
from engine.errors import DataError
from tests.engine.data.corpus import made_up_texts


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
