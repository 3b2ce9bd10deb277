"""Changes to a `tokenizer.json`: text never becomes a special token, or characters that are lost become visible.

`encode_special_tokens` of `tokenizers` covers only tokens that are marked special and cut out of the text before the
model sees it. The model itself may still know their spelling: Unigram has `</s>` among its pieces, WordLevel looks up
whole words, BPE may have merges that end in it. So the spelling of these tokens is replaced, everywhere the model could
find it, by a random name that no text contains. Ids and all other pieces stay, and so do the ids of all other text.

A tree is a parsed `tokenizer.json`; trees are never changed in place.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Set
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Encoding

Tree = dict[str, Any]

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_BEFORE_BYTE_NAME = "<(?=0x[0-9A-F]{2}>)"
"""Matches the first character of text that spells a byte piece; a split there keeps the piece from being found."""


def model_type(tree: Tree) -> str:
    """Return "BPE", "Unigram", "WordLevel" or "WordPiece"; old files do not name it."""
    model = tree["model"]
    if named := model.get("type"):
        return named
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def unknown_token(tree: Tree) -> str | None:
    """Return the token that the model writes for what it cannot spell; None if it has none."""
    model = tree["model"]
    if model_type(tree) == "Unigram":
        number = model.get("unk_id")
        return None if number is None else model["vocab"][number][0]
    return model.get("unk_token") or None


def model_pieces(tree: Tree) -> dict[str, int]:
    """Return the ids of the model's own pieces, without those of added tokens."""
    vocabulary = tree["model"]["vocab"]
    if model_type(tree) == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return vocabulary


def without_spelling(tree: Tree, ids: Set[int]) -> Tree:
    """Return the tree with the spelling of these ids, and that of byte pieces, made unreachable for text.

    It is the same tree where nothing has to change.
    """
    # random at every load, so that no text can hold it; it exists in memory alone, and no hash sees it
    nonce = secrets.token_hex(16)
    renamed = {piece: f"{nonce}-{number}" for piece, number in model_pieces(tree).items() if number in ids}
    added = [
        token | {"content": renamed.get(token["content"], token["content"]), "special": True}
        if token["id"] in ids
        else token
        for token in tree.get("added_tokens") or []
    ]
    if renamed or added != (tree.get("added_tokens") or []):
        tree = tree | {"model": _renamed_model(tree, renamed), "added_tokens": added}
    return _with_bytes_guarded(tree)


def _renamed_model(tree: Tree, renamed: dict[str, str]) -> Tree:
    model = dict(tree["model"])
    if model_type(tree) == "Unigram":
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
        return model
    model["vocab"] = {renamed.get(piece, piece): number for piece, number in model["vocab"].items()}
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if renamed and model_type(tree) == "BPE":
        # a merge that leads to or from a hidden piece would spell it again
        model["merges"] = [merge for merge in model["merges"] if not renamed.keys() & set(_parts(model, merge))]
    return model


def _parts(model: Tree, merge: str | list[str]) -> tuple[str, str, str]:
    """Return both sides of a merge and its result."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    prefix = model.get("continuing_subword_prefix") or ""
    return left, right, left + right.removeprefix(prefix)


def _with_bytes_guarded(tree: Tree) -> Tree:
    """Return the tree with text such as `<0x41>` split, where the model would take it for the byte piece.

    Byte pieces cannot be renamed, since the model finds them by their names.
    """
    if not _finds_bytes(tree):
        return tree
    split = {"type": "Split", "pattern": {"Regex": _BEFORE_BYTE_NAME}, "behavior": "Isolated", "invert": False}
    before = tree.get("pre_tokenizer")
    steps = [before, split] if before else [split]
    return tree | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def _finds_bytes(tree: Tree) -> bool:
    model = tree["model"]
    if not model.get("byte_fallback"):
        return False
    if model_type(tree) != "Unigram":
        return bool(model.get("ignore_merges"))  # otherwise only merges lead to pieces, and none to these
    # Unigram takes the likeliest split: one byte piece against the six characters of its name
    scores = dict(model["vocab"])
    of_bytes = max((score for piece, score in scores.items() if BYTE_PIECE.fullmatch(piece)), default=-math.inf)
    single = {letter: scores.get(letter, -math.inf) for letter in "<0x>123456789ABCDEF"}
    digit = min(score for letter, score in single.items() if letter not in "<x>")  # the least likely one
    # characters in pieces of their own are likelier in the tokenizers that are trained here
    return of_bytes > single["<"] + single["0"] + single["x"] + 2 * digit + single[">"]


def loses_text(tree: Tree) -> bool:
    """Return True if the model drops what it cannot spell: BPE with neither an unknown token nor every byte."""
    model = tree["model"]
    if model_type(tree) != "BPE" or unknown_token(tree) is not None:
        return False
    pieces, suffix = model["vocab"], model.get("end_of_word_suffix") or ""
    prefix = model.get("continuing_subword_prefix") or ""
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in pieces for byte in range(256)):
        return False
    if not _is_byte_level(tree):
        return True
    # a letter may stand at the begin, inside or at the end of a word, or be all of it: each form is a piece of its own
    forms = [(first, last) for first in {"", prefix} for last in {"", suffix}]
    return not all(first + letter + last in pieces for letter in _letters() for first, last in forms)


def with_unknown(tree: Tree) -> tuple[Tree, str]:
    """Return the tree with an unknown token that shows what the model would drop, and that token's name."""
    name = secrets.token_hex(16)
    model = dict(tree["model"])
    model["vocab"] = model["vocab"] | {name: max(model["vocab"].values(), default=-1) + 1}
    # not fused: each lost character has offsets of its own, which `bytes_of` reads
    return tree | {"model": model | {"unk_token": name, "fuse_unk": False}}, name


def is_letter(tree: Tree, token: str) -> bool:
    """Return True if text that holds this single character would be lost if the token were hidden (BPE alone)."""
    model = tree["model"]
    return (
        model_type(tree) == "BPE"
        and len(token) == 1
        and token in model["vocab"]
        and unknown_token(tree) in (None, token)
        and not model.get("byte_fallback")
        and (not _is_byte_level(tree) or token in _letters())
    )


def _is_byte_level(tree: Tree) -> bool:
    return '"ByteLevel"' in json.dumps([tree.get("normalizer"), tree.get("pre_tokenizer")])


def _letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def bytes_of(text: str, encoding: Encoding, token: int | None) -> int:
    """Count the UTF-8 bytes of the characters behind one token, each character once."""
    offsets = encoding.offsets
    indices = [index for index, number in enumerate(encoding.ids) if number == token]
    inside = {number for index in indices for number in range(*offsets[index])}
    return len("".join(text[number] for number in inside).encode())
