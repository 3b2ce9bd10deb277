"""Releases of DeepSpeed that a message names are those that are installed."""

import tomllib

from engine.parallel.zero.optimizers import DEEPSPEED
from tests.readme import REPOSITORY


def test_the_message_names_the_releases_of_pyproject():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert DEEPSPEED in project["dependencies"]
