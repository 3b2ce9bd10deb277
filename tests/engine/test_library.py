"""docs/library.md as a reader would type it: every block of code runs by itself, on a run of a tiny model."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import library
from engine.checkpoint.load import read_weights
from engine.config.save import save_run
from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.writer import ShardWriter
from engine.data.stage import open_parts, run_stage_seed, stage_stream
from engine.data.tokenizer.folder import load_tokenizer
from engine.models.families import family
from engine.models.initial import initial_value
from engine.serve.export import TEXT
from tests.engine.serve.runs import run_config, save
from tests.readme import REPOSITORY

PAGE = (REPOSITORY / "docs" / "library.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder that holds my/tokenizer, my/tokens/train and my/run, with a checkpoint of step 5."""
    folder = tmp_path_factory.mktemp("library")
    train_tokenizer([TEXT], folder / "my" / "tokenizer", "bpe", 400)
    tokenizer = load_tokenizer(folder / "my" / "tokenizer")
    with ShardWriter(folder / "my/tokens/train", tokenizer.vocab_size, tokenizer.eos_id, tokenizer.hash) as writer:
        for ids in tokenizer.encode([*TEXT.split(". ")] * 20):
            writer.add(np.append(ids, tokenizer.eos_id))
    config = run_config(folder / "my" / "run", "gpt2", folder / "my" / "tokenizer", folder / "my/tokens/train")
    save(config, step=5, seed=5)
    save_run(config, config.folder)
    return folder


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_example_runs(folder, monkeypatch, capsys, number):
    monkeypatch.chdir(folder)
    exec(compile(BLOCKS[number], f"docs/library.md, block {number}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_every_name_is_shown():
    shown = set(re.findall(r"\w+", PAGE))
    assert set(library.__all__) - {"Batch", "Checkpoint", "LanguageModel"} <= shown
    assert all(hasattr(library, name) for name in library.__all__)


def test_a_checkpoint_has_the_weights_that_were_saved(folder):
    opened = library.open_checkpoint(folder / "my" / "run")
    saved = read_weights(opened.path)
    assert opened.step == 5
    for name, value in opened.build_model().named_parameters():
        assert torch.equal(value[: len(saved[name])], saved[name])


def test_a_new_model_has_the_initial_weights_of_a_run(folder):
    config = library.load_run(folder / "my" / "run" / "config.yaml").model
    found = dict(library.build_model(config, seed=3).named_parameters())
    for spec in family(config).specs(config):
        assert torch.equal(found[spec.name], initial_value(spec, config, 3))


def test_documents_are_all_tokens_in_their_order(folder):
    found = list(library.documents(folder / "my/tokens/train"))
    shard = TokenDataset(folder / "my/tokens/train").shard(0)
    assert len(found) == len(shard.documents) - 1
    assert np.array_equal(np.concatenate(found), shard.tokens)


def test_global_batches_are_those_of_all_steps(folder):
    run = library.load_run(folder / "my" / "run" / "config.yaml", ["stages.0.global_batch_size=2"])
    batches = list(library.global_batches(run))
    assert len(batches) == run.stages[0].num_steps
    assert {batch.num_rows for batch in batches} == {2}
    addresses = {tuple(sample) for batch in batches for sample in batch.samples_B3.tolist()}
    assert len(addresses) == 2 * len(batches), "each sample once"
    later = list(library.global_batches(run, first_step=3))
    assert [batch.samples_B3.tolist() for batch in later] == [batch.samples_B3.tolist() for batch in batches[3:]]
    assert later[0].inputs["tokens_BT"].equal(batches[3].inputs["tokens_BT"])


def test_a_later_run_stage_has_an_order_of_its_own(folder):
    run = library.load_run(folder / "my" / "run" / "config.yaml")
    run = run.model_copy(update={"stages": run.stages * 2})
    first, second = (next(library.global_batches(run, number)) for number in range(2))
    parts = open_parts(run.stages[1], None, run.model.vocab_size)
    expected = stage_stream(run.stages[1], parts, run_stage_seed(run.seed, 1)).next_sample_ids(1)
    assert second.samples_B3.tolist() == [list(sample) for sample in expected]
    assert not first.inputs["tokens_BT"].equal(second.inputs["tokens_BT"])
