"""Plain and compressed files read the same, and a damaged one is an error, never a shorter text."""

import gzip

import pytest
import zstandard

from engine.corpus.sources import text_files
from engine.errors import DataError

CONTENT = b"one\ntwo\n\n\nthree\r\nfour\r\n\r\nlast without end"


def zstd_frames(content):
    """Two frames, as `cat a.zst b.zst` makes them."""
    compress = zstandard.ZstdCompressor().compress
    return compress(content[:9]) + compress(content[9:])


PACKED = {
    "text.txt": lambda content: content,
    "text.txt.gz": lambda content: gzip.compress(content[:9]) + gzip.compress(content[9:]),
    "text.txt.zst": zstd_frames,
    "text.TXT.ZST": zstd_frames,
}


@pytest.fixture(params=PACKED)
def path(request, tmp_path):
    file = tmp_path / request.param
    file.write_bytes(PACKED[request.param](CONTENT))
    return file


def test_lines_whole_and_paragraphs(path):
    name = str(path)
    assert b"".join(line for _, line, _ in text_files.lines(name)) == CONTENT
    assert [number for number, _, _ in text_files.lines(name)] == list(range(1, 9))
    assert [(number, content) for number, content, _ in text_files.whole(name)] == [(1, CONTENT)]
    pieces = [(number, content) for number, content, _ in text_files.paragraphs(name)]
    assert pieces == [(1, b"one\ntwo"), (5, b"three\r\nfour"), (8, b"last without end")]


def test_how_far_the_file_was_read_ends_at_its_size(path):
    for read in (text_files.lines, text_files.whole, text_files.paragraphs):
        assert [so_far for _, _, so_far in read(str(path))][-1] == path.stat().st_size


def test_blocks_end_with_a_line_and_know_their_first(path):
    for size in (1, 5, 1000):
        blocks = list(text_files.blocks(str(path), size))
        assert b"".join(block for _, block, _ in blocks) == CONTENT
        assert all(block.endswith(b"\n") for _, block, _ in blocks[:-1])
        assert [number for number, _, _ in blocks] == [
            1 + b"".join(block for _, block, _ in blocks[:i]).count(b"\n") for i in range(len(blocks))
        ]
        assert blocks[-1][2] == path.stat().st_size


def test_a_long_zstd_file_reads_whole(tmp_path):
    content = bytes(range(256)) * 20_000  # longer than any block
    (tmp_path / "a.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    assert next(text_files.whole(str(tmp_path / "a.zst")))[1] == content


@pytest.mark.parametrize(
    ("suffix", "damage"), [("gz", "cut"), ("gz", "flipped"), ("gz", "other"), ("zst", "cut"), ("zst", "other")]
)
def test_a_damaged_file_is_an_error(tmp_path, suffix, damage):
    content = b"".join(b"line %d\n" % number for number in range(5000))
    packed = bytearray(gzip.compress(content) if suffix == "gz" else zstandard.ZstdCompressor().compress(content))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "flipped":
        packed[len(packed) // 2] ^= 0xFF
    else:
        packed = bytearray(b"this is plain text\n")
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(packed)
    with pytest.raises(DataError, match="is damaged") as caught:
        list(text_files.lines(str(path)))
    assert f"text.{suffix}" in str(caught.value)
    assert "fetch or compress it again" in str(caught.value)


def test_a_zstd_checksum_is_checked(tmp_path):
    packed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(CONTENT * 100))
    packed[-1] ^= 1
    (tmp_path / "text.zst").write_bytes(packed)
    with pytest.raises(DataError, match="is damaged"):
        list(text_files.lines(str(tmp_path / "text.zst")))


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    for read in (text_files.file_hash, lambda name: list(text_files.lines(name))):
        with pytest.raises(DataError, match="cannot be read: Is a directory"):
            read(str(tmp_path))
        with pytest.raises(DataError, match="cannot be read: No such file"):
            read(str(tmp_path / "nowhere"))
