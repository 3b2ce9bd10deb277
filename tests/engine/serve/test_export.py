"""A folder that their library loads is written, or nothing is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from engine.checkpoint.interchange.huggingface import from_huggingface
from engine.checkpoint.interchange.sources import MemorySource
from engine.corpus.tokenizer_training import train_tokenizer
from engine.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem
from engine.models.materialize import whole_model
from engine.serve import export as module
from engine.serve.export import TEXT, export
from engine.serve.generate import Sampling, generate
from engine.serve.language_model import open_language_model
from engine.serve.source import open_trained
from tests.engine.models.tiny import T5_FORMS
from tests.engine.serve.runs import run_config, save


def test_their_library_loads_the_folder_and_computes_the_same(trained_run, tmp_path):
    trained = open_trained(trained_run.folder)
    exported = export(trained, tmp_path / "out")
    assert exported.folder == tmp_path / "out"
    assert exported.num_parameters == sum(value.numel() for value in trained.weights.values())
    assert exported.agreement is not None
    assert 0 <= exported.agreement.largest_difference <= 1e-4 < exported.agreement.largest_logit
    assert exported.agreement.num_tokens == 128  # the model's positions; the text is longer

    model = AutoModelForCausalLM.from_pretrained(exported.folder)
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    assert model.dtype == torch.float32
    tokens_BT = torch.tensor([tokenizer("Archimedes, in ink")["input_ids"]])
    assert tokenizer.decode(tokens_BT[0]) == "Archimedes, in ink"
    with torch.no_grad():
        ours = whole_model(trained.config, trained.weights)(tokens_BT=tokens_BT)["logits_BTV"]
        torch.testing.assert_close(model(tokens_BT).logits, ours, rtol=0, atol=1e-4)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert from_huggingface(exported.folder)[0] == trained.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "nothing is left beside it"


@pytest.mark.parametrize("form", ["bert", "roberta", "megatron-bert", "modernbert"])
def test_encoders_are_written_with_all_their_heads_and_computed_alike(form, tmp_path):
    train_tokenizer([TEXT], tmp_path / "tokenizer", "wordpiece", 400, purpose="masked")
    config = run_config(tmp_path / "run", form, tmp_path / "tokenizer")
    save(config, step=3, seed=3)
    trained = open_trained(config.folder)
    exported = export(trained, tmp_path / "out")
    assert exported.agreement is not None
    assert 0 <= exported.agreement.largest_difference <= 1e-4 < exported.agreement.largest_logit
    assert not (exported.folder / "generation_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    model = AutoModelForMaskedLM.from_pretrained(exported.folder)
    ids = tokenizer("Archimedes, in ink")["input_ids"]
    padded = torch.tensor([ids + [tokenizer.pad_token_id] * 3])
    with torch.no_grad():
        ours = whole_model(trained.config, trained.weights)(tokens_BT=torch.tensor([ids]))["logits_BTV"]
        seen = torch.tensor([[1] * len(ids) + [0] * 3])
        found = model(padded, attention_mask=seen).logits[:, : len(ids)]
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match=r"For(PreTraining|MaskedLM), which predicts masked tokens"):
        generate(open_language_model(exported.folder), "In ink", Sampling(max_new_tokens=2))


@pytest.mark.parametrize("form", T5_FORMS)
def test_an_encoder_decoder_travels_too(tmp_path, form):
    train_tokenizer([TEXT], tmp_path / "tokenizer", "bpe", 450, purpose="span_corruption")
    config = run_config(tmp_path / "run", form, tmp_path / "tokenizer")
    save(config, step=3, seed=3)
    exported = export(open_trained(config.folder), tmp_path / "out")
    assert exported.agreement is not None
    assert 0 <= exported.agreement.largest_difference <= 1e-4 < exported.agreement.largest_logit
    their_config = json.loads((exported.folder / "config.json").read_text())
    assert their_config["decoder_start_token_id"] == their_config["pad_token_id"] is not None
    for source in (exported.folder, config.folder):
        language_model = open_language_model(source)
        said = generate(language_model, "Archimedes, in", Sampling(max_new_tokens=5, temperature=0))
        assert said == by_hand(language_model, "Archimedes, in")


def by_hand(language_model, prompt: str) -> str:
    """Up to five times the likeliest token of the tokenizer, without a cache."""
    model, tokenizer = language_model.model, language_model.tokenizer
    ids_BS = tokenizer(prompt, return_tensors="pt")["input_ids"]
    said_BT = torch.full((1, 1), model.config.decoder_start_token_id)
    for _ in range(5):
        with torch.no_grad():
            logits_BTV = model(input_ids=ids_BS, decoder_input_ids=said_BT).logits[..., : len(tokenizer)]
        said_BT = torch.cat((said_BT, logits_BTV[:, -1:].argmax(-1)), dim=1)
        if said_BT[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(said_BT[0], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["sentencepiece-unigram", "sentencepiece-bpe"])
def test_sentencepiece_tokenizers_travel_too(own_run, tmp_path, kind):
    train_tokenizer([TEXT * 3], tmp_path / "other", kind, 400)
    exported = export(open_trained(own_run.folder, tmp_path / "other"), tmp_path / "out")
    words = AutoTokenizer.from_pretrained(exported.folder)("thrifty monks", add_special_tokens=False)["input_ids"]
    assert AutoTokenizer.from_pretrained(exported.folder).decode(words) == "thrifty monks"


def test_an_output_that_is_taken_is_refused_and_untouched(own_run, tmp_path):
    trained = open_trained(own_run.folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match=r"output .*out exists(.|\n)*new or empty"):
        export(trained, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    assert (export(trained, tmp_path / "out").folder / "config.json").is_file(), "an empty folder is fine"


def test_an_output_that_cannot_be_written_is_refused(own_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"cannot be written(.|\n)*another folder"):
        export(open_trained(own_run.folder), tmp_path / "file" / "out")


def test_a_full_disk_is_told_and_nothing_is_left(own_run, tmp_path, small_disk):
    with pytest.raises(EnvironmentProblem, match=r"out cannot be written: .*[Nn]o space left"):
        export(open_trained(own_run.folder), small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(own_run, tmp_path):
    train_tokenizer([TEXT], tmp_path / "big", "bpe", 600)
    with pytest.raises(ConfigError, match=r"tokens, the model 500 rows\n  allowed: at most 500 tokens"):
        export(open_trained(own_run.folder, tmp_path / "big"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_tokenizer_is_refused(own_run, tmp_path):
    with pytest.raises(DataError, match=r"tokenizer .*run holds no tokenizer.json"):
        export(open_trained(own_run.folder, tmp_path / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _export_with(trained, output, monkeypatch, spoil):
    """Exports with the written folder spoilt before it is read back."""
    write_folder = module.write_folder

    def write_and_spoil(trained, folder, *options):
        written = write_folder(trained, folder, *options)
        spoil(folder)
        return written

    monkeypatch.setattr(module, "write_folder", write_and_spoil)
    export(trained, output)


def test_other_logits_are_noticed(own_run, tmp_path, monkeypatch):
    def other_epsilon(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 0.1}))

    with pytest.raises(CheckpointError, match=r"its logits are off by .*\n  allowed: at most 1e-04"):
        _export_with(open_trained(own_run.folder), tmp_path / "out", monkeypatch, other_epsilon)
    assert not (tmp_path / "out").exists(), "a wrong folder is not kept"


def test_other_weights_are_noticed_though_the_text_does_not_meet_them(own_run, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    def last_row(folder):
        state = load_file(folder / "model.safetensors")
        state["transformer.wte.weight"][-1] += 1e-6
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has other values"):
        _export_with(open_trained(own_run.folder), tmp_path / "out", monkeypatch, last_row)


def test_another_tokenizer_is_noticed(own_run, tmp_path, monkeypatch):
    train_tokenizer([TEXT[:200]], tmp_path / "other", "bpe", 300)

    def swap(source, folder, model):
        (folder / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
        (folder / "tokenizer.json").write_bytes((tmp_path / "other" / "tokenizer.json").read_bytes())

    monkeypatch.setattr(module, "write_tokenizer", swap)
    with pytest.raises(CheckpointError, match="its tokenizer cuts text into other tokens"):
        export(open_trained(own_run.folder), tmp_path / "out")


def test_weights_that_are_no_numbers_are_refused(own_run, tmp_path):
    trained = open_trained(own_run.folder)
    broken = {**trained.weights, "final_norm.weight": torch.full((64,), torch.nan)}
    with pytest.raises(ConfigError, match=r"are not finite: transformer\.ln_f\.weight"):
        export(replace(trained, source=MemorySource(broken, "here")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
