"""Which checkpoint is meant, and what is said where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError, ConfigError
from engine.serve.source import find_checkpoint, is_trained, open_trained
from tests.engine.models.tiny import random_weights
from tests.engine.serve.runs import save


def flip_a_byte(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_run_means_its_newest_checkpoint_and_a_checkpoint_itself(trained_run):
    checkpoints = trained_run.folder / "checkpoints"
    for source, step in ((trained_run.folder, 5), (checkpoints / "step-00000003", 3)):
        assert is_trained(source)
        trained = open_trained(source)
        assert (trained.checkpoint, trained.step, trained.tokens) == (
            checkpoints / f"step-{step:08d}",
            step,
            32 * step,
        )
        assert (trained.config, trained.tokenizer) == (trained_run.model, trained_run.tokenizer)
        expected = random_weights(trained_run.model, seed=step)
        assert trained.weights.keys() == expected.keys()
        assert all(torch.equal(trained.weights[name], expected[name]) for name in expected)


def test_a_damaged_checkpoint_is_passed_over_in_a_run_and_refused_by_name(own_run, caplog):
    checkpoints = own_run.folder / "checkpoints"
    flip_a_byte(checkpoints / "step-00000005")
    assert find_checkpoint(own_run.folder) == checkpoints / "step-00000003"
    with pytest.raises(CheckpointError, match=r"step-00000005 is damaged: .*safetensors"):
        find_checkpoint(checkpoints / "step-00000005")
    flip_a_byte(checkpoints / "step-00000003")
    with pytest.raises(CheckpointError, match=r"has no whole checkpoint(.|\n)*palimpsest checkpoint verify"):
        find_checkpoint(own_run.folder)


def test_a_folder_of_something_else_is_refused(tmp_path):
    assert not is_trained(tmp_path)
    with pytest.raises(ConfigError, match=r"holds neither checkpoints/ nor manifest.json"):
        open_trained(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere is not there"):
        open_trained(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no whole checkpoint"):
        open_trained(tmp_path)


def test_a_moved_tokenizer_is_asked_for_and_can_be_named(own_run, tokenizer):
    shutil.rmtree(own_run.tokenizer)
    with pytest.raises(ConfigError, match=r"tokenizer folder .* is not there(.|\n)*--tokenizer"):
        open_trained(own_run.folder)
    assert open_trained(own_run.folder, tokenizer).tokenizer == tokenizer


def test_a_checkpoint_opens_outside_its_run(own_run, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.move(own_run.folder / "checkpoints" / "step-00000005", moved)
    assert open_trained(moved).config == own_run.model


def test_a_checkpoint_without_a_configuration_asks_the_run_folder(own_run, monkeypatch):
    from engine.checkpoint.manifest import CheckpointState
    from engine.serve import source

    read_state = source.read_state

    def without_config(path: Path) -> CheckpointState:
        state = read_state(path)
        return CheckpointState(state.step, state.tokens, state.zero_stage, state.config_hash)

    monkeypatch.setattr(source, "read_state", without_config)
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read"):
        open_trained(own_run.folder)
    (own_run.folder / "config.yaml").write_text(json.dumps(own_run.model_dump(mode="json")))  # JSON is YAML
    assert open_trained(own_run.folder).config == own_run.model


def test_another_tokenizer_than_the_one_trained_with_is_refused(own_run):
    save(own_run, step=9, seed=9, sections={"tokenizer": {"hash": "another"}})
    with pytest.raises(ConfigError, match=r"is not the one that .*step-00000009 was trained with"):
        open_trained(own_run.folder)
