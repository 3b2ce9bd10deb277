"""Examples of token classification: words with tags and texts with spans, and one clear error for each wrong row."""

import json

import pytest

from engine.config.schema.data import ColumnsConfig
from engine.errors import DataError
from engine.tasks.words import inside_without_begin, join, read_words, split


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path, *rows):
    return read_words(write(tmp_path / "a.jsonl", rows), ColumnsConfig())


def test_words_are_joined_by_blanks_but_where_chinese_meets():
    words = ["在", "北", "京", "USB", "3", "ケ", "ー"]
    text, spans = join(words)
    assert text == "在北京 USB 3 ケー"
    assert [text[slice(*span)] for span in spans] == words
    text = "北京has 3 rivers, (one's) 长江."
    assert [text[slice(*span)] for span in split(text)] == [
        *("北", "京", "has", "3", "rivers", ",", "(", "one", "'", "s", ")", "长", "江", ".")
    ]


def test_words_and_spans_of_characters_are_the_same_examples(tmp_path):
    words = read(
        tmp_path,
        {"tokens": ["Ann", "Lee", "in", "Rome"], "tags": ["B-person", "I-person", "O", "B-place"]},
        {"tokens": list("在北京"), "tags": ["O", "B-place", "I-place"]},
    )
    entities = [{"start": 11, "end": 15, "label": "place"}, {"start": 0, "end": 7, "label": "person"}]
    spans = read(
        tmp_path,
        {"text": "Ann Lee in Rome", "entities": entities},
        {"text": "在北京", "entities": [{"start": 1, "end": 3, "label": "place"}]},
    )
    assert (words.texts, words.words, words.tags) == (spans.texts, spans.words, spans.tags)
    assert (words.has_spans, spans.has_spans) == (False, True)


def test_tags_of_a_data_set_are_read_by_name(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-x"])),
        }
    )
    rows = [{"tokens": ["a", "b"], "tags": [1, 0]}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "d"))
    assert read_words(str(tmp_path / "d"), ColumnsConfig()).tags == [["B-x", "O"]]


def span(start, end, label="x"):
    return {"start": start, "end": end, "label": label}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "row 1 of .* has 1 words and 2 tags"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "row 1 of .* in column 'tokens'"),
        ({"tokens": "a b", "tags": ["O"]}, "row 1 of .* has 'a b' in column 'tokens'"),
        ({"tokens": ["a"], "tags": [1]}, r"row 1 of .* has \[1\] in column 'tags'"),
        ({"tokens": [], "tags": []}, r"row 1 of .* has \[\] in column 'tokens'"),
        ({"tokens": ["a"], "tags": ["NOUN"]}, "row 1 of .* has tag 'NOUN'"),
        ({"tokens": ["a"], "tags": ["B-"]}, "row 1 of .* has tag 'B-'"),
        ({"tokens": ["a"]}, "has no column 'tags'"),
        ({"text": "one two", "entities": [span(0, 5)]}, "'one t' at characters 0 to 5 cuts the word 'two'"),
        ({"text": "one  two", "entities": [span(3, 5)]}, "holds no word"),
        ({"text": "one two", "entities": [span(0, 7), span(4, 7)]}, "overlap: characters 0 to 7 and 4 to 7"),
        ({"text": "one", "entities": [span(0, 4)]}, "at characters 0 to 4 of a text of 3"),
        ({"text": "one", "entities": [{"start": 0, "end": 3}]}, "has entities"),
        ({"text": "one", "entities": "PER"}, "has entities 'PER'"),
    ],
)
def test_a_wrong_row_is_one_clear_error(tmp_path, row, said):
    with pytest.raises(DataError, match=f"(?s){said}"):
        read(tmp_path, row)


def test_entities_without_a_begin_are_counted():
    assert inside_without_begin(["I-x", "I-x", "O", "I-y", "I-x", "B-x", "I-x", "B-x", "I-y"]) == 4
