"""Text from runs, checkpoints and Hugging Face folders is the same text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from engine.data.tokenizer.wrapping import wrap
from engine.errors import ConfigError
from engine.models.materialize import whole_model
from engine.serve import source
from engine.serve.export import export
from engine.serve.generate import Sampling, generate
from engine.serve.language_model import open_language_model
from engine.serve.source import open_trained
from tests.engine.serve.runs import run_config, save

PROMPT = "A palimpsest is"


def test_greedy_text_is_what_our_own_model_finds_likeliest(trained_run):
    """Their cache and loop against ours without either: the whole row again for every token."""
    language_model = open_language_model(trained_run.folder)
    trained = open_trained(trained_run.folder)
    model = whole_model(trained.config, trained.weights)
    ids = language_model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(tokens_BT=torch.tensor([ids]))["logits_BTV"][0, -1].argmax()))
        if ids[-1] == language_model.tokenizer.eos_token_id:
            break
    text = generate(language_model, PROMPT, Sampling(max_new_tokens=12, temperature=0))
    assert text == language_model.tokenizer.decode(ids, skip_special_tokens=True)
    assert text.startswith(PROMPT)


@pytest.mark.parametrize("form", ["llama3", "mistral", "qwen2-window", "qwen3", "pythia", "neox-in-turn"])
def test_every_kind_of_decoder_says_what_its_whole_rows_say(form, tokenizer, tmp_path):
    """Windows are shorter than the text, so that the cache has to forget."""
    config = run_config(tmp_path / "run", form, tokenizer)
    save(config, step=3, seed=3)
    language_model, trained = open_language_model(config.folder), open_trained(config.folder)
    their_model: Any = language_model.model
    model = whole_model(trained.config, trained.weights)
    ids = language_model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    first = len(ids)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(tokens_BT=torch.tensor([ids]))["logits_BTV"][0, -1].argmax()))
    prompt = torch.tensor([ids[:first]])
    found = their_model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert found[0].tolist() == ids


def test_run_checkpoint_and_exported_folder_give_the_same_text(trained_run, tmp_path):
    exported = export(open_trained(trained_run.folder), tmp_path / "out")
    sources = (trained_run.folder, trained_run.folder / "checkpoints" / "step-00000005", exported.folder)
    texts = {generate(open_language_model(source), PROMPT, Sampling(max_new_tokens=20)) for source in sources}
    assert len(texts) == 1


def test_the_seed_decides_and_nothing_else_random_moves(trained_run):
    language_model = open_language_model(trained_run.folder)
    state = torch.random.get_rng_state()
    first, again, other = (generate(language_model, PROMPT, Sampling(20, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_text_appears_as_it_is_made(trained_run):
    pieces: list[str] = []
    text = generate(open_language_model(trained_run.folder), PROMPT, Sampling(8), on_text=pieces.append)
    assert "".join(pieces) == text
    assert len(pieces) > 1


def test_the_origin_is_told(trained_run, tmp_path):
    assert open_language_model(trained_run.folder).origin == f"step 5 of {trained_run.folder.name}"


def test_what_does_not_fit_is_refused(trained_run):
    language_model = open_language_model(trained_run.folder)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        generate(language_model, "", Sampling())
    num_tokens = len(language_model.tokenizer(PROMPT)["input_ids"])
    message = (
        rf"a prompt of {num_tokens} tokens and 128 new ones are more than the model's 128 positions\n"
        rf"  allowed: at most {128 - num_tokens} new tokens"
    )
    with pytest.raises(ConfigError, match=message):
        generate(language_model, PROMPT, Sampling(max_new_tokens=128))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere is not there\n  allowed: a run folder"):
        open_language_model(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no model"):
        open_language_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read as a Hugging Face model"):
        open_language_model(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(trained_run, tmp_path):
    """transformers would make up an empty one from the model's type."""
    folder = export(open_trained(trained_run.folder), tmp_path / "out").folder
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"out holds no tokenizer\n  allowed: a folder with tokenizer.json"):
        open_language_model(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(trained_run, tmp_path):
    model = open_language_model(export(open_trained(trained_run.folder), tmp_path / "out").folder).model
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"out has \d+ tokens, the model 300 rows"):
        open_language_model(tmp_path / "out")


def test_rows_that_pad_a_vocabulary_are_never_drawn(trained_run, tmp_path):
    """With the head's padding rows made the likeliest by far, text is still text."""
    folder = export(open_trained(trained_run.folder), tmp_path / "out").folder
    language_model = open_language_model(folder)
    num_tokens = len(language_model.tokenizer)
    before = generate(language_model, PROMPT, Sampling(12, temperature=0))
    model = language_model.model
    model.resize_token_embeddings(num_tokens + 28, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[num_tokens:] = 100 * model.lm_head.weight[:1].sign()
    assert generate(language_model, PROMPT, Sampling(12, temperature=0)) == before


def test_a_run_whose_weights_are_not_finite_says_so(trained_run, tmp_path, monkeypatch):
    read = source.CheckpointSource.read

    def broken(self, name, first, end, dim=0):
        values = read(self, name, first, end, dim)
        return values / 0 if name == "final_norm.weight" else values

    monkeypatch.setattr(source.CheckpointSource, "read", broken)
    with pytest.raises(ConfigError, match=r"weights in .*step-00000005 are not finite: final_norm.weight"):
        open_language_model(trained_run.folder)


def test_what_of_a_prompt_cannot_be_spelt_is_told(trained_run, caplog):
    model = open_language_model(trained_run.folder)
    generate(model, PROMPT, Sampling(2))
    assert not caplog.records
    letters = Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2, "[UNK]": 3}, [], unk_token=None))
    unknown = Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2, "[UNK]": 3}, [], unk_token="[UNK]"))
    for tokenizer in (letters, unknown):
        caplog.clear()
        wrapped = wrap(tokenizer, {"eos_token": "</s>"}, set(), {})
        generate(replace(model, tokenizer=wrapped), "a日b", Sampling(2))
        assert "cannot spell 3 of the prompt's 5 bytes" in caplog.text
