"""Hugging Face datasets from local folders, streamed in their own order."""

import gzip

import pytest

from engine.corpus.sources import hub
from engine.corpus.sources.chunks import read_texts
from engine.corpus.sources.hub import read_columns
from engine.errors import DataError
from tests.engine.data.corpus import made_up_texts, write_json_lines


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


def test_a_folder_of_parquet_files(datasets, tmp_path, monkeypatch):
    texts = made_up_texts(30)
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "train.parquet")
    assert [text for text, _ in read_columns(f"hf:{tmp_path}", "text")] == texts


def test_a_folder_of_json_lines_by_split(datasets, tmp_path):
    write_json_lines(tmp_path / "train.jsonl", ["a", "b"])
    write_json_lines(tmp_path / "test.jsonl", ["c"])
    assert list(read_texts([f"hf:{tmp_path}", f"hf:{tmp_path}@test"], "text", False)) == ["a", "b", "c"]


def test_one_saved_to_disk_with_and_without_splits(datasets, tmp_path):
    texts = made_up_texts(5)
    data = datasets.Dataset.from_dict({"text": texts})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    assert [text for text, _ in read_columns(f"hf:{tmp_path}/one", "text")] == texts
    assert [text for text, _ in read_columns(f"hf:{tmp_path}/splits@train", "text")] == texts
    with pytest.raises(DataError, match="cannot be read: 'test'"):
        list(read_columns(f"hf:{tmp_path}/splits@test", "text"))


def test_what_is_not_there_is_one_clear_error(datasets, tmp_path):
    write_json_lines(tmp_path / "train.jsonl", ["a"])
    with pytest.raises(DataError, match=r"row 0 of hf:.* has no text in column 'body'") as caught:
        list(read_columns(f"hf:{tmp_path}", "body"))
    assert "text (str)" in str(caught.value)
    with pytest.raises(DataError, match="cannot be read") as caught:
        list(read_columns(f"hf:{tmp_path}@nosplit", "text"))
    assert "check the name, the config, the split" in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        list(read_columns(f"hf:{tmp_path}/nowhere/at/all", "text"))


def test_every_failure_below_the_library_is_one_clear_error(datasets, tmp_path):
    """A truncated gzip (an `EOFError`, which click would take for an end of input), an empty file."""
    rows = b"".join(b'{"text": "row %d", "n": %d}\n' % (n, n) for n in range(3000))
    packed = gzip.compress(rows)
    broken = {
        "gzip": ("train.jsonl.gz", packed[: len(packed) // 2]),
        "empty": ("train.jsonl", b""),
        "text": ("train.txt.gz", gzip.compress(b"line\n" * 9000)[:-20]),
        "parquet": ("train.parquet", b"PAR1 and no more"),
    }
    for name, (file, content) in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(content)
        with pytest.raises(DataError, match=f"dataset hf:.*{name} cannot be read") as caught:
            list(read_columns(f"hf:{tmp_path}/{name}", "text"))
        assert caught.value.remedy


@pytest.mark.parametrize("error", [TypeError("Couldn't cast array of type struct"), RuntimeError(""), EOFError("cut")])
def test_a_failure_in_the_middle_tells_the_row_before(datasets, monkeypatch, error):
    """As where a column has another type in a later block."""

    def rows(path, config, split, column):
        yield from ({"text": "a"} for _ in range(5))
        raise error

    monkeypatch.setattr(hub, "_rows", rows)
    with pytest.raises(
        DataError, match=f"dataset hf:x cannot be read after row 4: {str(error) or type(error).__name__}"
    ):
        list(read_columns("hf:x", "text"))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_column_that_nobody_reads_may_change_its_type_or_vanish(datasets, tmp_path, suffix):
    """In another file, whose types are not those of the first; a cast of all columns would end there."""
    texts = [[f"{name} {number}" for number in range(20)] for name in "abc"]
    others = ([*range(20)], ["late"] * 20, None)
    for number, (column, other) in enumerate(zip(texts, others, strict=True)):
        data = datasets.Dataset.from_dict({"text": column} | ({"n": other} if other is not None else {"m": column}))
        path = tmp_path / f"train-{number}.{suffix}"
        {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[suffix](path)
    assert [text for text, _ in read_columns(f"hf:{tmp_path}", "text")] == [text for column in texts for text in column]
    with pytest.raises(DataError, match=r"has no text in column 'n'|cannot be read after row"):
        list(read_columns(f"hf:{tmp_path}", "n"))
