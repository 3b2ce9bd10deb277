"""A snapshot is what was there when it was taken, is shared by its content, and runs in place of the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import EnvironmentProblem
from engine.provenance import ROOT, code_hash
from launcher.snapshot import take


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for package in ("engine", "launcher", "tools"):
        (tmp_path / "checkout" / package / "__pycache__").mkdir(parents=True)
        (tmp_path / "checkout" / package / "__init__.py").write_text(f"name = {package!r}\n")
        (tmp_path / "checkout" / package / "__pycache__" / "x.pyc").touch()
    code_hash.cache_clear()
    return tmp_path / "checkout"


def test_jobs_share_a_snapshot_until_the_code_changes(checkout: Path, tmp_path: Path) -> None:
    first = take(tmp_path / "store", checkout)
    assert take(tmp_path / "store", checkout) == first
    assert not list(first.rglob("__pycache__"))
    (checkout / "tools" / "__init__.py").write_text("name = 'later'\n")
    code_hash.cache_clear()
    second = take(tmp_path / "store", checkout)
    assert second != first
    assert (first / "tools" / "__init__.py").read_text() == "name = 'tools'\n"
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == sorted([first.name, second.name])


def test_the_command_runs_from_a_snapshot(tmp_path: Path) -> None:
    snapshot = take(tmp_path / "store")
    program = "import engine; from engine.cli import main; print(engine.__file__); main(['--version'])"
    environ = os.environ | {"PYTHONPATH": str(snapshot)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(snapshot))
    assert "palimpsest" in done.stdout
    assert code_hash(snapshot) == code_hash(ROOT) == snapshot.name


def test_a_store_that_cannot_be_written_is_named(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    with pytest.raises(EnvironmentProblem, match="cannot be copied"):
        take(tmp_path / "store", checkout)
