"""A tokenizer as a folder of `tokenizer.json` and `tokenizer_config.json`, named by a hash of what it does.

This is the only reader: preparation, training, export and generation all split text as `tokenizer.json` says, whatever
class `tokenizer_config.json` names (`files`).
Invariant: the hash depends on the vocabulary and the rules in `tokenizer.json` and on which token ends a text, not on
paths, formatting or the truncation and padding that somebody left switched on; so a copy has the same hash. Encoding
never reads special tokens out of text (`plain_text`): a document that spells `<|endoftext|>` is only quoting it.
Training one is in `engine.corpus.tokenizer_training`. Needs `tokenizers` alone, so that workers start fast.
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

from engine.data.tokenizer import plain_text
from engine.data.tokenizer.files import CONFIG_FILE, IMPORT, MODEL_FILE, TokenizerFiles, build, read_files
from engine.data.tokenizer.vocabulary import FILL_TOKENS, SENTINEL, Spelling, Vocabulary, packed, word_edges
from engine.errors import DataError
from engine.foreign import refuse_custom_code

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

END_OF_TEXT = "<|endoftext|>"
"""Token that ends a document in the tokenizers trained here; a foreign one may call it otherwise."""

_ROLES = {"padding": "pad", "classify": "cls", "separate": "sep", "mask": "mask"}
_PASSING_STATE = ("truncation", "padding")


@dataclass(frozen=True)
class TextTokenizer:
    """A loaded tokenizer: text to ids and back, end-of-text and unknown tokens known by id."""

    folder: Path
    model: Tokenizer
    """Tokenizer as in the file: names of tokens, and ids to text."""
    plain: Tokenizer
    """Text to ids, without special tokens: `model` with their spelling hidden."""
    dropping: tuple[Tokenizer, int] | None
    """For a model that drops what it cannot spell: one that writes a token instead, and the token's id."""
    hash: str
    vocab_size: int
    """Largest id + 1."""
    eos_id: int
    unknown_id: int | None
    """None where every byte can be spelt, or where the end of text stands for what is unknown."""
    find_vocabulary: Callable[[], Vocabulary]
    special_ids: frozenset[int] = frozenset()
    """Tokens that no text may become."""
    longest_word: int | None = None
    """Letters without a blank beyond which WordPiece makes all of them one unknown token."""
    refused_id: int | None = None
    """Special token that the model writes for what it cannot spell; text that needs it is refused."""

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Facts about the tokens that objectives need. Looks at each of them once: not a matter of every worker."""
        return self.find_vocabulary()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, int64, nothing added and special tokens in the text taken as plain characters.

        Raises:
            DataError: the tokenizer cannot spell some of the text, and has no unknown token to say so.
        """
        return [self._checked(encoding) for encoding in self._run(self.plain.encode_batch_fast, texts)]

    def encode_with_starts(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each text the ids, as `encode` gives them, and the character at which each token begins, int64."""
        return [
            (self._checked(item), np.array([start for start, _ in item.offsets], np.int64))
            for item in self._run(self.plain.encode_batch, texts)
        ]

    def encode_with_words(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each text the ids, as `encode` gives them, and the number of each token's word, int64.

        A word is what the model sees at once, between two splits of the text.
        """
        return [
            (self._checked(item), np.array([-1 if word is None else word for word in item.word_ids], np.int64))
            for item in self._run(self.plain.encode_batch, texts)
        ]

    def unspelt_bytes(self, texts: list[str], ids: list[np.ndarray]) -> np.ndarray:
        """Return the UTF-8 bytes of each text that no token spells, (n,) int64: unknown to the model, or dropped by it.

        `ids` are those that `encode` gave. Texts without an unknown token cost nothing, unless the model drops text.
        """
        found = np.zeros(len(texts), np.int64)
        if self.dropping is not None:
            model, unknown, chosen = *self.dropping, list(range(len(texts)))
        else:
            model, unknown = self.plain, self.unknown_id
            chosen = [] if unknown is None else [n for n, item in enumerate(ids) if (item == unknown).any()]
        for number, encoding in zip(chosen, self._run(model.encode_batch, [texts[n] for n in chosen]), strict=True):
            found[number] = plain_text.bytes_of(texts[number], encoding, unknown)
        return found

    @cached_property
    def knows_special_spellings(self) -> bool:
        """True if the model itself would read a special token where text spells one, were it not hidden from it."""
        for number in sorted(self.special_ids - {self.unknown_id}):
            try:
                found = self.model.encode(self.model.id_to_token(number), add_special_tokens=False)
            except Exception:  # the library's, where there is no unknown token
                continue
            if number in found.ids:
                return True
        return False

    @property
    def unknown_becomes(self) -> str:
        """Explanation for messages of what happens to text that cannot be spelt."""
        if self.unknown_id is None or self.dropping is not None:
            return "it is dropped"
        longer = "" if self.longest_word is None else f", and so does any run of more than {self.longest_word} letters"
        return f"it becomes {self.model.id_to_token(self.unknown_id)}{longer}"

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of some ids, special tokens spelt out."""
        return self.model.decode(ids.tolist(), skip_special_tokens=False)

    def _run(self, encode: Callable[..., list[Encoding]], texts: list[str]) -> list[Encoding]:
        try:
            return encode(texts, add_special_tokens=False) if texts else []
        except Exception as error:  # the library raises plain Exception where the unknown token is missing
            raise self._unknown(f"it has no token for what is unknown ({error})") from error

    def _checked(self, encoding: Encoding) -> np.ndarray:
        ids = np.array(encoding.ids, np.int64)
        if self.refused_id is not None and (ids == self.refused_id).any():
            name = self.model.id_to_token(self.refused_id)
            raise self._unknown(f"it would write the special token {name!r} for it")
        return ids

    def _unknown(self, why: str) -> DataError:
        return DataError(
            f"the tokenizer in {self.folder} cannot spell some of the text: {why}",
            "a tokenizer with an unknown token of its own, or one that spells every byte",
            "train one with `palimpsest tokenizer SOURCE...`, or name another",
        )


def load_tokenizer(folder: Path | str) -> TextTokenizer:
    """Return the tokenizer in a folder.

    Raises:
        DataError: a file is missing or damaged, or the end-of-text token is not told or not in the vocabulary.
        ConfigError: the folder wants code of its own to run.
    """
    refuse_custom_code(Path(folder))  # none would run here, but readers of what is trained with it would ask for it
    files = read_files(folder)
    path = files.folder / MODEL_FILE
    model = _plain(build(files.tree, path))
    ids = model.get_vocab(with_added_tokens=True)
    eos = _end_of_text(files, ids)
    own_unknown = plain_text.unknown_token(files.tree)
    unknown = own_unknown or files.names.get("unk_token")
    special = _special_ids(files, ids, {eos, unknown})
    # the same object where nothing has to be hidden; then one tokenizer serves both ways
    hidden = plain_text.without_spelling(files.tree, special)
    refused = ids.get(own_unknown) if own_unknown and ids.get(own_unknown) in _roles(files, ids, eos) else None
    return TextTokenizer(
        folder=files.folder,
        model=model,
        plain=model if hidden is files.tree else _plain(build(hidden, path)),
        dropping=_dropping(hidden, path),
        hash=_hash(files.tree, eos),
        vocab_size=max(ids.values()) + 1,  # not len(ids): ids may have gaps
        eos_id=ids[eos],
        # GPT-2 names its end of text as the unknown token, too; it spells every byte and never writes it
        unknown_id=ids.get(unknown) if unknown and unknown != eos else None,
        find_vocabulary=partial(_vocabulary, files, ids, special),
        special_ids=frozenset(special),
        longest_word=files.tree["model"].get("max_input_chars_per_word"),
        refused_id=refused,
    )


def tokenizer_hash(folder: Path | str) -> str:
    """Return the content hash of a tokenizer's folder, 32 hex digits; equal for copies. Raises `DataError`."""
    files = read_files(folder)
    return _hash(files.tree, files.ending)


def _hash(tree: dict[str, Any], eos: str | None) -> str:
    # keys are sorted below, so that formatting does not count, either
    content = {key: value for key, value in tree.items() if key not in _PASSING_STATE}
    text = json.dumps([content, eos], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(model: Tokenizer) -> Tokenizer:
    """Return the tokenizer, which from now on cuts no special tokens out of the text before the model sees it."""
    model.encode_special_tokens = True
    return model


def _dropping(hidden: dict[str, Any], path: Path) -> tuple[Tokenizer, int] | None:
    if not plain_text.loses_text(hidden):
        return None
    tree, name = plain_text.with_unknown(hidden)
    model = _plain(build(tree, path))
    return model, model.get_vocab()[name]


def _special_ids(files: TokenizerFiles, ids: dict[str, int], others: set[str | None]) -> set[int]:
    """Return the ids that no text may become: marked special, or special by their role (`others` among them).

    Raises `DataError` where one of them is a letter that the model needs to spell text.
    """
    marked = {token["content"] for token in files.tree.get("added_tokens") or [] if token.get("special")}
    by_name = {token for token in ids if SENTINEL.fullmatch(token)} | set(FILL_TOKENS)
    ours = {files.names.get(f"{key}_token") for key in _ROLES.values()}
    needed = marked | by_name | ours | others
    if letters := sorted(token for token in needed & ids.keys() if token and plain_text.is_letter(files.tree, token)):
        raise DataError(
            f"{files.folder} uses {letters[0]!r} as a special token, but its model spells text with it",
            "special tokens that stand for no text",
            f"name others in {CONFIG_FILE}, or train a tokenizer with `palimpsest tokenizer`",
        )
    # tokens that our rows never hold are hidden, too, but not at the cost of text that needs them
    unused = {files.names.get("bos_token")} | files.listed
    hidden = needed | {token for token in unused if token and not plain_text.is_letter(files.tree, token)}
    return {ids[token] for token in hidden if token in ids}


def _roles(files: TokenizerFiles, ids: dict[str, int], eos: str) -> set[int]:
    """Return the ids of tokens that structure a row, which text must not become even where it is unknown."""
    named = {files.names.get(f"{key}_token") for key in ("cls", "sep", "mask")} | {eos}
    return {ids[token] for token in named if token in ids}


def _vocabulary(files: TokenizerFiles, ids: dict[str, int], special: set[int]) -> Vocabulary:
    """Return the facts about the tokens that objectives need."""
    named = {role: ids.get(files.names.get(f"{key}_token", "")) for role, key in _ROLES.items()}
    numbers = {int(found[1]): ids[token] for token in ids if (found := SENTINEL.fullmatch(token))}
    sentinels = tuple(numbers[number] for number in sorted(numbers))
    fill = tuple(ids[token] for token in FILL_TOKENS if token in ids)
    spelling, size = _spelling(files.tree), max(ids.values()) + 1
    # ids that name nothing, and special tokens, are no text, and separate the words beside them
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
    """Return how the vocabulary spells the begin of a word."""
    if plain_text.model_type(tree) == "WordPiece":
        return "wordpiece"
    # in the whole tree, since it may stand alone or anywhere in a Sequence
    return "bytes" if '"ByteLevel"' in json.dumps([tree.get("pre_tokenizer"), tree.get("decoder")]) else "sentencepiece"


def _end_of_text(files: TokenizerFiles, vocabulary: dict[str, int]) -> str:
    """Return the token that ends a document. Raises `DataError` where there is none."""
    eos = files.ending
    if eos is None or eos not in vocabulary:
        what = (
            "names neither eos_token nor sep_token"
            if eos is None
            else f"names eos_token {eos!r}, which is not in the vocabulary"
        )
        raise DataError(
            f"{files.folder / CONFIG_FILE} {what}",
            "a token of the vocabulary that ends a document",
            f"write eos_token in {CONFIG_FILE}; {IMPORT}",
        )
    return eos
