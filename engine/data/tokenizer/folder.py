"""A tokenizer as a folder that `transformers.AutoTokenizer` loads, named by a hash of what it does.

Invariant: the hash depends on the vocabulary and the rules in `tokenizer.json` and on which token ends a text,
not on paths, formatting or the truncation and padding that somebody left switched on; so a copy has the same hash.
Encoding here never reads special tokens out of text: a document that spells `<|endoftext|>` is only quoting it.
Training one is in `engine.data.tokenizer.training`. Needs `tokenizers` alone, so that workers start fast.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.tokenizer.vocabulary import FILL_TOKENS, SENTINEL, Spelling, Vocabulary, packed, word_edges
from engine.errors import DataError
from engine.foreign import refuse_custom_code

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODEL_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"
"""What ends a document in the tokenizers trained here; a foreign one may call it otherwise."""

_ROLES = {"padding": "pad", "classify": "cls", "separate": "sep", "mask": "mask"}
_PASSING_STATE = ("truncation", "padding")
_RESTORE = "restore it from a copy"
_CONVERT = "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) writes such a folder"


@dataclass(frozen=True)
class TextTokenizer:
    """A loaded tokenizer: text to ids and back, end-of-text and unknown tokens known by id."""

    folder: Path
    model: Tokenizer
    hash: str
    vocab_size: int
    """Largest id + 1."""
    eos_id: int
    unknown_id: int | None
    """None where every byte can be spelt."""
    find_vocabulary: Callable[[], Vocabulary]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What objectives must know of the tokens. Looks at each of them once: not a matter of every worker."""
        return self.find_vocabulary()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, int64, nothing added and special tokens in the text taken as plain characters."""
        encodings = self.model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def encode_with_starts(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each text the ids, as `encode` gives them, and the character at which each token begins, int64."""
        encodings = self.model.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(item.ids, np.int64), np.array([start for start, _ in item.offsets], np.int64))
            for item in encodings
        ]

    def decode(self, ids: np.ndarray) -> str:
        """The text of some ids, special tokens spelt out."""
        return self.model.decode(ids.tolist(), skip_special_tokens=False)


def load_tokenizer(folder: Path | str) -> TextTokenizer:
    """The tokenizer in a folder.

    Raises:
        DataError: a file is missing or damaged, or the end-of-text token is not told or not in the vocabulary.
        ConfigError: the folder wants code of its own to run.
    """
    from tokenizers import Tokenizer

    folder = Path(folder)
    refuse_custom_code(folder)  # none would run here, but readers of what is trained with it would ask for it
    text, config = _read(folder / MODEL_FILE), _read(folder / CONFIG_FILE)
    tree, settings = _parse(folder / MODEL_FILE, text), _parse(folder / CONFIG_FILE, config)
    try:
        model = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"{folder / MODEL_FILE} is damaged: {error}", "a tokenizer of `tokenizers`", _CONVERT
        ) from error
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    vocabulary = model.get_vocab(with_added_tokens=True)
    eos = _end_of_text(folder, settings, vocabulary)
    unknown = tree.get("model", {}).get("unk_token") or _name(settings.get("unk_token"))
    unknown_id = vocabulary.get(unknown) if unknown and unknown != eos else None
    return TextTokenizer(
        folder=folder,
        model=model,
        hash=_hash(tree, eos),
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=vocabulary[eos],
        unknown_id=unknown_id,
        find_vocabulary=partial(_vocabulary, tree, settings, vocabulary, {vocabulary[eos], unknown_id}),
    )


def tokenizer_hash(folder: Path | str) -> str:
    """Content hash of a tokenizer's folder, 32 hex digits; equal for copies. Raises `DataError`."""
    folder = Path(folder)
    tree = _parse(folder / MODEL_FILE, _read(folder / MODEL_FILE))
    settings = _parse(folder / CONFIG_FILE, _read(folder / CONFIG_FILE))
    return _hash(tree, _ending(settings))


def _hash(tree: dict[str, Any], eos: str | None) -> str:
    content = {key: value for key, value in tree.items() if key not in _PASSING_STATE}
    text = json.dumps([content, eos], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _vocabulary(
    tree: dict[str, Any], settings: dict[str, Any], ids: dict[str, int], others: set[int | None]
) -> Vocabulary:
    """What objectives must know; `others` are tokens that are not ordinary though no rule says so."""
    named = {role: ids.get(_name(settings.get(f"{key}_token")) or "") for role, key in _ROLES.items()}
    numbers = {int(found[1]): ids[token] for token in ids if (found := SENTINEL.fullmatch(token))}
    sentinels = tuple(numbers[number] for number in sorted(numbers))
    fill = tuple(ids[token] for token in FILL_TOKENS if token in ids)
    added = {int(token["id"]) for token in tree.get("added_tokens", []) if token.get("special")}
    special = added | others | set(named.values()) | set(sentinels) | set(fill)
    spelling, size = _spelling(tree), max(ids.values()) + 1
    ordinary_V, begins_V, ends_V = np.zeros(size, bool), np.ones(size, bool), np.ones(size, bool)
    for token, number in ids.items():
        if number not in special:
            ordinary_V[number] = True
            begins_V[number], ends_V[number] = word_edges(token, spelling)
    return Vocabulary(
        **named,
        sentinels=sentinels,
        fill=fill if len(fill) == len(FILL_TOKENS) else (),
        size=size,
        ordinary=packed(ordinary_V),
        begins_word=packed(begins_V),
        ends_word=packed(ends_V),
    )


def _spelling(tree: dict[str, Any]) -> Spelling:
    """How the vocabulary spells the begin of a word."""
    if tree["model"].get("type") == "WordPiece":
        return "wordpiece"
    return "bytes" if '"ByteLevel"' in json.dumps([tree.get("pre_tokenizer"), tree.get("decoder")]) else "sentencepiece"


def _ending(settings: dict[str, Any]) -> str | None:
    """The token that ends a text; BERT's tokenizers name but a separator."""
    return _name(settings.get("eos_token")) or _name(settings.get("sep_token"))


def _end_of_text(folder: Path, settings: dict[str, Any], vocabulary: dict[str, int]) -> str:
    """The token that ends a document. Raises `DataError` where there is none."""
    eos = _ending(settings)
    if eos is None or eos not in vocabulary:
        what = (
            "names neither eos_token nor sep_token"
            if eos is None
            else f"names eos_token {eos!r}, which is not in the vocabulary"
        )
        raise DataError(
            f"{folder / CONFIG_FILE} {what}",
            "a token of the vocabulary that ends a document",
            f"write eos_token in {CONFIG_FILE}, or train a tokenizer with `palimpsest tokenizer`",
        )
    return eos


def _name(token: Any) -> str | None:
    """A token's text; older files write tokens as trees."""
    return token.get("content") if isinstance(token, dict) else token


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        what = f"tokenizer {path.parent} holds no {path.name}" if path.parent.is_dir() else f"no folder {path.parent}"
        raise DataError(what, f"a folder with {MODEL_FILE} and {CONFIG_FILE}", f"check the path; {_CONVERT}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "a text file", _RESTORE) from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is damaged: no JSON ({error})", "the file as written", _RESTORE) from error
    if not isinstance(tree, dict):
        raise DataError(f"{path} is damaged: it begins with {text[:20]!r}", "a JSON object", _RESTORE)
    return tree
