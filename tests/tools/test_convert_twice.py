"""Two conversions to one place, in every format: the second is refused, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from engine.cli import main
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.corpus.tokenizer_training import train_tokenizer
from engine.errors import EXIT_DONE, EXIT_USAGE
from engine.serve.new_folder import new_folder
from tests.engine.checkpoint.interchange.formats import save_run
from tests.engine.data.corpus import made_up_texts, write_json_lines
from tools.conversions import To

WEIGHTS = ("palimpsest", "dcp", "universal", "deepspeed")
OTHERS = {"huggingface": "run", "onnx": "run", "gguf": "run", "megatron": "tokens/train", "shards": "set.bin"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    texts = write_json_lines(folder / "texts.jsonl", made_up_texts(60))
    train_tokenizer(made_up_texts(100), folder / "run" / "tokenizer", "bpe", 400)
    save_run(folder / "run", "gpt2")
    prepare(PrepareOptions((str(texts),), folder / "run" / "tokenizer", folder / "tokens", 0.2))
    for to, source in (("dcp", "run"), ("megatron", "tokens/train")):
        output = folder / ("set" if to == "megatron" else to)
        assert main(["convert", str(folder / source), "--to", to, "--output", str(output)]) == EXIT_DONE
    return folder


def test_the_second_to_one_place_is_refused_whatever_the_format(sources, tmp_path, capsys):
    assert {*WEIGHTS, *OTHERS} == set(get_args(To)), "every format"
    for to in get_args(To):
        source = sources / OTHERS.get(to, "dcp" if to == "palimpsest" else "run")
        command = ["convert", str(source), "--to", to, "--output", str(tmp_path / "out")]
        if to == "shards":
            command += ["--tokenizer", str(sources / "run" / "tokenizer")]
        with new_folder(tmp_path / "out"):
            assert main(command) == EXIT_USAGE, to
            assert f"output {tmp_path / 'out'} is being written by another process" in capsys.readouterr().err, to
        (tmp_path / "out").rmdir()
    assert not list(tmp_path.iterdir())
