"""Fixtures of tests that prepare text."""

import pytest

from engine.corpus.options import PrepareOptions
from tests.engine.data.corpus import made_up_texts, write_json_lines


@pytest.fixture
def options(tokenizer_folder, tmp_path) -> PrepareOptions:
    source = write_json_lines(tmp_path / "texts.jsonl", made_up_texts(200))
    return PrepareOptions((str(source),), tokenizer_folder, tmp_path / "out", validation_fraction=0.2, shard_bytes=2000)
