"""The command prepares, reports counts and lengths, and is content when asked for the same again."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.cli import main
from engine.corpus.statistics import Statistics
from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.shards.dataset import TokenDataset
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE
from tests.engine.data.corpus import made_up_texts, write_json_lines
from tools import prepare as tool
from tools.data_tables import histogram


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(made_up_texts(100), folder, "bpe", 300)
    return folder


@pytest.fixture
def arguments(tokenizer, tmp_path):
    source = write_json_lines(tmp_path / "texts.jsonl", made_up_texts(200), key="body")
    common = ["--tokenizer", str(tokenizer), "--output", str(tmp_path / "out"), "--text-key", "body"]
    return ["prepare", str(source), *common, "--shard-megabytes", "0.002", "--validation-fraction", "0.2"]


def test_it_writes_both_parts_and_tells_their_counts(arguments, tmp_path, capsys):
    assert main([*arguments, "--workers", "1"]) == EXIT_DONE
    printed = capsys.readouterr().out
    for part in ("train", "validation"):
        index = TokenDataset(tmp_path / "out" / part).index
        assert any(part in line and f"{index.num_tokens:,}" in line for line in printed.splitlines())
    assert TokenDataset(tmp_path / "out" / "train").num_shards > 3
    assert "tokens per document, train:" in printed


def test_the_same_again_is_done_already_and_another_is_refused(arguments, capsys):
    assert main(arguments) == EXIT_DONE
    assert main(arguments) == EXIT_DONE
    assert "was made from the same before" in capsys.readouterr().out
    assert main([*arguments, "--shard-megabytes", "1"]) == EXIT_FAILURE
    assert "shard_bytes: 2097 -> 1048576" in capsys.readouterr().err
    assert main([*arguments, "--shard-megabytes", "1", "--overwrite"]) == EXIT_DONE


def test_bad_lines_and_options_are_told(arguments, tmp_path, capsys):
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write("{\n")
    assert main([*arguments, "--workers", "1"]) == EXIT_FAILURE
    assert "texts.jsonl:201 is no JSON" in capsys.readouterr().err
    assert main([*arguments, "--workers", "0"]) == EXIT_USAGE
    assert main([*arguments, "--validation-fraction", "1.5"]) == EXIT_USAGE


def test_where_nobody_watches_lines_tell_how_far_how_fast_and_how_long(monkeypatch, capsys):
    monkeypatch.setattr(tool, "_TOLD_EVERY_SECONDS", -1)
    with tool._shown(time.monotonic()) as show:
        for done in (1, 2, 3):
            show(tool.HowFar("encoding", 7, done * 10**7, 0, done, 4))
    *_, last = capsys.readouterr().err.split("encoding: ")
    form = r"7 documents, 30\.0 M tokens, [\d.]+ M tokens/s, 75%, \d+ s left"
    assert re.fullmatch(form, " ".join(last.split()))


def test_lengths_are_drawn_without_gaps():
    statistics = Statistics()
    statistics.lengths.update({2: 10, 4: 5})
    lines = histogram(statistics).splitlines()
    assert [line.split() for line in lines] == [
        ["4", "to", "7", "10", "#" * 30],
        ["8", "to", "15", "0"],
        ["16", "to", "31", "5", "#" * 15],
    ]
    assert histogram(Statistics()) == ""


@pytest.mark.parametrize("module", ["tools.tokenizer", "tools.prepare", "tools.inspect_data"])
def test_no_torch_is_imported_by_the_commands_on_data(module):
    heavy = ("torch", "transformers", "datasets", "deepspeed")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_documents_of_one_sentence_are_told(arguments, tmp_path, capsys):
    write_json_lines(tmp_path / "texts.jsonl", [f"One sentence {n}." for n in range(100)], key="body")
    assert main([*arguments, "--sentences", "en", "--workers", "1"]) == EXIT_DONE
    assert "each document of train, validation is one sentence" in capsys.readouterr().out
