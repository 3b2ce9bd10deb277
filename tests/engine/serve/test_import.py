"""Hugging Face folders as checkpoints of ours and back: weights, configuration, tokenizer and side files alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.interchange.huggingface import open_folder
from engine.checkpoint.interchange.mapping import unchanged
from engine.checkpoint.interchange.sources import CheckpointSource
from engine.checkpoint.interchange.sources.fingerprint import fingerprint_of
from engine.checkpoint.storage import location_of
from engine.checkpoint.verify import verify
from engine.cli import main
from engine.corpus.tokenizer_training import train_tokenizer
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE, ConfigError
from engine.models.families import family
from engine.models.materialize import whole_model
from engine.serve.export import TEXT, ExportOptions, export
from engine.serve.generate import Sampling, generate
from engine.serve.import_model import import_folder
from engine.serve.language_model import open_language_model
from engine.serve.source import open_trained
from tests.engine.checkpoint.memory import Alive
from tests.engine.models.tiny import BERT_FORMS, FORMS, T5_FORMS, random_weights, twin

ALL = FORMS | BERT_FORMS | T5_FORMS
CLASSES = (
    "gpt2",
    "llama-tied",
    "llama3",
    "mistral",
    "qwen2-window",
    "qwen3",
    "neox-in-turn",
    "pythia",
    "bert",
    "bert-without-pairs",
    "roberta",
    "megatron-bert",
    "megatron-bert-without-pairs",
    "modernbert",
    "t5",
    "t5-v1.1",
)
_TOKENIZERS = {
    "gpt": ("bpe", "causal", 400),
    "bert": ("wordpiece", "masked", 400),
    "t5": ("bpe", "span_corruption", 450),
}
ODD = {
    "hidden_size": 36,
    "num_heads": 3,
    "head_size": 12,
    "num_kv_heads": 3,
    "vocab_size": 457,
    "feed_forward_size": 52,
}


def folder_of(folder: Path, form: str, dtype: torch.dtype = torch.float32) -> Path:
    """A folder as `save_pretrained` writes it, with a tokenizer, a chat template and other ends than the defaults."""
    # heads of 12 in quarters would be odd
    config = ALL[form].model_copy(update=ODD | ({"partial_rotary_factor": 0.5} if form == "pythia" else {}))
    model = twin(config, random_weights(config, seed=5)).to(dtype)
    model.config.dtype = dtype
    if hasattr(model, "generation_config") and model.generation_config is not None:
        model.generation_config.max_new_tokens = 17
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    if form.startswith("qwen2"):  # transformers 5 splits text by Qwen2's own rules, whatever tokenizer a folder has
        return folder
    kind, purpose, size = _TOKENIZERS[config.family]
    train_tokenizer([TEXT], folder, kind, size, purpose=purpose)  # pyright: ignore[reportArgumentType]
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", CLASSES)
def test_theirs_to_ours_to_theirs_is_identical(form, dtype, tmp_path):
    source = folder_of(tmp_path / "theirs", form, dtype)
    found = import_folder(source, tmp_path / "ours", shard_bytes=40_000)
    assert not verify(found.checkpoint)
    trained = open_trained(tmp_path / "ours")
    assert len(list(trained.checkpoint.glob("*.safetensors"))) > 1
    exported = export(trained, tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(exported.folder / "model.safetensors")
    assert before.keys() - after.keys() <= {"lm_head.weight"}, "a tied head that a file repeats"
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name
    side = {path.name for path in source.iterdir()} - {"model.safetensors"}
    assert {path.name for path in exported.folder.iterdir()} - {"model.safetensors", "README.md"} == side
    for name in side:
        assert (exported.folder / name).read_bytes() == (source / name).read_bytes(), name
    card = (exported.folder / "README.md").read_text()
    assert f"| converted from | huggingface: {source} |" in card
    assert "was converted with Palimpsest" in card


def test_ours_to_theirs_to_ours_is_identical(trained_run, tmp_path):
    trained = open_trained(trained_run.folder)
    export(trained, tmp_path / "theirs", ExportOptions(shard_bytes=60_000))
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    found = import_folder(tmp_path / "theirs", tmp_path / "ours", shard_bytes=10**9)
    assert found.opened.model == trained.config
    again = open_trained(tmp_path / "ours").weights
    assert again.keys() == trained.weights.keys()
    for name, value in trained.weights.items():
        assert torch.equal(again[name], value), name
    # specifications, too: any layout loads it as it loads a run's checkpoint
    assert found.checkpoint.is_dir()
    assert CheckpointSource(found.checkpoint).manifest.specs == CheckpointSource(trained.checkpoint).manifest.specs


def test_what_was_imported_computes_and_continues_as_theirs(tmp_path):
    source = folder_of(tmp_path / "theirs", "llama-tied")
    import_folder(source, tmp_path / "ours", 10**9)
    trained = open_trained(tmp_path / "ours")
    theirs = open_language_model(source)
    tokens_BT = torch.arange(100)[None]
    with torch.no_grad():
        ours = whole_model(trained.config, trained.weights)(tokens_BT=tokens_BT)["logits_BTV"]
        torch.testing.assert_close(theirs.model(tokens_BT).logits, ours, rtol=0, atol=1e-4)
    said = [generate(open_language_model(one), "In ink", Sampling(6)) for one in (source, tmp_path / "ours")]
    assert said[0] == said[1]


def test_the_fingerprint_is_of_the_weights_and_not_of_files(tmp_path):
    source = folder_of(tmp_path / "theirs", "gpt2")
    opened = open_folder(source)
    found = import_folder(source, tmp_path / "ours", 40_000)
    ours, specs = CheckpointSource(found.checkpoint), family(opened.model).specs(opened.model)
    assert fingerprint_of(ours, unchanged(specs)) == fingerprint_of(opened.source, opened.map)
    state = load_file(source / "model.safetensors")
    state["transformer.ln_f.weight"] += 1e-6
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_of(open_folder(source).source, opened.map) != fingerprint_of(ours, unchanged(specs))


def test_a_folder_behind_a_url_is_read(tmp_path):
    source, files = folder_of(tmp_path / "theirs", "gpt2"), fsspec.filesystem("memory")
    for path in source.iterdir():
        files.pipe_file(f"/behind/{path.name}", path.read_bytes())
    found = import_folder(location_of("memory://behind"), tmp_path / "ours", 10**9)
    opened = open_folder(source)
    assert fingerprint_of(found.opened.source, found.opened.map) == fingerprint_of(opened.source, opened.map)
    assert {path.name for path in (tmp_path / "ours" / "huggingface").iterdir()} == {
        path.name for path in source.iterdir()
    } - {"model.safetensors"}


def rename(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({change(name): value for name, value in state.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("gpt2", lambda name: name.removeprefix("transformer.")),
        (
            "bert",
            lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ),
        ),
    ],
)
def test_older_names_are_read(form, change, tmp_path):
    source = folder_of(tmp_path / "theirs", form)
    opened = open_folder(source)
    before = fingerprint_of(opened.source, opened.map)
    rename(source, change)
    again = open_folder(source).check()
    assert fingerprint_of(again.source, again.map) == before


def alter(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_repeated_and_meaningless_tensors_pass_and_contradictions_are_told(tmp_path):
    source = folder_of(tmp_path / "theirs", "gpt2")
    repeat = {"lm_head.weight": "transformer.wte.weight"}
    alter(source, lambda s: s.update({name: s[of].clone() for name, of in repeat.items()}))
    alter(source, lambda s: s.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}))
    open_folder(source).check()
    alter(source, lambda s: s["lm_head.weight"].add_(1))
    with pytest.raises(
        ConfigError, match=r"lm_head.weight is not transformer.wte.weight, although config.json ties them"
    ):
        open_folder(source).check()
    alter(source, lambda s: s.update({"transformer.h.0.extra": torch.ones(1)}))
    with pytest.raises(ConfigError, match=r"the model has no place for transformer.h.0.extra"):
        open_folder(source).check()


@pytest.mark.parametrize(
    ("form", "architecture"), [("bert", "BertForMaskedLM"), ("megatron-bert", "MegatronBertForMaskedLM")]
)
def test_a_class_without_the_pair_head_keeps_the_head_that_its_files_have(form, architecture, tmp_path):
    source = folder_of(tmp_path / "theirs", form)
    tree = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(tree | {"architectures": [architecture]}))
    found = import_folder(source, tmp_path / "ours", 10**9)
    assert found.opened.model == ALL[form].model_copy(update=ODD)
    exported = export(open_trained(tmp_path / "ours"), tmp_path / "back")
    assert json.loads((exported.folder / "config.json").read_text())["architectures"] == [architecture]


def test_memory_holds_one_parameter_at_a_time(tmp_path):
    source = folder_of(tmp_path / "theirs", "llama-tied")
    largest = max(value.nbytes for value in load_file(source / "model.safetensors").values())
    with Alive() as alive:
        import_folder(source, tmp_path / "ours", 10**9)
    assert largest <= alive.peak <= 3 * largest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: alter(f, lambda s: s["model.norm.weight"].fill_(torch.nan)), "are not finite: model.norm.weight"),
        (lambda f: alter(f, lambda s: s.pop("model.norm.weight")), "no file holds model.norm.weight"),
        (lambda f: train_tokenizer([TEXT * 3], f, "bpe", 480), r"has 480 tokens, the model 457 rows"),
        (lambda f: shutil.rmtree(f), "is not there"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(tmp_path, capsys, damage, message):
    source = folder_of(tmp_path / "theirs", "llama-tied")
    damage(source)
    assert main(["convert", str(source), "--output", str(tmp_path / "ours")]) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"theirs"}


@pytest.mark.parametrize("text", ["[]", "{", "null", '{"model": 5}', ""])
def test_a_tokenizer_that_is_none_is_told_and_leaves_nothing(tmp_path, capsys, text):
    source = folder_of(tmp_path / "theirs", "llama-tied")
    (source / "tokenizer.json").write_text(text)
    assert main(["convert", str(source), "--output", str(tmp_path / "ours")]) == EXIT_FAILURE
    assert "cannot be loaded" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_the_command_tells_what_it_did(tmp_path, capsys):
    source = folder_of(tmp_path / "theirs", "gpt2", torch.bfloat16)
    assert main(["convert", str(source), "--output", str(tmp_path / "ours")]) == EXIT_DONE
    said = capsys.readouterr().out
    assert "parameters in GPT-2 form, bfloat16 in the source; every weight read back bitwise equal" in said
    command = ["convert", str(tmp_path / "ours"), "--output", str(tmp_path / "back"), "--verify", "sample"]
    assert main([*command, "--dtype", "fp16", "--shard-size", "30KB"]) == EXIT_DONE
    said = capsys.readouterr().out
    assert "(huggingface, fp16)" in said
    assert "the first and last rows of every weight is bitwise equal" in said
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float16"
    assert main(["checkpoint", "diff", str(tmp_path / "ours"), str(source)]) == EXIT_DONE
    assert "tensors are bitwise equal" in capsys.readouterr().out
    for wrong, allowed in (
        (["--weights", "ema"], "--weights with --to huggingface"),
        (["--shard-size", "much"], "5GB, 500MB or 2GiB"),
    ):
        assert main(["convert", str(source), "--output", str(tmp_path / "no"), *wrong]) == EXIT_USAGE
        assert allowed in capsys.readouterr().err
