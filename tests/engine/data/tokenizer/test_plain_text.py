"""Text never becomes a special token, whatever the model; all other text keeps its tokens."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import DataError
from tests.engine.data.tokenizer import foreign

ORDINARY = ["the rank", "a rank a  the <> /s [x] NOTUSED", "", "_|09", "thethe"]


@pytest.fixture(scope="module", params=[*foreign.UNIGRAM_CLASSES, *foreign.FOLDERS])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("foreign")
    made = foreign.FOLDERS.get(request.param)
    return made(path) if made else foreign.class_folder(request.param, path)


def special_tokens(folder):
    """Names of what is special: marked so in the file, or named in the settings."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [value for key, value in settings.items() if key.endswith("_token")]
    named = [item["content"] if isinstance(item, dict) else item for item in named if item]
    fill = [token["content"] for token in tree["added_tokens"] if "fim" in token["content"]]
    return {*named, *fill, *(token["content"] for token in tree["added_tokens"] if token["special"])}


def test_text_that_spells_a_special_token_only_quotes_it(folder):
    loaded, tokens = load_tokenizer(folder), special_tokens(folder)
    ids = {loaded.model.token_to_id(token) for token in tokens}
    assert None not in ids
    unknown = {loaded.unknown_id}
    for token in tokens:
        texts = [token, f"the {token} a", f"a{token}the", f"{token}{token}", f"{token[0]} {token[1:]}{token[:-1]}"]
        for text, found in zip(texts, loaded.encode(texts), strict=True):
            assert not (ids - unknown) & set(found.tolist()), text
            if loaded.unknown_id not in found:
                assert loaded.decode(found).replace(" ", "") == text.replace(" ", "")


def test_unigram_and_bytes_spell_what_they_quote(folder):
    """Every character of the names has a piece, so nothing of them is unknown but in models of whole words."""
    loaded = load_tokenizer(folder)
    if loaded.model.token_to_id("<") is None:
        pytest.skip("a model of whole words")
    texts = sorted(special_tokens(folder))
    assert not any((found == loaded.unknown_id).any() for found in loaded.encode(texts))


def test_all_other_text_keeps_its_tokens(folder):
    """Against `tokenizers` alone."""
    loaded, library = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [ids.tolist() for ids in loaded.encode(ORDINARY)] == [
        library.encode(text, add_special_tokens=False).ids for text in ORDINARY
    ]
    starts = [found.tolist() for _, found in loaded.encode_with_starts(ORDINARY)]
    assert starts == [
        [start for start, _ in library.encode(text, add_special_tokens=False).offsets] for text in ORDINARY
    ]
    special = {loaded.model.token_to_id(token) for token in special_tokens(folder)}
    assert not special & set(loaded.vocabulary.ordinary_ids.tolist())


def test_text_that_spells_a_byte_piece_is_not_that_byte(tmp_path):
    loaded = load_tokenizer(foreign.byte_pieces(tmp_path))
    [ids] = loaded.encode(["a<0x41>é"])
    assert loaded.decode(ids) == "a<0x41>é"
    assert loaded.model.token_to_id("<0x41>") not in ids
    assert loaded.model.token_to_id("<0xC3>") in ids, "what has no piece is still spelt in bytes"


def test_a_spelling_that_a_normaliser_makes_is_hidden_too(tmp_path):
    model = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *foreign.PIECES], 0))
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    loaded = load_tokenizer(foreign.save(model, tmp_path, eos_token="</s>"))
    [wide] = loaded.encode(["\uff1c/s\uff1e"])
    assert loaded.eos_id not in wide


def test_a_special_token_that_text_is_spelt_with_is_refused(tmp_path):
    foreign.save(foreign.byte_level(), tmp_path, eos_token="</s>", pad_token="!")
    with pytest.raises(DataError, match=r"uses '!' as a special token, but its model spells text with it") as caught:
        load_tokenizer(tmp_path)
    assert "to do: " in str(caught.value)


@pytest.mark.parametrize("model", [models.WordLevel, models.WordPiece])
def test_unknown_text_that_would_become_the_end_of_a_text_is_refused(model, tmp_path):
    tokenizer = Tokenizer(model({"</s>": 0, "the": 1}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    loaded = load_tokenizer(foreign.save(tokenizer, tmp_path, eos_token="</s>"))
    assert loaded.encode(["the the"])[0].tolist() == [1, 1]
    for encode in (loaded.encode, loaded.encode_with_starts):
        with pytest.raises(DataError, match="it would write the special token '</s>' for it"):
            encode(["the rank"])


def test_a_model_without_an_unknown_token_ends_in_one_clear_error(tmp_path):
    tokenizer = Tokenizer(models.Unigram([("</s>", 0.0), ("the", -1.0)], None))
    loaded = load_tokenizer(foreign.save(tokenizer, tmp_path, eos_token="</s>"))
    with pytest.raises(DataError, match="it has no token for what is unknown"):
        loaded.encode(["the rank"])


def test_an_older_folder_names_its_tokens_in_a_file_of_their_own(tmp_path):
    folder = foreign.merged(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "pad_token": "<pad>"})
    )
    loaded = load_tokenizer(folder)
    assert (loaded.eos_id, loaded.vocabulary.padding) == (0, 1)
