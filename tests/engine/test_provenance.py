"""A start records code, git state and environment, and no secret."""

import json
import subprocess
from pathlib import Path

import pytest

from engine import provenance
from engine.provenance import code_hash, git_state, note_start


def write_code(root: Path, text: str) -> Path:
    (root / "engine").mkdir(parents=True, exist_ok=True)
    (root / "engine" / "module.py").write_text(text)
    return root


def test_the_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    first = write_code(tmp_path / "a", "x = 1\n")
    same, other = write_code(tmp_path / "b", "x = 1\n"), write_code(tmp_path / "c", "x = 2\n")
    assert code_hash(first) == code_hash(same) != code_hash(other)
    (same / "engine" / "module.py").rename(same / "engine" / "renamed.py")
    code_hash.cache_clear()
    assert code_hash(first) != code_hash(same)


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=e@x", *arguments], check=True)


def test_the_state_of_a_checkout(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    root = write_code(tmp_path / "one", "x = 1\n")
    git(root, "init", "-q", "-b", "trunk")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    clean = git_state(root)
    assert clean is not None
    assert (clean.branch, clean.changed, clean.diff_hash, len(clean.commit)) == ("trunk", (), "", 40)
    write_code(root, "x = 2\n")
    git_state.cache_clear()
    dirty = git_state(root)
    assert dirty is not None
    assert (dirty.commit, dirty.changed, len(dirty.diff_hash)) == (clean.commit, ("engine/module.py",), 16)


def test_a_start_is_recorded_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "hf_secret",
        "PALIMPSEST_OVERRIDES": '["data=s3://k:secret@b"]',
        "SLURM_JOB_ID": "17",
        "MY_PASSWORD": "secret",
        "TORCH_EXTENSIONS_DIR": "https://user:secret@host/x",
    }.items():
        monkeypatch.setenv(name, value)
    note_start(tmp_path, "array/17_3", 2)
    (path,) = (tmp_path / "starts").iterdir()
    assert path.name == "array_17_3.2.json"
    assert "secret" not in path.read_text()
    found = json.loads(path.read_text())
    assert found["environment"]["NCCL_DEBUG"] == "INFO"
    assert found["environment"]["SLURM_JOB_ID"] == "17"
    assert found["environment"]["HF_TOKEN"] == "***"
    assert "MY_PASSWORD" not in found["environment"]
    assert found["code"]["hash"] == code_hash()
    assert "torch" in found["versions"]


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / provenance.FOLDER).touch()
    note_start(tmp_path, "job", 0)
    assert "cannot be written" in caplog.text
