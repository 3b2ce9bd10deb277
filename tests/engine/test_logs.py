import logging
import threading

import pytest

from engine import logs


@pytest.fixture
def lines(monkeypatch):
    """Lines of the package's log at INFO, with an event that is set as soon as there is one."""
    found, there = [], threading.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())
            there.set()

    root = logging.getLogger(logs.ROOT)
    monkeypatch.setattr(root, "handlers", [Handler()])
    monkeypatch.setattr(root, "level", logging.INFO)
    return found, there


def test_a_long_phase_is_named_while_it_lasts_and_measured_at_its_end(lines):
    found, there = lines
    with logs.phase("building the model", patience_seconds=0.0):
        assert there.wait(60)
        assert found == ["building the model ..."]
    assert found[1].startswith("building the model took ")


def test_a_phase_that_fails_is_measured_too(lines):
    found, there = lines

    @logs.phase("loading", patience_seconds=0.0)
    def fail() -> None:
        assert there.wait(60)
        raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert found[-1].startswith("loading took ")


def test_a_short_phase_says_nothing_and_leaves_no_thread(lines):
    before = threading.active_count()
    with logs.phase("building the model", patience_seconds=3600.0):
        assert threading.active_count() == before + 1
    assert lines[0] == []


def test_ranks_that_do_not_speak_are_silent(lines):
    logging.getLogger(logs.ROOT).setLevel(logging.WARNING)
    before = threading.active_count()
    with logs.phase("building the model", patience_seconds=0.0):
        assert threading.active_count() == before
    assert lines[0] == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (119.4, "119 s"),
        (119.6, "2 min"),
        (3569, "59 min"),
        (3570.1, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (1e6, "277 h 47 min"),
        (1e8, "27,777 h 47 min"),
    ],
)
def test_durations_in_words(seconds, words):
    assert logs.duration(seconds) == words
