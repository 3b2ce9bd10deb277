"""What a store answers that has no shard for us: missing, busy, refused or redirected, each told apart."""

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from engine.data.shards.cache import ShardCache
from engine.data.shards.damage import DamagedShard
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.remote import RemoteFolder, Retry
from engine.errors import DataError
from tests.engine.data.shards.stores import Quiet


class Answers(Quiet):
    """Answers a path that has `shard-000000` in it as it is told, others with the folder's files."""

    status, body, left = 404, b"", 10**6
    """What to answer; how many times."""

    def do_GET(self) -> None:
        if "shard-000000" not in self.path or type(self).left <= 0:
            return super().do_GET()
        type(self).left -= 1
        if self.status == 0:
            self.close_connection = True  # without a word
            return None
        self.send_response(self.status)
        self.send_header("Location", self.path)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.body)
        return None

    do_HEAD = do_GET


@contextmanager
def answering(folder: Path, status: int, body: bytes = b"", left: int = 10**6) -> Iterator[str]:
    kind = type("AnswersNow", (Answers,), {"status": status, "body": body, "left": left})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def opened(url: str, local: Path, folder: Path, attempts: int = 2) -> bytes:
    """The first shard's tokens."""
    pauses: list[float] = []
    far = RemoteFolder(url, ShardCache(folder, 10**6), Retry(attempts, 0.5, pauses.append))
    name, file = far.open(TokenDataset(local).index.shards[0].tokens)
    file.close()
    return (folder / name).read_bytes()


@pytest.mark.parametrize("status", [0, 302, 401, 403, 429, 500, 502, 503, 504])
def test_over_http_a_store_that_is_busy_refuses_or_redirects_is_no_missing_shard(local, tmp_path, status):
    with answering(local, status) as url, pytest.raises(DataError, match="cannot be fetched, 2 attempts") as caught:
        opened(url, local, tmp_path)
    assert not isinstance(caught.value, DamagedShard)
    assert status < 400 or str(status) in caught.value.wrong
    assert ("credentials and their rights" in caught.value.remedy) == (status in (401, 403))
    with answering(local, status, left=2) as url:  # a HEAD and a GET: of one attempt
        assert opened(url, local, tmp_path) == (local / "shard-000000.tokens").read_bytes()


def test_over_http_nobody_there_is_no_missing_shard_and_404_and_410_are(local, tmp_path):
    with answering(local, 404) as url:
        pass
    with pytest.raises(DataError, match="cannot be fetched, 2 attempts: ClientConnector") as caught:
        opened(url, local, tmp_path)
    assert not isinstance(caught.value, DamagedShard)
    for status in (404, 410):
        with answering(local, status) as url, pytest.raises(DamagedShard, match="is missing"):
            opened(url, local, tmp_path)


S3_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>told by a test</Message></Error>"


@pytest.mark.parametrize(
    ("status", "code", "missing"),
    [
        (403, "AccessDenied", False),
        (403, "ExpiredToken", False),
        (404, "NoSuchBucket", False),
        (500, "InternalError", False),
        (503, "ServiceUnavailable", False),
        (301, "PermanentRedirect", False),
        (307, "TemporaryRedirect", False),
        (404, "NoSuchKey", True),
    ],
)
def test_in_s3_a_shard_is_missing_where_the_store_says_that_there_is_no_such_key(
    local, tmp_path, monkeypatch, status, code, missing
):
    pytest.importorskip("s3fs", reason="needs s3fs (pip install -e '.[s3]')")
    for name, value in (("AWS_MAX_ATTEMPTS", "1"), ("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(name, value)
    kind = type("Everything", (Answers,), {"status": status, "body": S3_ERROR.format(code).encode()})
    monkeypatch.setattr(kind, "path", property(lambda _: "shard-000000", lambda *_: None), raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        fsspec.filesystem("s3").clear_instance_cache()
        try:
            with pytest.raises(DataError) as caught:
                opened("s3://corpus/train", local, tmp_path)
        finally:
            fsspec.filesystem("s3").clear_instance_cache()
            server.shutdown()
            thread.join()
    assert isinstance(caught.value, DamagedShard) == missing, caught.value
    assert missing or "cannot be fetched, 2 attempts" in caught.value.wrong
