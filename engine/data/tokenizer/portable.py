"""`tokenizer_config.json` as every supported reader of the Hugging Face ecosystem understands it.

transformers 5 writes the class `TokenizersBackend` and a list under `extra_special_tokens`; versions before it know
neither and load no such tokenizer. Classes of single models (GPT-2's, BERT's, ...) rebuild the tokenizer from parts of
`tokenizer.json` and from their own defaults. The class `PreTrainedTokenizerFast` takes `tokenizer.json` as it is in all
versions, so it is the one that is written here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.data.tokenizer.files import CONFIG_FILE, TokenizerFiles, read_files

CLASS = "PreTrainedTokenizerFast"
_KEPT = ("model_max_length", "model_input_names", "padding_side", "truncation_side", "chat_template")
"""Further keys that are kept; all others are arguments of classes that rebuild the tokenizer."""
_NO_LIMIT = 10**9
"""transformers writes 10**30 as the longest length where there is none."""


def portable_settings(files: TokenizerFiles) -> dict[str, Any]:
    """Return what `tokenizer_config.json` says for the files of any version.

    A role whose token the vocabulary has not is left out: readers would add a token that the model has no row for.
    """
    added = {token["content"]: bool(token.get("special")) for token in files.tree.get("added_tokens", [])}
    known = added.keys() | _vocabulary(files.tree.get("model", {}).get("vocab", {}))
    roles = {role: token for role, token in files.names.items() if token in known}
    others = [token for token, special in added.items() if special and token not in roles.values()]
    found: dict[str, Any] = {"tokenizer_class": CLASS, **roles}
    if others:
        found["additional_special_tokens"] = others
    found |= {key: files.settings[key] for key in _KEPT if files.settings.get(key) is not None}
    if found.get("model_max_length", 0) > _NO_LIMIT:
        del found["model_max_length"]
    return found | {"clean_up_tokenization_spaces": bool(files.settings.get("clean_up_tokenization_spaces", False))}


def make_portable(folder: Path) -> None:
    """Rewrite the settings of a tokenizer that transformers saved into a folder. Raises `OSError` or `DataError`."""
    write_settings(folder, portable_settings(read_files(folder)))


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write `tokenizer_config.json`. Raises `OSError`."""
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def _vocabulary(vocab: Any) -> set[str]:
    """Return the tokens of a model, which stores them as the keys of a tree or, with scores, as a list of pairs."""
    return {str(entry[0]) for entry in vocab} if isinstance(vocab, list) else set(vocab)
