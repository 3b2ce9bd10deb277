"""`palimpsest checkpoint diff` and `merge` over sources of every format, as a user calls them."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch

from engine.checkpoint.load import read_weights
from engine.checkpoint.manifest import WEIGHT
from engine.cli import main
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE
from tests.engine.checkpoint.interchange.formats import STEP, save_run
from tests.engine.checkpoint.interchange.megatron import save_legacy
from tests.engine.models.tiny import random_weights, twin

FORMATS = ("huggingface", "deepspeed", "universal", "dcp", "megatron-lm")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Any:
    """(folder, weights): a run, and its weights in a folder of each format."""
    folder = tmp_path_factory.mktemp("formats")
    config, states = save_run(folder / "run", "gpt2")
    twin(config.model, states[WEIGHT]).save_pretrained(folder / "huggingface")
    for to in ("deepspeed", "universal", "dcp"):
        command = ["convert", str(folder / "run"), "--to", to, "--output", str(folder / to)]
        assert main([*command, "--with-optimizer"]) == EXIT_DONE
    save_legacy(folder / "megatron-lm", config.model, states[WEIGHT], tensor=2, pipe=1)
    (folder / "run.json").write_text(json.dumps(config.model_dump(mode="json")))
    other, _ = save_run(folder / "other", "gpt2")
    assert other.model == config.model
    return folder, states[WEIGHT]


@pytest.mark.parametrize("form", FORMATS)
def test_weights_and_moments_are_compared_and_averaged(world, tmp_path, capsys, form):
    folder, weights = world
    assert main(["checkpoint", "diff", str(folder / form), str(folder / "run")]) == EXIT_DONE
    # weights, and moments where both sides have them
    number = len(weights) * (3 if form in ("deepspeed", "universal", "dcp") else 1)
    assert f"{number} of {number} tensors are bitwise equal" in capsys.readouterr().out

    command = ["checkpoint", "merge", str(folder / form), str(folder / "run"), "--weights", "0.25,0.75"]
    assert main([*command, "--output", str(tmp_path / "out")]) == EXIT_DONE
    assert f"0.250000  {folder / form}" in capsys.readouterr().out
    [path] = (tmp_path / "out" / "checkpoints").glob("step-*")
    found = read_weights(path)
    # 0.25 and 0.75 of one value are that value, in fp64 and rounded to fp32
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_two_of_other_formats_are_merged_and_the_mean_is_that_of_their_tensors(world, tmp_path):
    folder, weights = world
    model = save_run(tmp_path / "run", "gpt2")[0].model
    other = random_weights(model, 9)
    twin(model, other).save_pretrained(tmp_path / "theirs")
    command = ["checkpoint", "merge", str(folder / "dcp"), str(tmp_path / "theirs"), "--output", str(tmp_path / "out")]
    assert main(command) == EXIT_DONE
    [path] = (tmp_path / "out" / "checkpoints").glob("step-*")
    assert path.name == f"step-{STEP:08d}"
    for name, value in read_weights(path).items():
        mean = (weights[name].double() + other[name].double()) / 2
        assert torch.equal(value, mean.float()), name
    # what came out is a model like any other: it compares, converts and is merged again
    assert main(["convert", str(tmp_path / "out"), "--output", str(tmp_path / "back")]) == EXIT_DONE
    assert main(["checkpoint", "diff", str(tmp_path / "out"), str(tmp_path / "back")]) == EXIT_DONE


def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(world, tmp_path, capsys):
    folder, _ = world
    small, _ = save_run(tmp_path / "small", "gpt2", num_layers=1)
    shutil.copytree(folder / "dcp", tmp_path / "torn")
    (tmp_path / "torn" / "__0_0.distcp").unlink()
    (tmp_path / "empty").mkdir()
    cases = (
        ([folder / "dcp", tmp_path / "small"], "is of another model than"),
        ([folder / "dcp", tmp_path / "torn"], "__0_0.distcp"),
        ([folder / "dcp", folder / "dcp"], "these are 1 checkpoints"),
        ([folder / "dcp", tmp_path / "empty"], "holds neither checkpoints/ nor manifest.json"),
        ([folder / "dcp", tmp_path / "none"], "is not there"),
        ([folder / "dcp", folder / "huggingface", "--last", "2"], "--last 2 of 2 sources"),
        ([folder / "dcp", folder / "huggingface", "--weights", "1,2"], "3"),
    )
    for arguments, told in cases:
        command = ["checkpoint", "merge", *map(str, arguments), "--output", str(tmp_path / "out")]
        assert main(command) in (EXIT_FAILURE, EXIT_USAGE), arguments
        assert told in capsys.readouterr().err, arguments
        assert not (tmp_path / "out").exists()
    for arguments, told in ((cases[1][0], "__0_0.distcp"), (cases[4][0], "none")):
        assert main(["checkpoint", "diff", *map(str, arguments)]) in (EXIT_FAILURE, EXIT_USAGE)
        assert told in capsys.readouterr().err
    assert small.model.num_layers == 1
