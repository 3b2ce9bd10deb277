"""Configurations as YAML files: the resolved one of a run in its folder, and any tree."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from engine.atomic import write_atomically
from engine.config.schema.run import RunConfig
from engine.redact import redacted

FILE = "config.yaml"
"""Its name in a run folder."""


def save_run(config: RunConfig, folder: Path) -> None:
    """Put the configuration in the run folder, over any that is there; call on one rank. Raises `OSError`."""
    # credentials in URLs are taken out
    save_tree(redacted(config.model_dump(mode="json", exclude_none=True)), folder / FILE)


def save_tree(tree: dict[str, Any], path: Path) -> None:
    """Write the tree of a configuration as a file that `load_run` reads. Raises `OSError`."""
    # Block style in the tree's own order, for people read these files.
    text, yaml = io.StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(tree, text)
    write_atomically(path, text.getvalue())
