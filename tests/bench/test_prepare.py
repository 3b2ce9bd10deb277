"""The measurement of preparing, at toy size: every case does its work, and ratios are those of the seconds."""

import json
import statistics
from pathlib import Path

import pytest

from bench import prepare
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare as prepare_data
from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.shards.dataset import TokenDataset
from tests.engine.data.corpus import made_up_texts, write_json_lines


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(made_up_texts(100), folder, "bpe", 300)
    return folder


def test_cases_are_measured_and_written(tokenizer_folder, tmp_path):
    texts = made_up_texts(300)
    source = str(write_json_lines(tmp_path / "texts.jsonl", texts))
    prepare.main([source], tokenizer_folder, rounds=2, output=tmp_path / "prepare.json")
    result = json.loads((tmp_path / "prepare.json").read_text())
    assert result["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert list(result["cases"]) == ["plain", "split", "prepare", "near", "sentences", "zstd"]
    least = result["cases"]["plain"]["cpu_seconds"]
    for case in result["cases"].values():
        assert len(case["cpu_seconds"]) == 2
        ratio = statistics.median(mine / its for mine, its in zip(case["cpu_seconds"], least, strict=True))
        assert abs(case["over_plain"] / ratio - 1) < 0.2, "seconds are written to a millisecond"


def test_the_plain_loop_writes_the_same_tokens(tokenizer_folder, tmp_path):
    source = str(write_json_lines(tmp_path / "texts.jsonl", made_up_texts(300)))
    count = prepare.plain([source], tokenizer_folder, tmp_path / "plain.bin")
    prepare_data(PrepareOptions((source,), tokenizer_folder, tmp_path / "out", 0.0))
    index = TokenDataset(tmp_path / "out" / "train").index
    assert count == index.num_tokens
    assert prepare.split([source], "en") >= 300
