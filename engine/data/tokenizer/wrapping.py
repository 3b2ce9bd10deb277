"""A tokenizer as an object of transformers that splits text as `tokenizer.json` says.

`AutoTokenizer` takes vocabulary and merges from the file, but for many classes (GPT2, Qwen2, GPTNeoX, CodeGen, Roberta,
Bert, ...) puts the class's own regex, normaliser or added tokens around them. The object made here is of the general
class, which keeps everything, and adds no token.
"""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.tokenizer import plain_text
from engine.data.tokenizer.files import MODEL_FILE, TokenizerFiles, build

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

KEPT_SETTINGS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "model_input_names",
    "clean_up_tokenization_spaces",
    "chat_template",
)
"""Further keys that users of a tokenizer rely on; none of them splits text."""


def wrap(
    model: Tokenizer, names: dict[str, str], listed: Set[str], settings: dict[str, Any]
) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer; `names` are special tokens by role, `listed` those without one, as far as `model` has them."""
    from transformers import PreTrainedTokenizerFast

    known = model.get_vocab(with_added_tokens=True)
    kept = {key: settings[key] for key in KEPT_SETTINGS if settings.get(key) is not None}
    # transformers would add an unknown token with a new id, for which the trained model has no embedding
    roles = {role: token for role, token in names.items() if token in known}
    extra = sorted(token for token in listed if token in known)
    return PreTrainedTokenizerFast(tokenizer_object=model, extra_special_tokens=extra, **kept, **roles)


def wrap_files(files: TokenizerFiles) -> PreTrainedTokenizerFast:
    """Wrap the tokenizer of a folder. Raises `DataError` where `tokenizer.json` is damaged."""
    return wrap(build(files.tree, files.folder / MODEL_FILE), files.names, files.listed, files.settings)


def unspelt_bytes(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Count the UTF-8 bytes of a text that are unknown to a tokenizer, or dropped by it."""
    model = tokenizer.backend_tokenizer
    tree = json.loads(model.to_str())
    name = plain_text.unknown_token(tree)
    # this copy writes a token for each character that the model would drop, so that they can be counted
    if plain_text.loses_text(tree):
        tree, name = plain_text.with_unknown(tree)
        model = build(tree, Path(tokenizer.name_or_path))
    unknown = None if name is None else model.token_to_id(name)
    return plain_text.bytes_of(text, model.encode(text, add_special_tokens=False), unknown)
