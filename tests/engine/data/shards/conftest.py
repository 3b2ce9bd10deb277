"""Fixtures of tests that read shards from a store."""

from pathlib import Path

import fsspec
import pytest

from tests.engine.data.corpus import made_up_documents, write_shards
from tests.engine.data.shards.stores import SHARD_TOKENS, Store


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, made_up_documents(150), shard_tokens=SHARD_TOKENS)
    return folder


@pytest.fixture
def store(local, monkeypatch) -> Store:
    found = Store(local)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (found, "bucket"))
    return found
