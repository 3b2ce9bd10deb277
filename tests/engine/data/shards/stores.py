"""Stores of shards: a folder, memory, a web server, S3, and a file system that fails as it is told to."""

import functools
import http.server
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

from engine.data.shards.cache import ShardCache
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.remote import RemoteFolder, Retry

SHARD_TOKENS = 300


@contextmanager
def on_disk(folder: Path) -> Iterator[str]:
    yield f"file://{folder}"


@contextmanager
def in_memory(folder: Path) -> Iterator[str]:
    system, name = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for path in folder.iterdir():
        system.pipe_file(f"{name}/{path.name}", path.read_bytes())
    yield f"memory:/{name}"
    system.rm(name, recursive=True)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def over_http(folder: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@contextmanager
def in_s3(folder: Path) -> Iterator[str]:
    server_of = pytest.importorskip("moto.server", reason="needs moto (pip install -e '.[dev]')").ThreadedMotoServer
    pytest.importorskip("s3fs", reason="needs s3fs (pip install -e '.[s3]')")
    server = server_of(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket = f"corpus-{uuid.uuid4().hex}"  # moto's buckets outlive its server
        system.mkdir(bucket)
        for path in folder.iterdir():
            system.put_file(str(path), f"{bucket}/train/{path.name}")
        yield f"s3://{bucket}/train"
        fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def small_cache(folder: Path, local: Path, shards: float = 8.0) -> ShardCache:
    """Room for two windows of four shards, of 20 and more."""
    largest = max(sum(array.stored_bytes for array in shard.arrays) for shard in TokenDataset(local).index.shards)
    return ShardCache(folder, int(shards * largest))


class Store:
    """A file system that fails as it is told to; counts what is asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, Counter[str]()
        self.failures: list[Exception | bytes] = []

    def cat_file(self, path: str) -> bytes:
        return (self.folder / Path(path).name).read_bytes()

    def open(self, path: str, mode: str, **options: Any) -> Any:
        self.asked[Path(path).name] += 1
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return fsspec.filesystem("memory").open(self._kept(failure), mode)
        return (self.folder / Path(path).name).open(mode)

    def _kept(self, content: bytes) -> str:
        fsspec.filesystem("memory").pipe_file("/wrong", content)
        return "/wrong"


def remote(cache: ShardCache, pauses: list[float], attempts: int = 4) -> RemoteFolder:
    return RemoteFolder("s3://bucket", cache, Retry(attempts, 0.5, pauses.append))
