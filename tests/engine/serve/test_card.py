"""The model card says what the run recorded, and the folder can be read by others than its owner."""

from __future__ import annotations

import json
import os
import shutil
import stat

import pytest
from ruamel.yaml import YAML

from engine.config.load import parse_run
from engine.errors import ConfigError
from engine.serve.card import parse_license
from engine.serve.export import ExportOptions, export
from engine.serve.source import open_trained
from tests.engine.serve.runs import run_config, save

SECTIONS = {"loader": {"fingerprint": "f" * 32, "sources": "aaaaaa bbbbbb"}}


@pytest.fixture
def mixture(tmp_path, tokenizer):
    """A run on two sources, one behind a URL with a password, with metrics and a checkpoint of step 4."""
    tree = run_config(tmp_path / "run", "gpt2", tokenizer).model_dump(mode="json")
    tree["name"] = "two | sources"
    tree["stages"][0]["data"] = {
        "sources": [
            {"name": "books", "path": "https://user:secret@host/books?signature=hidden", "weight": 3},
            {"name": "code", "path": "shards/code", "weight": 1},
        ]
    }
    config = parse_run(tree, "test")
    save(config, step=4, seed=0, sections=SECTIONS)
    records = [
        {"step": 2, "validation_loss": 5.5},
        {"step": 4, "loss": 4.0, "books_samples": 30, "code_samples": 10},
        {"step": 4, "validation_loss": 4.25, "validation_loss/code": 3.5},
        {"step": 6, "validation_loss": 1.0},  # of a step that is not in the checkpoint
    ]
    lines = [json.dumps(record) for record in records]
    (config.folder / "metrics.jsonl").write_text("\n".join([*lines[:2], "{damaged", *lines[2:]]) + "\n")
    return config


def card_of(config, output, **options) -> str:
    export(open_trained(config.folder), output, ExportOptions(**options))
    return (output / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_source_data_losses_configuration_and_license(mixture, tmp_path):
    card = card_of(mixture, tmp_path / "out", license_id="apache-2.0")
    _, head, body = card.split("---\n", 2)
    assert YAML(typ="safe").load(head) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["palimpsest"],
    }
    assert "| run | two \\| sources |" in body
    assert "| checkpoint | step 4 |" in body
    assert "| license | apache-2.0 |" in body
    assert "| books | https://host/books?signature=*** | 960 | aaaaaa |" in body  # 30 samples of 32 tokens
    assert "| code | shards/code | 320 | bbbbbb |" in body
    assert f"| all |  | 128 | {'f' * 32} |" in body
    assert "| validation_loss | 4 | 4.250000 |" in body
    assert "| validation_loss/code | 4 | 3.500000 |" in body
    assert "5.5" not in body
    assert "1.000000" not in body
    shown = YAML(typ="safe").load(body.partition("```yaml\n")[2].partition("```")[0])
    assert shown["model"]["hidden_size"] == 64
    for secret in ("secret", "user:", "=hidden"):
        assert secret not in card


def test_what_is_not_recorded_is_said_to_be_missing(own_run, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.move(own_run.folder / "checkpoints" / "step-00000005", moved)
    export(open_trained(moved), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## Held-out loss\n\nNone is recorded." in card
    assert "| train | t | 160 | not recorded |" in card
    assert "not stated (`palimpsest convert --license`)" in card
    assert "license:" not in card.split("---\n")[1]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives(own_run, tmp_path, mask):
    before = os.umask(mask)
    try:
        export(open_trained(own_run.folder), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o666 & ~mask}


def test_licenses():
    assert [parse_license(name) for name in ("apache-2.0", "MIT", "cc-by-4.0")] == ["apache-2.0", "mit", "cc-by-4.0"]
    for wrong in ("", "Apache License 2.0", "mit\nother: x", "-x"):
        with pytest.raises(ConfigError, match=r"--license (.|\n)*such as apache-2.0"):
            parse_license(wrong)
