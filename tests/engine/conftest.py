from pathlib import Path

import pytest

from tests.engine.data.corpus import made_up_texts


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 300 tokens."""
    from engine.corpus.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(made_up_texts(100), folder, "bpe", 300)
    return folder
