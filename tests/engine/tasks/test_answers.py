"""Examples of question answering: the same from every format, and one clear error for each wrong row."""

import json

import pytest

from engine.config.schema.data import ColumnsConfig
from engine.errors import DataError
from engine.tasks.answers import read_answers

CONTEXT = "The codex was scraped in 1229. Monks wrote prayers over it."
ROW = {"id": "a", "context": CONTEXT, "question": "When?", "answers": [{"text": "1229", "start": 25}]}


def read(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_answers(str(path), ColumnsConfig())


def test_every_format_gives_the_same_examples(tmp_path):
    lines = read(tmp_path / "a.jsonl", ROW)
    theirs = read(tmp_path / "b.jsonl", ROW | {"answers": {"text": ["1229"], "answer_start": [25]}})
    answer = {"text": "1229", "answer_start": 25}
    squad = {"data": [{"paragraphs": [{"context": CONTEXT, "qas": [ROW | {"answers": [answer]}]}]}]}
    whole = read(tmp_path / "c.json", json.dumps(squad, indent=1))
    for found in (lines, theirs, whole):
        assert (found.ids, found.questions, found.contexts, found.answers) == (
            ["a"],
            ["When?"],
            [CONTEXT],
            [[(25, 29)]],
        )
    assert read(tmp_path / "d.json", ROW).ids == ["a"], "JSON lines under another name"


def test_impossible_questions_have_no_answer(tmp_path):
    answer = {"text": "1229", "answer_start": 25}
    impossible = {"id": "b", "question": "Why?", "is_impossible": True, "answers": [answer]}
    squad = {"data": [{"paragraphs": [{"context": CONTEXT, "qas": [impossible]}]}]}
    assert read(tmp_path / "c.json", squad).answers == [[]]


def test_blanks_around_an_answer_are_no_part_of_it(tmp_path):
    assert read(tmp_path / "a.jsonl", ROW | {"answers": [{"text": " 1229", "start": 24}]}).answers == [[(25, 29)]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"answers": [{"text": "1229", "start": 24}]},
            "row 1 of .* has answer '1229' at character 24.*allowed: its place, 25",
        ),
        ({"answers": [{"text": "1330", "start": 25}]}, "a part of the context"),
        ({"answers": [{"text": "1229", "start": -1}]}, "at character -1"),
        ({"answers": [{"text": "1229"}]}, "has answers"),
        ({"answers": {"text": ["a"], "answer_start": []}}, "has answers"),
        ({"answers": "1229"}, "has answers"),
        ({"question": ""}, "an empty text in column 'question'"),
        ({"context": 7}, "no text in column 'context'"),
    ],
)
def test_a_wrong_row_is_one_clear_error(tmp_path, change, said):
    with pytest.raises(DataError, match=f"(?s){said}"):
        read(tmp_path / "a.jsonl", ROW | change)


def test_ids_are_told_apart_and_files_checked(tmp_path):
    with pytest.raises(DataError, match=r"row 2 of .* has id 'a', as a row before it has"):
        read(tmp_path / "a.jsonl", f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n")
    with pytest.raises(DataError, match="is not SQuAD's format"):
        read(tmp_path / "c.json", {"data": [{"paragraph": []}]})
    with pytest.raises(DataError, match="holds no example"):
        read(tmp_path / "c.json", {"data": []})
