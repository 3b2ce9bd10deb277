"""Run folders with two checkpoints and a trained tokenizer."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config.schema.run import RunConfig
from engine.corpus.tokenizer_training import train_tokenizer
from engine.serve.export import TEXT
from tests.engine.serve.runs import run_config, save


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT], folder, "bpe", 400)
    return folder


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def trained_run(request, tmp_path_factory, tokenizer) -> RunConfig:
    """A run with checkpoints of steps 3 and 5; do not change it."""
    config = run_config(tmp_path_factory.mktemp("runs") / request.param, request.param, tokenizer)
    save(config, step=3, seed=3)
    save(config, step=5, seed=5)
    return config


@pytest.fixture
def own_run(tmp_path, tokenizer) -> RunConfig:
    """A run of the test's own, to be damaged."""
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    config = run_config(tmp_path / "run", "gpt2", tmp_path / "tokenizer")
    save(config, step=3, seed=3)
    save(config, step=5, seed=5)
    return config


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 KiB, less than a model takes; skips where this process may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
