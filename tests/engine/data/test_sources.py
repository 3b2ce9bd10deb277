"""Sources are found in a fixed order, and each document that is not what it should be is named by file and line."""

import gzip
import json
import re

import pytest

from engine.data.hub import split_hub_name
from engine.data.sources import Chunk, content_hash, find_sources, parse, read_chunks, read_texts
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
    chunks = list(read_chunks(source, "text", blank_line_ends=False))
    assert len(chunks) > 2
    assert [text for chunk in chunks for text in parse(chunk, "text")] == texts
    assert [chunk.read_bytes for chunk in chunks] == sorted(chunk.read_bytes for chunk in chunks)
    assert chunks[-1].read_bytes == source.num_bytes


def test_reading_may_stop_early(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", ["abc", "dé", "later"])
    assert list(read_texts([str(path)], "text", False, max_bytes=4)) == ["abc", "dé"]


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
        (b'{"body": "x", "id": 1}', "a.jsonl:2 has no key 'text'\n  allowed: body, id"),
        (b'["text"]', "a.jsonl:2 has no key 'text'\n  allowed: a list, not an object"),
        (b'{"text": 5}', "a.jsonl:2 has int under 'text'"),
        (b'{"text": null}', "a.jsonl:2 has NoneType under 'text'"),
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
    assert parse(Chunk("s", "json", [(1, content)], 0), "text") == ["inner"]
    assert parse(Chunk("s", "text", [(1, content)], 0), "text") == [content.decode()]
