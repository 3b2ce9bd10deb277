"""Rules for folders from other sources, for example a model hub: their code never runs.

A Hugging Face folder may name Python files of its own (`auto_map`, `custom_generate/`) or kernels on a hub, which
transformers would download, ask about and execute. Every reader of such a folder calls `refuse_custom_code` first, and
passes `trust_remote_code=False` besides, without which transformers asks on the terminal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

_FILES = ("config.json", "tokenizer_config.json")
_CODE_FOLDER = "custom_generate"


def refuse_custom_code(folder: Path) -> None:
    """Refuse a model's or tokenizer's folder that wants code of its own or of a hub to run.

    Folders that are not there and files that are damaged are left to whoever reads them next.

    Raises:
        ConfigError: a configuration of the folder names such code.
    """
    for name in _FILES:
        settings = _settings(folder / name)
        if named := settings.get("auto_map"):
            raise custom_code(folder, f"{name} names it in auto_map: {_listed(named)}")
        for key, value in settings.items():  # "owner/kernel": transformers downloads and runs it
            # `endswith`, for the key is also spelt with a leading underscore.
            if key.endswith("attn_implementation") and isinstance(value, str) and "/" in value:
                raise custom_code(folder, f"{name} takes its attention from a hub: {key} = {value}")
    if (folder / _CODE_FOLDER).is_dir():
        raise custom_code(folder, f"{_CODE_FOLDER}/ replaces generate()")


def custom_code(source: object, reason: str) -> ConfigError:
    """Return the error for a folder or a name on a hub that wants code of its own to run."""
    return ConfigError(
        f"{source} comes with code of its own, and code of a downloaded folder is never run ({reason})",
        "models and tokenizers of classes that transformers itself has",
        "convert it where you trust that code (load it there and save_pretrained a class of transformers), "
        "or name another one",
    )


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    # RecursionError: JSON that is nested thousands deep.
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _listed(auto_map: Any) -> str:
    if not isinstance(auto_map, dict):
        return str(auto_map)[:100]
    return ", ".join(f"{key} = {value}" for key, value in list(auto_map.items())[:2])
