"""A tokenizer in an exported folder frames and cuts texts as the model's training did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from engine.config.schema.model import BERTConfig
from engine.data.tokenizer.folder import load_tokenizer
from engine.serve.tokenizer_files import write_tokenizer
from tests.engine.models.tiny import BERT_FORMS, FORMS, T5_FORMS
from tests.readers.kinds import make_tokenizer

ALL = FORMS | BERT_FORMS | T5_FORMS


def written(kind: str, form: str, folder: Path) -> tuple[Tokenizer, dict, Path]:
    """The written tokenizer, its settings, and the folder it came from."""
    make_tokenizer(kind, folder / "from")
    (folder / "to").mkdir()
    write_tokenizer(folder / "from", folder / "to", ALL[form])
    settings = json.loads((folder / "to" / "tokenizer_config.json").read_text())
    return Tokenizer.from_file(str(folder / "to" / "tokenizer.json")), settings, folder / "from"


@pytest.mark.parametrize(
    ("kind", "form", "head", "tail"),
    [
        ("bpe-causal", "gpt2", [], []),
        ("imported-llama-causal", "llama", [], []),  # <|begin_of_text|> was never in a row
        ("bpe-span_corruption", "t5", [], ["end"]),
        ("imported-gpt2-span_corruption", "t5", [], ["end"]),
        ("wordpiece-masked", "bert", ["classify"], ["separate"]),
        ("imported-plain-masked", "bert", ["classify"], ["separate"]),
        ("imported-roberta-masked", "roberta", ["classify"], ["separate"]),
    ],
)
def test_texts_are_framed_as_in_training(kind, form, head, tail, tmp_path):
    tokenizer, settings, source = written(kind, form, tmp_path)
    before = load_tokenizer(source)
    ids = {"end": before.eos_id, "classify": before.vocabulary.classify, "separate": before.vocabulary.separate}
    for text in ("In ink.", "two words"):
        (plain,) = before.encode([text])
        assert tokenizer.encode(text).ids == [*(ids[role] for role in head), *plain, *(ids[role] for role in tail)]
    assert settings["model_max_length"] == 128
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("form", ALL)
def test_token_types_are_made_for_models_that_have_them(form, tmp_path):
    model = ALL[form]
    _, settings, _ = written("wordpiece-masked", form, tmp_path)
    has_types = isinstance(model, BERTConfig) and model.token_types > 1
    assert ("token_type_ids" in settings["model_input_names"]) == has_types


def test_a_tokenizer_that_needs_no_change_is_copied_byte_by_byte(tmp_path):
    """Its hash is that of the shards."""
    make_tokenizer("bpe-span_corruption", tmp_path / "from")
    (tmp_path / "to").mkdir()
    write_tokenizer(tmp_path / "from", tmp_path / "to", ALL["t5"])
    same = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("from", "to")]
    assert same[0] == same[1]
    assert load_tokenizer(tmp_path / "from").hash == load_tokenizer(tmp_path / "to").hash


def test_truncation_that_somebody_left_on_and_strange_files_stay_behind(tmp_path):
    make_tokenizer("bpe-causal", tmp_path / "from")
    path = tmp_path / "from" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(path))
    (tmp_path / "from" / "notes.txt").write_text("mine")
    (tmp_path / "from" / "merges.txt").write_text("for older readers")
    (tmp_path / "to").mkdir()
    write_tokenizer(tmp_path / "from", tmp_path / "to", ALL["gpt2"])
    assert len(Tokenizer.from_file(str(tmp_path / "to" / "tokenizer.json")).encode("long " * 20).ids) > 7
    names = {path.name for path in (tmp_path / "to").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "merges.txt"}


def test_span_corruption_pads_with_the_end_token_where_there_is_no_other(tmp_path):
    _, settings, source = written("imported-gpt2-span_corruption", "t5", tmp_path)
    assert load_tokenizer(source).vocabulary.padding is None
    assert settings["pad_token"] == settings["eos_token"]
