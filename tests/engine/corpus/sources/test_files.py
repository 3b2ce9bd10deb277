"""Which files a name stands for, and how each is read: nothing is taken for a document that is none."""

import bz2
import errno
import gzip
import io
import json
import lzma
import resource
import tarfile

import pytest
import zstandard

from engine.corpus.sources import text_files
from engine.corpus.sources.chunks import told_foreign
from engine.corpus.sources.files import find_files
from engine.errors import DataError

ROWS = b"".join(json.dumps({"text": f"row {n}"}).encode() + b"\n" for n in range(3))


def kinds(path):
    return [(found.name, kind) for found, kind, _ in find_files(str(path), str(path))]


def tar(content):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def test_json_lines_without_a_suffix_are_known_by_their_first_line(tmp_path):
    (tmp_path / "part-00000").write_bytes(ROWS)
    (tmp_path / "part-00001.gz").write_bytes(gzip.compress(ROWS))
    (tmp_path / "part-00002.zst").write_bytes(zstandard.ZstdCompressor().compress(b"\n" + ROWS))
    (tmp_path / "part-00003").write_bytes(b'{"text": "' + b"x" * (2 << 20) + b'"}\n')
    (tmp_path / "LICENSE").write_bytes(b"plain text")
    (tmp_path / "CONFIG").write_bytes(b'{\n "a": 1\n}\n')
    assert [kind for _, kind in kinds(tmp_path / "part-*")] == ["json"] * 4
    assert [kind for _, kind in kinds(tmp_path / "[CL]*")] == ["text"] * 2


def test_every_compression_is_read_and_a_cut_file_is_damaged(tmp_path):
    content = b"".join(b"line %d\n" % number for number in range(5000))
    for suffix, compress in ((".bz2", bz2.compress), (".xz", lzma.compress)):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(content[:9]) + compress(content[9:]))
        assert next(text_files.whole(str(path)))[1] == content
        assert kinds(path) == [(path.name, "text")]
        whole = compress(content)
        for damaged in (whole[: len(whole) // 2], b"this is plain text"):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="is damaged"):
                list(text_files.lines(str(path)))


def test_a_long_window_of_zstd_is_read(tmp_path):
    """As `zstd --long=28` writes it; the library's own limit is a window of 2**27 bytes."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = packer.compress(b"text\n" * 1000) + packer.flush()
    assert zstandard.get_frame_parameters(packed).window_size == 1 << 28
    (tmp_path / "a.zst").write_bytes(packed)
    assert next(text_files.whole(str(tmp_path / "a.zst")))[1] == b"text\n" * 1000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.lz4", b"\x04\x22\x4d\x18", r"packed in a way that is not read here \(\.lz4\)"),
        ("a.tar.gz", gzip.compress(tar(b"text"), mtime=0), r"packed in a way that is not read here \(\.gz\)"),
        ("a.tgz", gzip.compress(tar(b"text"), mtime=0), r"packed in a way that is not read here \(\.tgz\)"),
        ("a.gz", gzip.compress(tar(b"text"), mtime=0), r"packed in a way that is not read here \(\.tar\)"),
        ("a.zip", b"PK\x03\x04", r"packed in a way that is not read here \(\.zip\)"),
        ("part-0", b"\x04\x22\x4d\x18", "is an lz4 file"),
        ("part-0", gzip.compress(ROWS, mtime=0), r"(?s)is a gzip file.*call it part-0\.gz"),
        ("a.txt", zstandard.ZstdCompressor().compress(ROWS), r"(?s)is a zstd file.*call it a\.txt\.zst"),
        ("part-0", b"PAR1xxxxPAR1", r"(?s)is a Parquet file.*call it part-0\.parquet"),
        ("data", b"ARROW1\0\0", "is an Arrow file"),
    ],
)
def test_what_is_no_text_is_no_document(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        find_files(str(tmp_path / name), name)
    assert name in str(caught.value)
    assert "to do: " in str(caught.value)


def test_packed_text_in_a_folder_is_not_left_out_in_silence(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl.lz4").write_bytes(b"\x04\x22\x4d\x18")
    with pytest.raises(DataError, match=r"b\.jsonl\.lz4 is packed in a way that is not read here"):
        find_files(str(tmp_path), "folder")


def test_links_to_folders_are_followed_once(tmp_path):
    """A link to a folder elsewhere, one back to the top, and two to one place."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "b.txt").write_text("b")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "link").symlink_to(elsewhere)
    (folder / "second").symlink_to(elsewhere)
    (folder / "top").symlink_to(folder)
    found = [str(path.relative_to(folder)) for path, _, _ in find_files(str(folder), "folder")]
    assert found == ["a.txt", "link/deep/b.txt"]


def test_a_link_to_nothing_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("gone")
    for name in (tmp_path, tmp_path / "b.txt"):
        with pytest.raises(DataError, match=r"(?s)b\.txt.*link to gone, which is not there"):
            find_files(str(name), str(name))


def test_too_many_open_files_are_not_blamed_on_rights(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")

    def refuse(*arguments, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    monkeypatch.setattr(text_files.Path, "open", refuse)
    for read in (text_files.file_hash, lambda name: find_files(name, name)):
        with pytest.raises(DataError, match=rf"too many open files: {soft:,} are allowed \(ulimit -n\)") as caught:
            read(str(tmp_path / "a.txt"))
        assert "rights" not in str(caught.value)


def test_files_of_foreign_names_in_a_folder_are_told(tmp_path):
    """With their number and the first names; not hidden ones, and none where files are named themselves."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "b.log", "c", "d.html", "deep/e.xml", ".hidden"):
        (folder / name).write_text('{"text": "a"}\n')
    told = told_foreign([f"en={folder}"])
    assert told is not None
    assert told.startswith("not read: 4 files in folders")
    assert f"{folder / 'b.log'}, {folder / 'c'}, {folder / 'd.html'} and 1 more" in told
    assert told_foreign([f"en={folder}/*.log", f"en={folder}/a.jsonl", "hf:somewhere"]) is None
