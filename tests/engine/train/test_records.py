"""Records are found by their step, whatever lies between them, and without reading the whole file."""

import json
import random
from pathlib import Path

import pytest

from engine.train import records
from engine.train.records import METRICS, cut, last_step, metric_of, read_metrics, records_from, records_of


def write(folder: Path, *lines: str | dict, end: str = "\n") -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / METRICS).write_text("\n".join(texts) + end, encoding="utf-8")


def steps_of(found) -> list[int]:
    return [record["step"] for record in found]


NO_RECORDS = [
    "",
    "   ",
    "{}",
    "[1]",
    "7",
    '{"step": "x"}',
    '{"step": 1e400}',
    "\x00\x00",
    '{"step": 2, "lo',
    "é",
    "[" * 9000,
]


@pytest.mark.parametrize("line", NO_RECORDS)
def test_a_line_that_is_no_record_hides_nothing_behind_it(tmp_path, line):
    write(tmp_path, {"step": 1}, line, {"step": 2}, line, line, {"step": 3})
    assert steps_of(read_metrics(tmp_path)) == [1, 2, 3]
    assert steps_of(records_from(tmp_path, 2)) == [2, 3]
    assert last_step(tmp_path) == 3
    cut(tmp_path, 2, 0)
    assert steps_of(read_metrics(tmp_path)) == [1, 2]


def test_bytes_that_are_no_text_are_no_record(tmp_path):
    (tmp_path / METRICS).write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    assert steps_of(read_metrics(tmp_path)) == steps_of(records_from(tmp_path, 0)) == [1, 2]


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path) == list(records_from(tmp_path, 0)) == records_of(tmp_path, 3) == []
    assert last_step(tmp_path) == 0
    assert metric_of(tmp_path, [1, 2], "loss") == {}


@pytest.mark.parametrize("seed", range(20))
def test_every_step_is_found_and_every_cut_is_that_of_a_plain_filter(tmp_path, seed):
    draw = random.Random(seed)
    lines, step = [], 0
    for _ in range(draw.randrange(40)):
        step += draw.choice((0, 0, 1, 3))
        number = draw.randrange(5)
        extra = (
            {"rollback": number} if draw.random() < 0.2 else {"loss": draw.random(), "pad": "x" * draw.randrange(300)}
        )
        lines.append({"step": step, **extra} if draw.random() < 0.8 else draw.choice(NO_RECORDS[:-1]))
    write(tmp_path, *lines, end=draw.choice(("", "\n")))
    known = [line for line in lines if isinstance(line, dict)]
    assert read_metrics(tmp_path) == known
    for wanted in range(step + 3):
        assert list(records_from(tmp_path, wanted)) == [one for one in known if one["step"] >= wanted]
        assert records_of(tmp_path, wanted) == [one for one in known if one["step"] == wanted]
    assert last_step(tmp_path) == (known[-1]["step"] if known else 0)
    at, rollbacks = draw.randrange(step + 2), draw.randrange(5)
    kept = [one for one in known if one["step"] <= at]
    told = [
        one | {"step": at + 1}
        for one in known
        if one["step"] > at and "rollback" in one and one["rollback"] <= rollbacks
    ]
    cut(tmp_path, at, rollbacks)
    assert read_metrics(tmp_path) == kept + told
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 1000}\n')
    assert read_metrics(tmp_path) == [*kept, *told, {"step": 1000}], "what is added begins a line of its own"


@pytest.mark.parametrize("num_steps", [1_000, 64_000])
def test_what_is_read_does_not_grow_with_the_run(tmp_path, num_steps, monkeypatch):
    """Parsed lines stand for the cost: one per halving of the file, and those that are asked for."""
    with (tmp_path / METRICS).open("w") as file:
        for step in range(1, num_steps + 1):
            file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
    num_parsed, parse = 0, records._parse

    def counted(line: bytes):
        nonlocal num_parsed
        num_parsed += 1
        return parse(line)

    monkeypatch.setattr(records, "_parse", counted)
    half = num_steps // 2
    assert last_step(tmp_path) == num_steps
    assert metric_of(tmp_path, [half, 10], "loss") == {half: 1 / half, 10: 0.1}
    assert steps_of(records_of(tmp_path, half)) == [half]
    cut(tmp_path, num_steps - 10, 0)
    assert last_step(tmp_path) == num_steps - 10
    halvings = (tmp_path / METRICS).stat().st_size.bit_length()
    assert num_parsed <= 6 * (halvings + 2) + 10
