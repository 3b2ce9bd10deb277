"""`palimpsest convert` and `palimpsest generate` through the command, from a run folder to text."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.cli import main
from engine.corpus.tokenizer_training import train_tokenizer
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE
from engine.serve.export import TEXT
from tests.engine.models.tiny import random_weights
from tests.engine.serve.runs import run_config, save


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    train_tokenizer([TEXT], folder / "tokenizer", "bpe", 400)
    config = run_config(folder / "run", "llama", folder / "tokenizer")
    save(config, step=4, seed=0)
    return config.folder


def test_convert_writes_a_folder_that_generate_continues_from(run_folder, tmp_path, capsys):
    output = tmp_path / "exported"
    assert main(["convert", str(run_folder), "--to", "huggingface", "--output", str(output)]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert f"wrote {output}: " in printed
    assert "of step 4 (huggingface, fp32)" in printed
    assert "largest logit difference" in printed
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in output.iterdir()
    }
    texts = []
    for source in (run_folder, output):
        arguments = ["generate", str(source), "--prompt", "Archimedes", "--max-new-tokens", "6", "--seed", "7"]
        assert main(arguments) == EXIT_DONE
        captured = capsys.readouterr()
        assert "continuing with" in captured.err
        texts.append(captured.out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("Archimedes")


def test_the_average_of_the_weights_is_converted_where_a_checkpoint_holds_one(run_folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["convert", str(run_folder), "--weights", "ema", "--output", str(output)]) == EXIT_FAILURE
    assert "holds no ema of the weights" in capsys.readouterr().err
    assert main(["convert", str(run_folder), "--weights", "ema", "--to", "dcp", "--output", str(output)]) == EXIT_USAGE
    assert "--weights with --to huggingface" in capsys.readouterr().err
    assert not output.exists()
    config = run_config(tmp_path / "run", "llama", run_folder.parent / "tokenizer")
    average = random_weights(config.model, 5)
    save(config, step=4, seed=0, moments={"ema": average})
    assert main(["convert", str(config.folder), "--weights", "ema", "--output", str(output)]) == EXIT_DONE
    assert "averaged parameters of step 4" in capsys.readouterr().out
    assert torch.equal(load_file(output / "model.safetensors")["model.norm.weight"], average["final_norm.weight"])


def test_a_gguf_file_is_written_and_its_loss_is_told(run_folder, tmp_path, capsys):
    pytest.importorskip("gguf", reason="needs gguf (extra deploy)")
    command = ["convert", str(run_folder), "--to", "gguf", "--output", str(tmp_path / "out")]
    assert main([*command, "--dtype", "int8"]) == EXIT_USAGE
    assert "--dtype int8 with --to gguf" in capsys.readouterr().err
    assert main([*command, "--dtype", "fp16"]) == EXIT_DONE
    said = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out' / 'model.gguf'} (" in said
    assert "agrees on held-out text (a fixed text, " in said


def test_errors_end_in_their_exit_codes_and_say_what_to_do(run_folder, tmp_path, capsys):
    assert main(["convert", str(tmp_path / "no"), "--output", str(tmp_path / "out")]) == EXIT_USAGE
    assert "palimpsest convert: " in (said := capsys.readouterr().err)
    assert "to do: check the path" in said
    assert main(["generate", str(tmp_path / "no"), "--prompt", "x"]) == EXIT_USAGE
    assert "allowed: a run folder" in capsys.readouterr().err
    assert main(["convert", str(run_folder), "--to", "keras", "--output", str(tmp_path / "out")]) == EXIT_USAGE
    shutil.copytree(run_folder, tmp_path / "run")
    damaged = next((tmp_path / "run" / "checkpoints").glob("*/*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["convert", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == EXIT_FAILURE
    assert "has no whole checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_under_another_steps_name_is_refused(run_folder, tmp_path, capsys):
    misnamed = tmp_path / "step-00000009"
    shutil.copytree(run_folder / "checkpoints" / "step-00000004", misnamed)
    commands = [["generate", str(misnamed), "--prompt", "x"]]
    commands += [
        ["convert", str(misnamed), "--to", to, "--output", str(tmp_path / "out")]
        for to in ("huggingface", "dcp", "universal")
    ]
    for command in commands:
        assert main(command) == EXIT_FAILURE
        said = capsys.readouterr().err
        assert "it is of step 4, and the folder's name says step 9" in said
        assert "to do: rename the folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009"]
    misnamed.rename(tmp_path / "best")  # a name that gives no step is any checkpoint's
    assert main(["convert", str(tmp_path / "best"), "--to", "dcp", "--output", str(tmp_path / "out")]) == EXIT_DONE


@pytest.mark.parametrize("name", ["convert", "generate"])
def test_help_imports_no_torch(name):
    code = f"import sys; from engine.cli import main; main(['{name}', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--tokenizer" in done.stdout
