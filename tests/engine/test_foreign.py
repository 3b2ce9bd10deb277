"""Code that comes with a downloaded folder is refused, by every reader, before transformers asks about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from engine.checkpoint.interchange.huggingface import from_huggingface, open_folder
from engine.corpus.tokenizer_import import import_tokenizer
from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import ConfigError
from engine.foreign import refuse_custom_code
from engine.serve.language_model import open_language_model, read_tokenizer

SPY = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole model with its tokenizer, and a module that leaves a mark when it runs."""
    train_tokenizer(["some text to learn from"] * 9, tmp_path, "bpe", 300)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=8, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(SPY)
    return tmp_path


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


MODELS = {"model_type": "elsewhere", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}


@pytest.mark.parametrize("known", [True, False], ids=["known class", "unknown class"])
@pytest.mark.parametrize("read", [from_huggingface, open_folder, open_language_model])
def test_a_model_with_code_is_refused(folder, monkeypatch, read, known):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asks on the terminal"))
    change(folder / "config.json", **({"auto_map": MODELS["auto_map"]} if known else MODELS))
    with pytest.raises(ConfigError, match=r"code of its own, .*never run \(config.json names it in auto_map: Auto"):
        read(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("read", [load_tokenizer, read_tokenizer, lambda f: import_tokenizer(str(f), f / "copy")])
def test_a_tokenizer_with_code_is_refused(folder, monkeypatch, read):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asks on the terminal"))
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]})
    with pytest.raises(ConfigError, match=r"never run \(tokenizer_config.json names it in auto_map"):
        read(folder)
    assert not (folder / "ran").exists()
    assert not (folder / "copy").exists()


def test_a_generate_of_its_own_is_refused(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asks on the terminal"))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(SPY)
    with pytest.raises(ConfigError, match=r"never run \(custom_generate/ replaces generate"):
        open_language_model(folder)


def test_a_kernel_from_a_hub_is_refused(folder):
    change(folder / "config.json", _attn_implementation="somebody/flash-attn")
    with pytest.raises(ConfigError, match=r"takes its attention from a hub: _attn_implementation = somebody/flash"):
        open_language_model(folder)
    change(folder / "config.json", _attn_implementation="sdpa")
    open_language_model(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"auto_map": null}', '{"auto_map": {}}'])
def test_what_names_no_code_passes(tmp_path, text):
    refuse_custom_code(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(text)
    refuse_custom_code(tmp_path)
