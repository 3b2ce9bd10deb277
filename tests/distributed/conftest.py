"""Fixtures of tests with real ranks."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of each family in a folder of its name, written once; do not change them."""
    from tests.distributed.pairs import write_families

    folder = tmp_path_factory.mktemp("corpora")
    write_families(folder)
    return folder
