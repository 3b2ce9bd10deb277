"""The exported tokenizer gives the ids that the shards of the run have, or nothing is exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from engine.cli import main
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.writer import ShardWriter
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import EXIT_USAGE, CheckpointError
from engine.serve import export as module
from engine.serve.export import export
from engine.serve.generate import Sampling, generate
from engine.serve.language_model import open_language_model, read_tokenizer
from engine.serve.source import Trained, open_trained
from tests.engine.data.corpus import made_up_texts, write_json_lines
from tests.engine.data.tokenizer import foreign
from tests.engine.serve.runs import run_config, save

TEXTS = [*made_up_texts(20), "2024 ranks, don't the 12345\n\n\tx=1", "a</s>b quotes the end"]


def trained_on(tmp_path: Path, tokenizer: Path, shards: Path) -> Trained:
    config = run_config(tmp_path / "run", "gpt2", tokenizer, shards)
    save(config, step=3, seed=3)
    return open_trained(config.folder)


def prepared(tmp_path: Path, tokenizer: Path) -> Path:
    source = write_json_lines(tmp_path / "texts.jsonl", TEXTS)
    prepare(PrepareOptions((str(source),), tokenizer, tmp_path / "tokens", validation_fraction=0))
    return tmp_path / "tokens" / "train"


def documents(shards: Path) -> list[list[int]]:
    shard = TokenDataset(shards).shard(0)
    return [part[:-1].tolist() for part in np.split(shard.tokens, shard.documents[1:-1])]


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer", "RobertaTokenizer"])
def test_a_folder_that_was_named_directly_is_exported_with_the_splitting_of_its_shards(tokenizer_class, tmp_path):
    tokenizer = foreign.other_splitting(tmp_path / "tokenizer", tokenizer_class)
    shards = prepared(tmp_path, tokenizer)
    trained = trained_on(tmp_path, tokenizer, shards)
    exported = export(trained, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(exported.folder)
    quoting, num_tokens = 0, 0
    for ids in documents(shards):
        text = theirs.decode(ids)
        if "</s>" in text:
            quoting += 1
            continue
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        num_tokens += len(ids)
    assert (quoting, exported.num_shard_tokens) == (1, num_tokens)
    for folder in (tokenizer, exported.folder):
        found = read_tokenizer(folder)("the 2024", add_special_tokens=False)["input_ids"]
        assert found == load_tokenizer(tokenizer).encode(["the 2024"])[0].tolist()
    texts = {
        generate(open_language_model(place), "the 2024 rank", Sampling(8))
        for place in (trained.checkpoint, exported.folder)
    }
    assert len(texts) == 1


def test_a_cased_bert_is_exported_with_its_case(tmp_path):
    names = {"sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    tokenizer = foreign.cased_bert(tmp_path / "tokenizer", **names)
    source = write_json_lines(tmp_path / "texts.jsonl", ["THE RANK OF aB", "x y Z"])
    prepare(PrepareOptions((str(source),), tokenizer, tmp_path / "tokens", validation_fraction=0))
    exported = export(trained_on(tmp_path, tokenizer, tmp_path / "tokens" / "train"), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(exported.folder)
    assert [theirs(text, add_special_tokens=False)["input_ids"] for text in ("THE RANK OF aB", "x y Z")] == documents(
        tmp_path / "tokens" / "train"
    )
    assert exported.num_shard_tokens > 0


@pytest.mark.parametrize("name", ["T5", "XLM-R", "CamemBERT"])
def test_unigram_classes_are_exported_with_their_splitting(name, tmp_path):
    tokenizer = foreign.class_folder(name, tmp_path / "tokenizer")
    texts = ["the rank a", "rank <s9>", "a 12 the"]
    source = write_json_lines(tmp_path / "texts.jsonl", texts)
    prepare(PrepareOptions((str(source),), tokenizer, tmp_path / "tokens", validation_fraction=0))
    exported = export(trained_on(tmp_path, tokenizer, tmp_path / "tokens" / "train"), tmp_path / "out")
    assert exported.num_shard_tokens == sum(map(len, documents(tmp_path / "tokens" / "train"))) > 0


def test_shards_that_another_splitting_wrote_are_noticed(tmp_path):
    """A byte per token, under the hash of a tokenizer that merges."""
    tokenizer = foreign.merged(tmp_path / "tokenizer")
    loaded = load_tokenizer(tokenizer)
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with ShardWriter(tmp_path / "tokens", loaded.vocab_size, loaded.eos_id, loaded.hash, 10**6) as writer:
        for text in ["the other", "the rank", "the"]:
            [(letters, _)] = spelt.pre_tokenize_str(text)
            writer.add(np.array([*(loaded.model.token_to_id(letter) for letter in letters), loaded.eos_id]))
    with pytest.raises(CheckpointError, match="gives other ids than the shards of the run have, for 3 of 3 documents"):
        export(trained_on(tmp_path, tokenizer, tmp_path / "tokens"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_differs_on_the_shards_alone_is_noticed(tmp_path, monkeypatch):
    """The fixed text of an export has no `qq`, whose merge is lost on the way."""
    model = foreign.byte_level()
    tree = json.loads(model.to_str())["model"]
    vocabulary, merges = tree["vocab"] | {"qq": len(tree["vocab"])}, [*map(tuple, tree["merges"]), ("q", "q")]
    model.model = models.BPE(vocabulary, merges)
    tokenizer = foreign.save(model, tmp_path / "tokenizer", eos_token="</s>", pad_token="<pad>")
    source = write_json_lines(tmp_path / "texts.jsonl", ["the qq rank"])
    prepare(PrepareOptions((str(source),), tokenizer, tmp_path / "tokens", validation_fraction=0))
    trained = trained_on(tmp_path, tokenizer, tmp_path / "tokens" / "train")
    write_tokenizer = module.write_tokenizer

    def spoil(source, folder, *others):
        write_tokenizer(source, folder, *others)
        tree = json.loads((folder / "tokenizer.json").read_text())
        tree["model"]["merges"].pop()
        (folder / "tokenizer.json").write_text(json.dumps(tree))

    monkeypatch.setattr(module, "write_tokenizer", spoil)
    with pytest.raises(CheckpointError, match="cuts a document of the shards into other tokens"):
        export(trained, tmp_path / "out")


@pytest.mark.parametrize("to", [(), ("--to", "onnx")])
def test_a_class_that_transformers_forces_on_a_form_is_refused_before_any_weight_is_written(
    tokenizer, tmp_path, capsys, monkeypatch, to
):
    save(run_config(tmp_path / "run", "qwen2-window", tokenizer), step=3, seed=3)
    monkeypatch.setattr(module, "export_weights", None)  # nothing is written
    assert main(["convert", str(tmp_path / "run"), "--output", str(tmp_path / "out"), *to]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert f"the tokenizer in {tokenizer} with a model of type qwen2: transformers reads every tokenizer" in said
    assert "as Qwen2Tokenizer, which splits text by rules of its own" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_shards_that_are_gone_are_told(tmp_path, caplog):
    tokenizer = foreign.merged(tmp_path / "tokenizer")
    exported = export(trained_on(tmp_path, tokenizer, tmp_path / "gone"), tmp_path / "out")
    assert exported.num_shard_tokens == 0
    assert "the tokenizer was not compared with the ids in" in caplog.text
