"""Facts about a tokenizer's tokens that objectives need: special ones by role, ordinary ones, and begins of words.

It travels in the index of the shards, so that training needs no tokenizer. Invariant: what is not ordinary is never
masked, corrupted or drawn.

V vocabulary.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

SENTINEL = re.compile(r"<extra_id_(\d+)>")
"""T5's names (Raffel et al. 2020); number 0 is used first and has the highest id."""
FILL_TOKENS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
"""Tokens with which fill-in-the-middle marks its parts (Bavarian et al. 2022)."""
ROLES = ("padding", "classify", "separate", "mask")

Spelling = Literal["wordpiece", "sentencepiece", "bytes"]
"""Spelling of a token that begins a word: no leading `##`, a leading U+2581, or a leading blank."""

_IDEOGRAPHS = ("CJK UNIFIED", "CJK COMPAT", "HIRAGANA", "KATAKANA")
_BITS = ("ordinary", "begins_word", "ends_word")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """Token ids by role, None or empty where the tokenizer has no such token."""

    padding: int | None
    classify: int | None
    """[CLS]"""
    separate: int | None
    """[SEP]"""
    mask: int | None
    """[MASK]"""
    sentinels: tuple[int, ...]
    """In the order of their use."""
    fill: tuple[int, ...]
    """Marks of prefix, middle and suffix, in this order."""
    size: int
    ordinary: bytes
    """Bits: tokens of text; neither special, nor unknown, nor an id that names nothing."""
    begins_word: bytes
    """Bits: tokens that begin a word, whatever stands before."""
    ends_word: bytes
    """Bits: tokens behind which a word begins, whatever follows."""

    @cached_property
    def ordinary_V(self) -> np.ndarray:
        return _unpacked(self.ordinary, self.size)

    @cached_property
    def begins_word_V(self) -> np.ndarray:
        return _unpacked(self.begins_word, self.size)

    @cached_property
    def ends_word_V(self) -> np.ndarray:
        return _unpacked(self.ends_word, self.size)

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """Ordinary tokens, int64, rising."""
        return np.flatnonzero(self.ordinary_V)

    def to_json(self) -> dict[str, Any]:
        roles = {role: getattr(self, role) for role in ROLES}
        lists = {"sentinels": list(self.sentinels), "fill": list(self.fill)}
        return roles | lists | {name: base64.b64encode(getattr(self, name)).decode() for name in _BITS}

    @classmethod
    def from_json(cls, tree: dict[str, Any], size: int) -> Vocabulary:
        """Return what `to_json` wrote, of so many tokens. Raises `KeyError`, `TypeError` or `ValueError`."""
        roles = {role: None if tree[role] is None else int(tree[role]) for role in ROLES}
        sentinels, fill = tuple(map(int, tree["sentinels"])), tuple(map(int, tree["fill"]))
        ids = [number for number in (*roles.values(), *sentinels, *fill) if number is not None]
        if ids and not 0 <= min(ids) <= max(ids) < size:
            raise ValueError(f"vocabulary names tokens {min(ids)} to {max(ids)} of {size}")
        bits = {name: base64.b64decode(tree[name], validate=True) for name in _BITS}
        if lengths := {len(content) for content in bits.values()} - {-(-size // 8)}:
            raise ValueError(f"vocabulary has bits of {8 * lengths.pop()} tokens, not {size}")
        ordinary, begins, ends = (bits[name] for name in _BITS)
        return cls(
            **roles, sentinels=sentinels, fill=fill, size=size, ordinary=ordinary, begins_word=begins, ends_word=ends
        )


def packed(bits_V: np.ndarray) -> bytes:
    """Return the flags packed, eight to a byte."""
    return np.packbits(bits_V).tobytes()


def _unpacked(content: bytes, size: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(content, np.uint8), count=size).astype(bool)


def word_edges(token: str, spelling: Spelling) -> tuple[bool, bool]:
    """Return (begins, ends): a word begins with the token whatever stands before it; one begins after it.

    WordPiece says so itself. Elsewhere a word goes on only between letters, digits and marks of scripts that put
    blanks between words: punctuation, ideographs and emoji are words by themselves, as WordPiece's splitter has it. A
    blank alone belongs to what follows it.
    """
    if not token:
        return True, True
    if spelling == "wordpiece":
        return not token.startswith("##"), False
    if spelling == "sentencepiece":
        # a byte piece begins a character unless it is a continuation byte, 0b10xxxxxx
        if byte := _BYTE.fullmatch(token):
            return int(byte[1], 16) & 0xC0 != 0x80, False
        return not _is_wordlike(token[:1]), token != "▁" and not _is_wordlike(token[-1:])
    # added tokens are spelt as text, whose characters may stand for no byte: taken as blanks, which separate words
    content = bytes(_BYTES.get(character, 0x20) for character in token)
    return _begins(content), content != b" " and _ends(content)


def _begins(content: bytes) -> bool:
    """Return True if the first character of UTF-8, which may be cut at both ends, is no letter.

    Part of a character of two bytes counts as a letter.
    """
    width = _width(content[0])
    # scripts of two-byte characters (Latin, Greek, Cyrillic, Arabic) put blanks between words
    if width == 0 or (width == 2 and len(content) < 2):
        return False
    return not _is_wordlike(content[:width].decode(errors="replace")[:1])


def _ends(content: bytes) -> bool:
    # the last byte that begins a character; a character that is cut off at the end counts as a letter
    start = max((at for at in range(len(content)) if _width(content[at])), default=None)
    if start is None or _width(content[start]) != len(content) - start:
        return False
    return not _is_wordlike(content[start:].decode(errors="replace")[:1])


def _width(byte: int) -> int:
    """Return the number of bytes of the UTF-8 character that a byte begins; 0 for a continuation byte."""
    return 1 if byte < 0x80 else 0 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4


def _is_wordlike(character: str) -> bool:
    """Return True for letters, digits and marks, except for those of scripts without blanks between words."""
    wordlike = bool(character) and unicodedata.category(character)[0] in "LNM"
    return wordlike and not unicodedata.name(character, "").startswith(_IDEOGRAPHS)


def _characters_of_bytes() -> dict[str, int]:
    """Return the byte behind each printable character of byte-level BPE (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # blanks and control bytes are written as characters from 256 on: 0x20, the 33rd of them, as U+0120
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _characters_of_bytes()
