"""The files of a tokenizer's folder: `tokenizer.json` says how text is split, the others name the special tokens.

Every part of the program reads a folder through `read_files`, and takes the splitting from `tokenizer.json` alone. The
class in `tokenizer_config.json` counts for nothing: transformers rebuilds some classes by rules of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODEL_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
NAMES_FILE = "special_tokens_map.json"
"""File in which older folders name their special tokens."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTED_TOKENS = ("additional_special_tokens", "extra_special_tokens")

IMPORT = "`palimpsest tokenizer --import NAME_OR_FOLDER --output FOLDER` writes such a folder"
_RESTORE = "restore it from a copy"


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer's folder, parsed."""

    folder: Path
    tree: dict[str, Any]
    """`tokenizer.json`"""
    settings: dict[str, Any]
    """`tokenizer_config.json`"""
    names: dict[str, str]
    """Special tokens by role (`NAMED_TOKENS`), as far as they are named."""

    @property
    def ending(self) -> str | None:
        """The token that ends a text; BERT's tokenizers name only a separator."""
        own = (name_of(self.settings.get("eos_token")), name_of(self.settings.get("sep_token")))
        return own[0] or own[1] or self.names.get("eos_token") or self.names.get("sep_token")

    @property
    def listed(self) -> set[str]:
        """Special tokens without a role."""
        lists = [self.settings.get(key) or [] for key in LISTED_TOKENS]
        tokens = [token for item in lists for token in (item.values() if isinstance(item, dict) else item)]
        return {name for token in tokens if (name := name_of(token))}


def read_files(folder: Path | str, needs_settings: bool = True) -> TokenizerFiles:
    """Read a tokenizer's folder; without `needs_settings`, it may lack `tokenizer_config.json`.

    Raises:
        DataError: a file is missing or damaged.
    """
    folder = Path(folder)
    tree = _parse(folder / MODEL_FILE)
    settings = _parse(folder / CONFIG_FILE) if needs_settings or (folder / CONFIG_FILE).is_file() else {}
    older = _parse(folder / NAMES_FILE) if (folder / NAMES_FILE).is_file() else {}
    found = {role: name_of(settings.get(role)) or name_of(older.get(role)) for role in NAMED_TOKENS}
    return TokenizerFiles(folder, tree, settings, {role: name for role, name in found.items() if name})


def build(tree: dict[str, Any], path: Path) -> Tokenizer:
    """Build the tokenizer that a tree describes. Raises `DataError` where it describes none; `path` names it."""
    from tokenizers import Tokenizer

    try:
        model = Tokenizer.from_str(json.dumps(tree))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is damaged: {error}", "a tokenizer of `tokenizers`", IMPORT) from error
    # either may be left switched on in the file, and would cut documents, or pad them
    model.no_truncation()
    model.no_padding()
    return model


def name_of(token: Any) -> str | None:
    """Return a token's text; older files write tokens as trees."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _parse(path: Path) -> dict[str, Any]:
    text = _read(path)
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is damaged: no JSON ({error})", "the file as written", _RESTORE) from error
    if not isinstance(tree, dict):
        raise DataError(f"{path} is damaged: it begins with {text[:20]!r}", "a JSON object", _RESTORE)
    return tree


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        what = f"tokenizer {path.parent} holds no {path.name}" if path.parent.is_dir() else f"no folder {path.parent}"
        raise DataError(what, f"a folder with {MODEL_FILE} and {CONFIG_FILE}", f"check the path; {IMPORT}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "a text file", _RESTORE) from error
