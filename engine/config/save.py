"""The resolved configuration of a run, as YAML in its folder."""

from __future__ import annotations

import io
from pathlib import Path

from ruamel.yaml import YAML

from engine.atomic import write_atomically
from engine.config.schema.run import RunConfig
from engine.redact import redacted

FILE = "config.yaml"
"""Its name in a run folder."""


def save_run(config: RunConfig, folder: Path) -> None:
    """Put the configuration in the run folder, over any that is there; call on one rank. Raises `OSError`."""
    # Block style in the schema's order, for people read this file; credentials in URLs are taken out.
    text, yaml = io.StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(redacted(config.model_dump(mode="json", exclude_none=True)), text)
    write_atomically(folder / FILE, text.getvalue())
