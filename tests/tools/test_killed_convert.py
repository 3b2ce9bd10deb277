"""`palimpsest convert` that dies of SIGKILL leaves nothing that the next run trips on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.corpus.tokenizer_training import train_tokenizer
from tests.engine.data.corpus import made_up_texts, write_json_lines
from tests.engine.serve.runs import run_config, save

KILLED = """
import json, os, signal, sys

from engine.cli import main
import engine.serve.export, engine.serve.import_model, engine.checkpoint.interchange.sinks.dcp  # once for all


def run(command, die_at):
    pid = os.fork()
    if pid == 0:
        sys.addaudithook(lambda event, arguments: die_at(event, arguments) and os.kill(os.getpid(), signal.SIGKILL))
        os._exit(main(command))
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def first_write(event, arguments):
    return event == "open" and ".partial" in str(arguments[0]) and arguments[2] & os.O_CREAT


def move_to(name):
    return lambda event, arguments: event == "os.rename" and os.path.basename(arguments[1]) == name


results = []
for command, folder, moved in json.loads(sys.argv[1]):
    codes = [run(command, die_at) for die_at in (first_write, *map(move_to, moved))]
    left = sorted(os.listdir(folder))
    codes.append(run(command, lambda event, arguments: False))
    results.append([codes, left, sorted(os.listdir(folder))])
print(json.dumps(results))
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A run with a checkpoint, and shards, of one tokenizer."""
    train_tokenizer(made_up_texts(100), tmp_path / "tokenizer", "bpe", 400)
    save(run_config(tmp_path / "run", "llama", tmp_path / "tokenizer"), step=4, seed=0, moments=None)
    source = write_json_lines(tmp_path / "texts.jsonl", made_up_texts(60))
    prepare(PrepareOptions((str(source),), tmp_path / "tokenizer", tmp_path / "data", 0.2))
    return tmp_path


def test_the_next_run_goes_well_and_leaves_no_trace(sources: Path) -> None:
    cases = {
        "huggingface": (sources / "run", "out", ["out"]),
        "dcp": (sources / "run", "out", ["out"]),
        "megatron": (sources / "data" / "train", "set", ["set.idx", "set.bin"]),
    }
    commands = []
    for to, (source, output, moved) in cases.items():
        (sources / to).mkdir()
        command = ["convert", str(source), "--to", to, "--output", str(sources / to / output)]
        commands.append([command, str(sources / to), moved])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(commands)], capture_output=True, text=True, check=True, env=os.environ
    )
    results = json.loads(done.stdout.splitlines()[-1])
    for (_, _, moved), (codes, left, after) in zip(cases.values(), results, strict=True):
        assert codes == [-9] * (1 + len(moved)) + [0], done.stderr
        assert any(name.endswith(".partial") for name in left), "it was killed at work"
        assert after == sorted(moved)
    assert results[2][1][-1] == "set.idx", "the worst moment: one of the two files is there"
