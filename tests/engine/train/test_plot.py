import json
import math
import threading
import warnings

import pytest
from PIL import Image

from engine.train import plot
from engine.train.plot import MAX_POINTS, PLOT, Plot, draw, isolated, read_curves, title

NAMES = [
    "gpt2-124m",
    "日本語の事前学習",
    "русский корпус",
    "ไทย",
    "عربي",
    "हिन्दी",
    "한국어",
    "ελληνικά 😀",
    "costs $5_{x and 6% \\frac",
    "two\nlines\tand \x07",
    "\U0001f9ff\u200d\U000e0041",
    "",
    "n" * 500,
]


def record(step: int, loss: float | None = 1.0) -> dict[str, float | int]:
    return {"step": step, "learning_rate": 1e-3} | ({} if loss is None else {"loss": loss})


def lines(*records: dict[str, float | int]) -> list[bytes]:
    return [json.dumps(one).encode() + b"\n" for one in records]


def write(folder, *records: dict[str, float | int]) -> None:
    (folder / "metrics.jsonl").write_bytes(b"".join(lines(*records)))


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_titled_by_a_name_in_any_script(tmp_path, name):
    """Matplotlib warns of each glyph that it has to draw as a box."""
    write(tmp_path, *(record(step, 9.0 - step) for step in range(1, 9)), {"step": 8, "validation_loss": 2.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(tmp_path, "metrics.jsonl", name)
    with Image.open(tmp_path / PLOT) as image:
        assert image.size == (960, 540)
        assert image.info["Title"] == name
    assert [path.name for path in tmp_path.glob("loss*")] == [PLOT], "nothing half drawn is left"


def test_scripts_without_a_font_are_romanised_and_others_stay(monkeypatch):
    monkeypatch.setattr(plot, "_families", lambda text: (["DejaVu Sans"], set(text) & set("日本語")))
    assert title("日本語 русский $x$")[0] == "RiBenYu русский $x$"


def test_a_long_name_is_cut():
    assert title("n" * 500)[0] == "n" * 77 + "..."


def test_a_loss_that_is_no_number_breaks_the_line():
    training, _ = read_curves(lines(record(1, 3.0), record(2, None), record(3, 1.0), record(4, 0.5)))
    assert [step for step, _ in training] == [1, 2, 3, 4]
    assert math.isnan(training[1][1])
    assert isolated(training) == [(1, 3.0)]
    _, held_out = read_curves(lines({"step": 2, "validation_loss": 3.0}, {"step": 4, "validation_seconds": 1.0}))
    assert held_out[0] == (2, 3.0)
    assert math.isnan(held_out[1][1])
    assert isolated([(5, 1.0)]) == [(5, 1.0)], "a single record is drawn as a point"


def test_long_runs_keep_evenly_spaced_records_and_every_evaluation():
    count = 5 * MAX_POINTS + 3

    def records():
        for step in range(1, count + 1):
            yield from lines(record(step, step / 2))
            if step % 1000 == 0:
                yield from lines({"step": step, "validation_loss": step / 4})

    training, held_out = read_curves(records())
    assert MAX_POINTS / 2 <= len(training) <= MAX_POINTS
    assert [step for step, _ in training] == list(range(1, count + 1, 8))
    assert all(loss == step / 2 for step, loss in training)
    assert [step for step, _ in held_out] == list(range(1000, count, 1000))


def test_lines_that_are_no_records_are_left_out():
    found = [*lines(record(1)), b"\n", b"[]\n", b"{}\n", *lines(record(2)), b'{"step": 3, "learning_rate": 1e-3, "lo']
    assert [step for step, _ in read_curves(found)[0]] == [1, 2]


class Drawn:
    """Stands for `draw`: counts, and waits where it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.count, self.begun, self.go = 0, threading.Event(), threading.Event()
        self.go.set()
        monkeypatch.setattr(plot, "draw", self)

    def __call__(self, folder, source, name, borders) -> None:
        self.count += 1
        self.begun.set()
        assert self.go.wait(60)


def finish(sink: Plot) -> None:
    assert sink._thread is not None
    sink._thread.join()


def test_drawings_are_made_as_the_run_goes_and_spaced(tmp_path, monkeypatch):
    drawn, now = Drawn(monkeypatch), [0.0]
    sink = Plot(tmp_path, "metrics.jsonl", "run", clock=lambda: now[0])
    sink.write(record(1))
    finish(sink)
    for seconds, count in ((plot.EVERY_SECONDS - 1, 1), (plot.EVERY_SECONDS + 1, 2)):
        now[0] = seconds
        sink.write(record(2))
        finish(sink) if sink._thread else None
        assert drawn.count == count
    sink.close()
    assert drawn.count == 3, "all of the run at its end"


def test_a_step_never_waits_for_a_drawing(tmp_path, monkeypatch):
    drawn = Drawn(monkeypatch)
    drawn.go.clear()
    sink = Plot(tmp_path, "metrics.jsonl", "run")
    for step in range(1, 100):
        sink.write(record(step))  # would wait for ever
    assert drawn.begun.wait(60)
    assert drawn.count == 1, "one at a time"
    drawn.go.set()
    sink.close()
    assert drawn.count == 2


def test_a_drawing_that_fails_costs_one_warning(tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(plot._log, "warning", lambda words, *values: told.append(words % values))
    sink = Plot(tmp_path, "metrics.jsonl", "run")  # there are no metrics
    sink.write(record(1))
    sink.close()
    sink.close()
    assert len(told) == 1
    assert told[0].startswith("loss.png cannot be drawn and is left out: ")


def test_a_run_without_records_draws_an_empty_picture(tmp_path):
    write(tmp_path)
    draw(tmp_path, "metrics.jsonl", "run")
    assert (tmp_path / PLOT).exists()
