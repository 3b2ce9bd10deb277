"""Shards that a model samples itself: a function of model and seed, whoever makes them and after any kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.cli import main
from engine.config.load import parse_run
from engine.config.schema.run import RunConfig
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.index import read_index
from engine.data.stage import open_parts
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import ConfigError
from engine.models.materialize import whole_model
from engine.serve import synthetic
from engine.serve.sampler import DOCUMENTS, PURPOSE_SYNTHETIC, Sampler
from engine.serve.source import open_trained
from engine.serve.synthetic import Request, generate_replay
from tests.engine.serve.runs import run_config, save

REQUEST = Request(2500, seed=3, shard_bytes=2000)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer) -> RunConfig:
    """A run with one checkpoint of random weights; do not change it."""
    config = run_config(tmp_path_factory.mktemp("run") / "run", "gpt2", tokenizer)
    save(config, step=5, seed=5)
    return config


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    """The shards, made by one process without a break."""
    output = tmp_path_factory.mktemp("whole") / "data"
    generate_replay(run.folder, output, REQUEST)
    return output


def test_shards_are_ordinary_and_say_that_they_are_synthetic(run, whole, capsys):
    tokenizer = load_tokenizer(run.tokenizer)
    dataset = TokenDataset(whole, tokenizer.hash)
    index = dataset.index
    assert index.num_tokens >= REQUEST.num_tokens
    assert str(index.synthetic) == "sampled from step 5 of run (seed 3, temperature 1)"
    assert len(index.shards) > 1
    length = run.stages[0].sequence_length
    for number in range(dataset.num_shards):
        shard = dataset.shard(number)
        for first, end in zip(shard.documents[:-1], shard.documents[1:], strict=True):
            document = shard.tokens[first:end]
            assert 1 <= document.size <= length
            assert tokenizer.eos_id not in document[:-1], "an end ends a document"
            assert document.size == length or document[-1] == tokenizer.eos_id
            assert not set(document.tolist()) & (tokenizer.special_ids - {tokenizer.eos_id})
    assert not (whole / "units").exists()
    assert main(["inspect-data", str(whole), "--samples", "0", "--tokenizer", str(run.tokenizer)]) == 0
    assert "sampled from step 5" in capsys.readouterr().out


def test_a_stage_replays_them(run, whole, caplog):
    stage = run.model_dump(mode="json")["stages"][0] | {"replay": {"ratio": 0.5, "source": str(whole)}}
    stage["data"]["train"] = str(whole)
    config = parse_run(run.model_dump(mode="json") | {"stages": [stage]}, "test")
    with caplog.at_level("INFO", "palimpsest"):
        *_, replayed = open_parts(config.stages[0], load_tokenizer(run.tokenizer).hash, config.model.vocab_size)
    assert replayed.is_replay
    assert "replays synthetic text, sampled from step 5" in caplog.text


def test_killed_anywhere_it_goes_on_to_the_same_bytes(run, whole, tmp_path, monkeypatch):
    """The third unit fails, twice; the next start finds the first two finished."""
    made: list[int] = []
    unit = Sampler.unit

    def failing(self: Sampler, number: int) -> Any:
        if len(made) in (2, 3):
            made.append(-1)
            raise KeyboardInterrupt
        made.append(number)
        return unit(self, number)

    monkeypatch.setattr(Sampler, "unit", failing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            generate_replay(run.folder, tmp_path / "data", REQUEST)
        assert not (tmp_path / "data" / "index.json").exists()
    generate_replay(run.folder, tmp_path / "data", REQUEST)
    assert files(tmp_path / "data") == files(whole)
    assert made[:2] == [0, 1]
    assert made[4:] == list(range(2, len(made) - 2)), "no unit is made twice"
    generate_replay(run.folder, tmp_path / "data", REQUEST)
    assert files(tmp_path / "data") == files(whole), "complete already"


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 0)])
def test_several_processes_make_the_same_bytes(run, whole, tmp_path, order):
    """Three processes one after the other, the first one last; or without the second one, which has died while it began
    the folder."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".generate.json.7-7.partial").touch()
    for position in order:
        generate_replay(run.folder, tmp_path / "data", REQUEST, position, processes=3)
    found = files(tmp_path / "data")
    assert {name: found[name] for name in found if not name.startswith(".")} == files(whole)


def test_tokens_follow_the_models_own_probabilities(run, tmp_path):
    """Cumulative probabilities of our own model, without a cache, bracket each number that was drawn."""
    trained = open_trained(run.folder)
    ours, tokenizer = whole_model(trained.config, trained.weights), load_tokenizer(run.tokenizer)
    sampler = synthetic._sampler(trained, run, tokenizer, Request(10, seed=3), tmp_path)
    document = sampler.unit(1)[4]
    uniform_T = sampler._uniform(PURPOSE_SYNTHETIC, DOCUMENTS + 4)
    for t in range(1, min(document.size, 6)):
        with torch.no_grad():
            logits_V = ours(tokens_BT=torch.tensor(document[None, :t]))["logits_BTV"][0, -1].double().numpy()
        shares = np.exp(logits_V[sampler.text_ids])
        cumulative = np.cumsum(shares / shares.sum())
        place = int(np.flatnonzero(sampler.text_ids == document[t])[0])
        assert cumulative[place] + 1e-5 >= uniform_T[t] >= (cumulative[place - 1] if place else 0) - 1e-5


def test_rows_of_several_documents_begin_behind_an_end_of_text(tmp_path, tokenizer):
    """With `attention: row` the model has learned how a document begins."""
    config = run_config(tmp_path / "run", "gpt2", tokenizer)
    tree = config.model_dump(mode="json")
    tree["stages"][0]["data"]["attention"] = "row"
    config = parse_run(tree, "test")
    save(config, step=5, seed=5)
    generate_replay(config.folder, tmp_path / "data", Request(300))
    assert read_index(tmp_path / "data").num_tokens >= 300


def test_a_saturated_model_is_warned_of(tmp_path, tokenizer, monkeypatch, caplog):
    config = run_config(tmp_path / "run", "gpt2", tokenizer)
    save(config, step=5, seed=5)
    monkeypatch.setattr(synthetic, "num_parameters", lambda _: 0.1)
    with caplog.at_level("WARNING", "palimpsest"):
        generate_replay(config.folder, tmp_path / "data", Request(10))
    assert "tokens per parameter" in caplog.text


def test_bad_calls_have_one_clear_error(run, whole, tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="begun with seed = 3, now it is 4"):
        generate_replay(run.folder, whole, Request(2500, seed=4, shard_bytes=2000))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("x")
    with pytest.raises(ConfigError, match="holds something else"):
        generate_replay(run.folder, tmp_path / "mine", REQUEST)
    other = run_config(tmp_path / "bert", "bert", tokenizer)
    save(other, step=5, seed=5)
    with pytest.raises(ConfigError, match="fills gaps and continues no text"):
        generate_replay(other.folder, tmp_path / "out", REQUEST)
    assert main(["replay-generate", str(tmp_path / "gone"), "--output", str(tmp_path / "out"), "--tokens", "5"]) == 2
