"""Writes a resolved configuration as YAML, in one move."""

from __future__ import annotations

import os
from pathlib import Path

from ruamel.yaml import YAML

from engine.config.schema.run import RunConfig
from engine.redact import redacted

FILE = "config.yaml"
"""Its name in a run folder."""


def save_run(config: RunConfig, folder: Path) -> None:
    """Puts the configuration in the run folder, over any that is there; call on one rank."""
    partial = folder / f"{FILE}.{os.getpid()}"
    with partial.open("w", encoding="utf-8") as file:
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump(redacted(config.model_dump(mode="json", exclude_none=True)), file)
    partial.replace(folder / FILE)
