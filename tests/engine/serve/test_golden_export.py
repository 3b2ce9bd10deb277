"""Exported folders are byte for byte what they were when `tests.engine.serve.golden` wrote their hashes."""

from __future__ import annotations

import json

import pytest

from engine.serve.export import export
from engine.serve.source import open_trained
from tests.engine.serve.golden import ALL, HASHES, hashes, save_run


@pytest.mark.parametrize("form", ALL)
def test_every_form_is_written_as_before(form, tmp_path):
    exported = export(open_trained(save_run(tmp_path, form)), tmp_path / "out")
    assert hashes(exported.folder) == json.loads(HASHES.read_text(encoding="utf-8"))[form]
