"""Outcomes: whole or absent."""

from pathlib import Path

import pytest

from engine import outcome
from engine.outcome import FILE, Outcome


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = Outcome("job", 3, 85, 120, rank=1, error="two\nlines")
    outcome.write(tmp_path, Outcome("job", 2, 1, 100))
    outcome.write(tmp_path, written)
    assert outcome.read(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == [FILE], "no partial file is left"


def test_a_late_word_of_an_older_attempt_replaces_nothing(tmp_path: Path) -> None:
    newer = Outcome("job", 1000, 85, 120)
    outcome.write(tmp_path, newer)
    outcome.write(tmp_path, Outcome("job", 999, 0, 130))
    assert outcome.read(tmp_path) == newer
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": "x"}', '{"job": "x", "unknown": 1}'])
def test_what_is_no_outcome_reads_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert outcome.read(tmp_path) is None


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert outcome.read(tmp_path) is None
    outcome.clear(tmp_path)
    outcome.write(tmp_path, Outcome("job", 0, 0, 1))
    outcome.clear(tmp_path)
    assert outcome.read(tmp_path) is None
