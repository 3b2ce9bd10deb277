"""The tokenizer in an exported folder: `AutoTokenizer` without any option fits the model.

A text is framed as the rows of training were: nothing around it for decoders, the end token behind it for the encoder
of T5, [CLS] and [SEP] for encoders. Texts are cut at the model's positions, and token types are made only for models
that have them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from engine.config.schema.model import ModelConfig
from engine.data.tokenizer.files import MODEL_FILE, read_files
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.data.tokenizer.portable import portable_settings, write_settings

SIDE_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Further files of a tokenizer, for readers that do not take `tokenizer.json`."""
_PASSING_STATE = ("truncation", "padding")
_ADDING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
"""Post-processors that put special tokens around a text."""


def write_tokenizer(source: Path, folder: Path, model: ModelConfig) -> None:
    """Write the tokenizer of a folder into another one, for a model.

    Raises:
        DataError: the tokenizer cannot be read.
        OSError: the folder cannot be written.
    """
    tokenizer = load_tokenizer(source)
    files = read_files(source)
    framed = _framed(files.tree, tokenizer, model)
    if framed == files.tree:
        shutil.copyfile(source / MODEL_FILE, folder / MODEL_FILE)
    else:
        (folder / MODEL_FILE).write_text(json.dumps(framed, ensure_ascii=False, indent=2), encoding="utf-8")
    write_settings(folder, portable_settings(files) | _of_model(tokenizer, model))
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _of_model(tokenizer: TextTokenizer, model: ModelConfig) -> dict[str, Any]:
    """Return settings that depend on the model."""
    types = ["token_type_ids"] if model.tells_segments_apart else []
    found: dict[str, Any] = {
        "model_max_length": model.longest_row,
        "model_input_names": ["input_ids", *types, "attention_mask"],
    }
    if tokenizer.vocabulary.padding is None and model.family == "t5":
        found["pad_token"] = tokenizer.model.id_to_token(tokenizer.eos_id)  # as span corruption pads
    return found


def _framed(tree: dict[str, Any], tokenizer: TextTokenizer, model: ModelConfig) -> dict[str, Any]:
    """Return a `tokenizer.json` that frames texts as training did; unchanged where it does so already."""
    # Both set to null: they are left over from whoever called the tokenizer last, and are not a part of it.
    tree = tree | dict.fromkeys(set(_PASSING_STATE) & tree.keys())
    # Tried out, not read from the tree: the types of post-processors nest, and more than one adds tokens.
    encoded = tokenizer.model.encode("a", add_special_tokens=True)
    frame = [number for number, is_added in zip(encoded.ids, encoded.special_tokens_mask, strict=True) if is_added]
    if model.family == "gpt":
        return tree if not frame else tree | {"post_processor": _without_frame(tree["post_processor"])}
    if model.family == "t5":
        ends = frame == [tokenizer.eos_id] == encoded.ids[-1:]
        return tree if ends else tree | {"post_processor": _template(tokenizer, [], ["end"])}
    known = tokenizer.vocabulary
    if frame or known.classify is None or known.separate is None:
        return tree
    return tree | {"post_processor": _template(tokenizer, ["classify"], ["separate"], model.tells_segments_apart)}


def _without_frame(post_processor: dict[str, Any]) -> dict[str, Any] | None:
    """Return the post-processor without what adds tokens; None where nothing is left."""
    parts = post_processor["processors"] if post_processor["type"] == "Sequence" else [post_processor]
    kept = [part for part in parts if part["type"] not in _ADDING]
    return {"type": "Sequence", "processors": kept} if kept else None


def _template(tokenizer: TextTokenizer, head: list[str], tail: list[str], has_types: bool = False) -> dict[str, Any]:
    """Return a post-processor that puts tokens, named by their role, before and behind a text.

    Of a pair, `tail` is behind both texts.
    """
    known = tokenizer.vocabulary
    ids = {"end": tokenizer.eos_id, "classify": known.classify, "separate": known.separate}
    text = {role: tokenizer.model.id_to_token(ids[role]) for role in (*head, *tail)}

    def special(roles: list[str], kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": text[role], "type_id": kind}} for role in roles]

    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        return [{"Sequence": {"id": name, "type_id": kind}}]

    single = [*special(head, 0), *sequence("A", 0), *special(tail, 0)]
    # BERT: type 1 for the second text of a pair; models without token types have 0 alone
    second = int(has_types)
    tokens = {token: {"id": token, "ids": [ids[role]], "tokens": [token]} for role, token in text.items()}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *sequence("B", second), *special(tail, second)],
        "special_tokens": tokens,
    }
