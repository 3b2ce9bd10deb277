"""Files of examples: the same from every format, and one clear error for each way in which they are wrong."""

import csv
import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from engine.config.schema.data import ColumnsConfig
from engine.errors import DataError
from engine.tasks.examples import find_labels, read_examples, require_examples_of

ROWS = [
    {"text": "a stirring, funny film", "other": "it is\nfunny", "label": "good"},
    {"text": 'apparently "reassembled"', "other": "from the floor", "label": "bad"},
    {"text": "so they trot out the science", "other": "再利用された羊皮紙", "label": "good"},
]
COLUMNS = ColumnsConfig(pair="other")


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(path, rows=ROWS):
    ending = path.name.partition(".")[2]
    if ending == "jsonl":
        write_jsonl(path, rows)
    elif ending == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n\n" for row in rows).encode()))
    elif ending in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8-sig" if ending == "csv" else "utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet", "folder"])
def test_every_format_gives_the_same_examples(tmp_path, name):
    write(tmp_path / name)
    found = read_examples(str(tmp_path / name), COLUMNS)
    assert found.texts == [row["text"] for row in ROWS]
    assert found.pairs == [row["other"] for row in ROWS]
    assert found.labels == [row["label"] for row in ROWS]
    assert read_examples(str(tmp_path / name), ColumnsConfig()).pairs is None


def test_labels_of_a_data_set_are_read_by_name(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["World", "Sports"])}
    )
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "d"))
    assert read_examples(str(tmp_path / "d"), ColumnsConfig()).labels == ["Sports", "World"]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["good", "bad"], ("bad", "good")),
        ([10, 9, -1], ("-1", "9", "10")),
        ([True, False], ("False", "True")),
        ([1.0, 2.0], ("1", "2")),
        (["10", "9"], ("9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
    ],
)
def test_labels_are_found_in_an_order_of_their_own(tmp_path, labels, found):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "t", "label": label} for label in labels])
    assert find_labels(read_examples(str(tmp_path / "a.jsonl"), ColumnsConfig())) == found


def test_named_labels_may_stand_in_the_file_as_numbers(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "t", "label": label} for label in (1, 0, 1)])
    examples = read_examples(str(tmp_path / "a.jsonl"), ColumnsConfig())
    assert examples.numbered(("World", "Sports")) == [1, 0, 1]
    assert examples.numbered(("1", "0")) == [0, 1, 0]  # names come first


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "t", "label": 1}, {"text": "t"}], r"row 2 of .* has no column 'label'.*allowed: 'text'"),
        ([{"text": "t", "label": 1}, {"text": " ", "label": 1}], "row 2 of .* has an empty text in column 'text'"),
        ([{"text": 7, "label": 1}], "row 1 of .* has no text in column 'text': 7"),
        ([{"text": "t", "label": None}], "row 1 of .* has label None"),
        ([{"text": "t", "label": ["a"]}], r"row 1 of .* has label \['a'\]"),
        ([{"text": "t", "label": float("nan")}], "row 1 of .* has label nan"),
        ([{"text": "t", "label": ""}], "row 1 of .* has label ''"),
        ([], "holds no example"),
        (
            [{"text": "t", "label": "1"}, {"text": "t", "label": 2}],
            "row 2 of .* has label 2 in column 'label', a number, where the rows before have text",
        ),
        (
            [{"text": "t", "label": 1}, {"text": "t", "label": True}],
            "true or false, where the rows before have a number",
        ),
    ],
)
def test_a_wrong_row_is_told_with_its_file_and_column(tmp_path, rows, said):
    write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=f"(?s){said}"):
        read_examples(str(tmp_path / "a.jsonl"), ColumnsConfig())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "t", "label": 1}\n{"text', "line 2 of .* is no JSON"),
        ("a.jsonl", b"[1]\n", "line 1 of .* is list"),
        ("a.csv", b"text,label\na,b,c\n", "line 2 of .* another number of fields"),
        ("a.csv", b"text,label\na\n", "line 2 of .* another number of fields"),
        ("a.csv", b'text,label\n"a"b,c\n', "line 2 of"),
        ("a.csv", b"text,label\n\xff,c\n", "not UTF-8 at byte 11"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "t", "label": 1}\n' * 99, mtime=0)[:-9], "is damaged"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.txt", b"a\tb", "of no format"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_one_clear_error(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_examples(str(tmp_path / name), ColumnsConfig())


def test_missing_files_and_folders_of_splits(tmp_path):
    import datasets

    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: No such file"):
        read_examples(str(tmp_path / "a.jsonl"), ColumnsConfig())
    with pytest.raises(DataError, match="cannot be read as a data set"):
        read_examples(str(tmp_path), ColumnsConfig())
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="several splits") as caught:
        read_examples(str(tmp_path / "d"), ColumnsConfig())
    assert f"name {tmp_path / 'd'}/train" in str(caught.value)


def test_labels_that_training_lacks_are_told(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    examples = read_examples(str(tmp_path / "a.jsonl"), COLUMNS)
    with pytest.raises(DataError, match=r"row 2 of .* has label 'bad', which is not among"):
        examples.numbered(("good", "fair"))
    labels = ("good", "bad", "fair")
    numbers = examples.numbered(labels)
    with pytest.raises(DataError, match="no example of label fair"):
        require_examples_of(labels, examples, numbers)
    with pytest.raises(DataError, match=r"row 1 of .* has label 'good'"):
        examples.numbers()


def test_one_label_alone_teaches_nothing(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "t", "label": 1}] * 3)
    with pytest.raises(DataError, match=r"every example of .* has label '1'"):
        find_labels(read_examples(str(tmp_path / "a.jsonl"), ColumnsConfig()))
