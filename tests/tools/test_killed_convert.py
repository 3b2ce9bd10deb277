"""`palimpsest convert` that dies of SIGKILL leaves nothing that the next run trips on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.checkpoint.interchange.sinks.journal import JOURNAL
from engine.cli import main
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.corpus.tokenizer_training import train_tokenizer
from engine.errors import EXIT_DONE
from tests.engine.data.corpus import made_up_texts, write_json_lines
from tests.engine.serve.runs import run_config, save

KILLED = """
import json, os, signal, sys
from pathlib import Path

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


def move_to(name, number):
    moves = []

    def die_at(event, arguments):
        if event != "os.rename" or os.path.basename(arguments[1]) != name:
            return False
        moves.append(name)
        return len(moves) == number

    return die_at


def never(event, arguments):
    return False


results = []
for command, folder, moves in json.loads(sys.argv[1]):
    runs = []
    for die_at in (first_write, *(move_to(*move) for move in moves), never):
        code = run(command, die_at)
        files = {str(path.relative_to(folder)): path.stat().st_ino for path in Path(folder).rglob("*")}
        runs.append([code, files])
    results.append(runs)
print(json.dumps(results))
"""


def killed(*commands: tuple[list[str], Path, list[tuple[str, int]]]) -> list[list[tuple[int, dict[str, int]]]]:
    """Run commands that die: at their first write, before they move a file to a name for the so-manieth time, and not.

    Returns for each command of each such run the exit code, and the files in its folder by path with their inodes.
    """
    given = json.dumps([(command, str(folder), moves) for command, folder, moves in commands])
    done = subprocess.run([sys.executable, "-c", KILLED, given], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
        commands.append((command, sources / to, [(name, 1) for name in moved]))
    results = killed(*commands)
    for (_, _, moved), runs in zip(cases.values(), results, strict=True):
        assert [code for code, _ in runs] == [-9] * (1 + len(moved)) + [0]
        *_, (_, left), (_, after) = runs
        assert any(name.endswith(".partial") for name in left), "it was killed at work"
        assert {name for name in after if "/" not in name} == set(moved)
    assert "set.idx" in results[2][-2][1], "the worst moment: one of the two files is there"


def test_an_import_goes_on_behind_its_last_whole_file(sources: Path) -> None:
    """It dies before it notes its third file, so that two are whole; these stay, the others are written."""
    theirs = sources / "theirs"
    assert main(["convert", str(sources / "run"), "--output", str(theirs)]) == EXIT_DONE
    options = ["--shard-size", "40KB", "--output"]
    (sources / "killed").mkdir()
    command = ["convert", str(theirs), *options, str(sources / "killed" / "ours")]
    [[first, second, last]] = killed((command, sources / "killed", [(JOURNAL, 3)]))
    assert [first[0], second[0], last[0]] == [-9, -9, 0]
    left, after = (
        {Path(path).name: inode for path, inode in files.items() if path.endswith(".safetensors")}
        for files in (second[1], last[1])
    )
    assert len(left) == 3 < len(after)
    assert sum(after[name] == inode for name, inode in left.items()) == 2
    assert main(["convert", str(theirs), *options, str(sources / "undisturbed")]) == EXIT_DONE
    for path in (sources / "undisturbed").rglob("*.safetensors"):
        again = sources / "killed" / "ours" / path.relative_to(sources / "undisturbed")
        assert again.read_bytes() == path.read_bytes()
    assert {name for name in last[1] if "/" not in name} == {"ours"}
