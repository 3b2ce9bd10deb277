"""Sources are found in a fixed order, and each document that is not what it should be is named by file and line."""

import gzip
import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from engine.corpus.sources.chunks import (
    TextChunk,
    content_hash,
    find_sources,
    parse,
    read_chunks,
    read_texts,
    shelves,
    split_domain,
)
from engine.corpus.sources.hub import split_hub_name
from engine.errors import ConfigError, DataError
from tests.engine.data.corpus import made_up_texts, write_json_lines


def texts_of(*names, key="text", blank_line_ends=False):
    return list(read_texts([str(name) for name in names], key, blank_line_ends))


def test_json_lines_plain_and_compressed(tmp_path):
    texts = made_up_texts(20)
    path = write_json_lines(tmp_path / "a.jsonl", texts)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert texts_of(path) == texts_of(packed) == texts
    write_json_lines(path, texts, key="body")
    assert texts_of(path, key="body") == texts


def test_empty_lines_between_json_lines_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n  \n{"text": "two"}')
    assert texts_of(tmp_path / "a.jsonl") == ["one", "two"]


def test_a_text_file_is_a_document_or_many(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert texts_of(tmp_path / "a.txt") == ["one\ntwo\n\n\nthree\n"]
    assert texts_of(tmp_path / "a.txt", blank_line_ends=True) == ["one\ntwo", "three"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve".encode("utf-8-sig"))
    assert texts_of(tmp_path / "a.txt") == ["naïve"]


def test_folders_and_globs_are_sorted_and_each_file_comes_once(tmp_path):
    for name in ("b.txt", "a.md", "deep/c.py", "deep/d.txt.gz", "x.bin", ".hidden.txt", ".git/e.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(name.encode()) if name.endswith(".gz") else name.encode())
    assert texts_of(tmp_path) == ["a.md", "b.txt", "deep/c.py", "deep/d.txt.gz"]
    assert texts_of(tmp_path / "*.txt", tmp_path) == ["b.txt", "a.md", "deep/c.py", "deep/d.txt.gz"]
    assert texts_of(tmp_path / "**/*.txt*") == ["b.txt", "deep/d.txt.gz"]
    assert texts_of(tmp_path / "x.bin") == ["x.bin"]  # named itself, a file may be called anything


def test_chunks_keep_every_document_and_reach_the_end_of_the_file(tmp_path):
    texts = [f"{number} " * 3000 for number in range(300)]
    [source] = find_sources([str(write_json_lines(tmp_path / "a.jsonl", texts))])
    chunks = list(read_chunks([source], "text", blank_line_ends=False))
    assert len(chunks) > 2
    assert [document.text for chunk in chunks for document in parse(chunk, "text")] == texts
    assert all(chunk.read_bytes > 0 for chunk in chunks)
    assert sum(chunk.read_bytes for chunk in chunks) == source.num_bytes


def test_reading_may_stop_early(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", ["abc", "dé", "later"])
    assert list(read_texts([str(path)], "text", False, max_bytes=4)) == ["abc", "dé"]


def test_reading_in_part_hears_every_source(tmp_path):
    for name, count in (("a.jsonl", 3000), ("b.jsonl", 1000)):
        write_json_lines(tmp_path / name, [f"{name} {number:04d}" * 200 for number in range(count)])
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    texts = list(read_texts(names, "text", False, max_bytes=400_000))
    # documents of 2,400 bytes; shares follow the sizes, 3 to 1
    assert [sum(text.startswith(name) for text in texts) for name in ("a.jsonl", "b.jsonl")] == [125, 42]


def test_content_decides_the_hash(tmp_path):
    for name, content in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other")):
        (tmp_path / name).write_text(content)
    hashes = [content_hash(source) for source in find_sources([str(tmp_path)])]
    assert hashes[0] == hashes[1] != hashes[2]
    assert content_hash(find_sources(["hf:a"])[0]) != content_hash(find_sources(["hf:b"])[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', "a.jsonl:2 is no JSON"),
        (b"\xff\xfe", "a.jsonl:2 is no JSON"),
        (b'{"body": "x", "id": 1}', "a.jsonl:2 has no key 'text'\n  allowed: a key that is there: body, id"),
        (b'["text"]', "a.jsonl:2 is an array\n  allowed: one JSON object a line"),
        (b"{}", "a.jsonl:2 has no key 'text'\n  allowed: an object with a text"),
        (b'{"text": 5}', "a.jsonl:2 has a number under 'text'\n  allowed: a string"),
        (b'{"text": null}', "a.jsonl:2 has null under 'text'"),
        (b'{"text": "\\ud800"}', "a.jsonl:2 holds half a surrogate pair"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        texts_of(tmp_path / "a.jsonl")
    assert "to do: " in str(caught.value)


def test_text_that_is_no_utf_8_is_named_by_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\ngood\nna\xefve\n")
    for blank_line_ends in (False, True):
        with pytest.raises(DataError, match=r"a\.txt:4 is no UTF-8: .* \(byte 0xef\)"):
            texts_of(tmp_path / "a.txt", blank_line_ends=blank_line_ends)


def test_a_source_that_is_nothing_is_refused(tmp_path):
    for name in (tmp_path / "nowhere.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match="there is no source") as caught:
            find_sources([str(name)])
        assert name.name in str(caught.value)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match="holds no text"):
        find_sources([str(tmp_path)])


def test_names_of_hub_datasets():
    assert split_hub_name("hf:org/name") == ("org/name", None, "train")
    assert split_hub_name("hf:org/name:config@test[:5%]") == ("org/name", "config", "test[:5%]")
    with pytest.raises(ConfigError, match="names no dataset"):
        split_hub_name("hf:@train")


def test_a_chunk_is_parsed_by_its_kind():
    content = json.dumps({"text": "inner"}).encode()
    assert parse(TextChunk("json", [("s", 1, content)], 0), "text") == [("inner", "", "", 1.0)]
    assert parse(TextChunk("text", [("s", 1, content)], 0), "text") == [(content.decode(), "", "", 1.0)]


def test_a_domain_stands_before_its_source(tmp_path, monkeypatch):
    assert split_domain("en=data/a.jsonl") == ("en", "data/a.jsonl")
    assert split_domain("zh=hf:org/name@test") == ("zh", "hf:org/name@test")
    assert split_domain("data/date=2024/a.jsonl") == ("", "data/date=2024/a.jsonl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "date=2024").write_text("a path that exists is a path")
    assert split_domain("date=2024") == ("", "date=2024")
    (tmp_path / "a.txt").write_text("a")
    assert [(item.domain, item.name) for item in find_sources(["x=a.txt", "y=a.txt", "x=*.txt"])] == [
        ("x", "a.txt"),
        ("y", "a.txt"),
    ]


def test_small_files_share_a_shelf_and_large_ones_have_their_own(tmp_path):
    for name, size in (("a.txt", 10), ("b.txt", 10), ("c.jsonl", 10), ("d.txt", 5 << 20), ("e.txt", 10)):
        (tmp_path / name).write_bytes(b"x" * size)
    sources = find_sources([str(tmp_path), "hf:somewhere"])
    names = [[source.name.rpartition("/")[2] for source in shelf] for shelf in shelves(sources)]
    assert names == [["a.txt", "b.txt"], ["c.jsonl"], ["d.txt"], ["e.txt"], ["hf:somewhere"]]


def test_lines_keep_their_numbers_over_blocks(tmp_path):
    lines = [json.dumps({"text": "x" * 700_000}).encode() for _ in range(5)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b"{"]))
    with pytest.raises(DataError, match=r"a\.jsonl:6 is no JSON"):
        texts_of(tmp_path / "a.jsonl")


def test_parquet_by_suffix_and_in_a_folder(tmp_path):
    texts = [*made_up_texts(3000), "naïve 日本"]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(3001), "text": texts}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == texts_of(tmp_path) == texts
    column = pyarrow.array(texts).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"body": column}), tmp_path / "b.parquet")
    assert texts_of(tmp_path / "b.parquet", key="body") == texts


def test_parquet_that_is_not_what_it_should_be_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "text": ["one"]}), path)
    for key in ("body", "id"):
        with pytest.raises(DataError, match=rf"has no text in a column '{key}'\n.*id \(int64\), text \(string\)"):
            texts_of(path, key=key)
    for content in (path.read_bytes()[:-10], b"", b"this is no parquet"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
            texts_of(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    with pytest.raises(DataError, match=r"row 1 of .*a\.parquet has no text"):
        texts_of(path)


def test_the_content_of_a_local_dataset_decides_its_hash(tmp_path):
    path = write_json_lines(tmp_path / "train.jsonl", ["a"])
    [source] = find_sources([f"hf:{tmp_path}"])
    before = content_hash(source)
    assert content_hash(source) == before
    write_json_lines(path, ["b"])
    assert content_hash(source) != before


def test_parquet_that_is_no_utf_8_is_named_by_row(tmp_path):
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, pyarrow.py_buffer(np.array([0, 2, 3, 5], "<i4")), pyarrow.py_buffer(b"abc\xff\xfe")]
    )
    for column in (broken, broken.dictionary_encode()):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"row 2 of .*a\.parquet is no UTF-8: .* \(byte 0xff\)"):
            texts_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
def test_every_type_of_string_in_parquet_is_text(tmp_path, kind):
    texts = ["naïve 日本", "", "a string that is too long to be kept inline in a view"]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, kind)}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == texts


def test_a_byte_order_mark_in_a_row_is_text(tmp_path):
    texts = ["first", "\ufeffsecond"]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == texts


def test_a_column_whose_name_has_a_dot_is_not_the_field_of_a_struct(tmp_path):
    struct, flat = pyarrow.array([{"b": "of the struct"}]), pyarrow.array(["flat"])
    for names, columns in ((["a", "a.b"], [struct, flat]), (["a.b", "a"], [flat, struct])):
        pyarrow.parquet.write_table(pyarrow.table(columns, names=names), tmp_path / "a.parquet")
        assert texts_of(tmp_path / "a.parquet", key="a.b") == ["flat"]
        with pytest.raises(DataError, match="has no text in a column 'a'\n"):
            texts_of(tmp_path / "a.parquet", key="a")


def test_json_that_is_nested_too_deep_is_named_by_line(tmp_path):
    for deep in ("[" * 200_000, '{"a":' * 200_000):
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two", "x": ' + deep + "\n")
        with pytest.raises(DataError, match=r"a\.jsonl:2 is no JSON: it is nested too deep"):
            texts_of(tmp_path / "a.jsonl")


def test_a_glob_may_hold_an_equals_sign(tmp_path, monkeypatch):
    for name in ("lang=en/a.txt", "lang=de/b.txt"):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    assert texts_of("lang=*/*.txt") == ["lang=de/b.txt", "lang=en/a.txt"]
    assert texts_of("lang=en/*.txt") == ["lang=en/a.txt"]
    assert [item.domain for item in find_sources(["english=lang=en/*.txt"])] == ["english"]
    with pytest.raises(DataError, match=r"there is no source lang=fr/\*\.txt"):
        find_sources(["lang=fr/*.txt"])


def test_an_empty_source_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    for name in ("", " "):
        with pytest.raises(ConfigError, match="a source is empty"):
            find_sources([name])


def test_no_text_of_a_cut_off_dataset_is_left_out_in_silence(tmp_path):
    """Where the last whole frame ends a line, the library's reader sees a shorter data set."""
    frame = zstandard.ZstdCompressor().compress(b'{"text": "a"}\n' * 100)
    (tmp_path / "train.jsonl.zst").write_bytes(frame + frame[:-5])
    with pytest.raises(DataError, match=r"train\.jsonl\.zst is damaged: the last zstd frame is cut off"):
        content_hash(find_sources([f"hf:{tmp_path}"])[0])
