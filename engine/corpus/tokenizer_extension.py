"""Extension of a tokenizer for a new domain: further tokens behind all that are there.

Invariant: the id of no token moves, and what ends, pads or structures a text stays the same token. Tokens come from a
list, or from text (`pair_merging`), and enter the model itself (`growing_vocabulary`), not the list of added tokens:
these would be cut out of the middle of other words, and byte-level models decode them wrongly. Of a SentencePiece
tokenizer its conversion, `tokenizer.json`, is extended; `tokenizer.model` is left behind.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.corpus.growing_vocabulary import GrowingVocabulary, not_extensible
from engine.corpus.pair_merging import PairMerger, Word
from engine.corpus.tokenizer_folder import written_whole
from engine.data.tokenizer.files import MODEL_FILE, TokenizerFiles, read_files
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.data.tokenizer.plain_text import BYTE_PIECE, model_type
from engine.data.tokenizer.portable import portable_settings, write_settings
from engine.errors import ConfigError, DataError

Texts = Callable[[], Iterable[str]]
"""Function that gives the texts of the new domain, anew at each call."""
_BATCH = 256
_SHOWN = 3
_BLANKS = ("▁", "Ġ")
"""Beginnings of tokens that stand for a blank: no new token reaches over one."""
_KEPT = ("chat_template.jinja",)
_LEFT_BEHIND = ("tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Usage:
    """Tokens that some texts take."""

    num_bytes: int
    num_tokens: int
    unspelt_bytes: int

    @property
    def tokens_per_byte(self) -> float:
        return self.num_tokens / max(1, self.num_bytes)


@dataclass(frozen=True)
class Extended:
    """Summary of an extension."""

    tokenizer: TextTokenizer
    first_id: int
    """First new id: the size of the vocabulary before."""
    num_given: int
    """Number of tokens of the list that were not there yet."""
    num_parts: int
    """Number of tokens that BPE needs on its way to those of the list."""
    num_learnt: int
    usage: tuple[Usage, Usage] | None
    """Before and after, on the texts; None without texts."""
    left_behind: tuple[str, ...]
    """Files of the source that know no new token, and are not written."""


def extend_tokenizer(
    source: Path, folder: Path, tokens: Sequence[str] = (), texts: Texts | None = None, num_learnt: int = 0
) -> Extended:
    """Write the tokenizer of a folder with further tokens: those of a list, then `num_learnt` learnt from texts.

    Texts may carry fewer than asked for; without `num_learnt` they are measured alone.

    Raises:
        ConfigError: a token of the list is several words to the tokenizer, or would never come out of text.
        DataError: the tokenizer cannot be read or extended, or the folder cannot be written.
    """
    files, before = read_files(source), load_tokenizer(source)
    growing = GrowingVocabulary(files)
    given = list(dict.fromkeys(token for token in tokens if token.strip()))
    own = list(dict.fromkeys(spelt for token in given if (spelt := _spelt(before, growing, token)) not in growing.ids))
    for spelt in own:
        growing.add_spelt(spelt, before.plain.model)
    num_parts = len(growing.ids.keys() - before.model.get_vocab().keys()) - len(own)
    learnt, usage = 0, None
    with written_whole(folder, replaced=_LEFT_BEHIND) as inner:
        if texts is not None:
            first = _measured(before, texts())
            if num_learnt:
                _write(files, growing, inner)
                learnt = _learn(files, growing, load_tokenizer(inner), texts(), num_learnt)
        _write(files, growing, inner)
        after = load_tokenizer(inner)
        _check(before, after, growing, given)
        if texts is not None:
            usage = first, _measured(after, texts())
    left = tuple(name for name in _LEFT_BEHIND if (source / name).is_file())
    return Extended(load_tokenizer(folder), before.vocab_size, len(own), num_parts, learnt, usage, left)


def _write(files: TokenizerFiles, growing: GrowingVocabulary, folder: Path) -> None:
    text = json.dumps(growing.tree, ensure_ascii=False, indent=2)
    (folder / MODEL_FILE).write_text(text, encoding="utf-8")
    write_settings(folder, portable_settings(TokenizerFiles(folder, growing.tree, files.settings, files.names)))
    for name in _KEPT:
        if (files.folder / name).is_file():
            shutil.copyfile(files.folder / name, folder / name)


def _spelt(tokenizer: TextTokenizer, growing: GrowingVocabulary, token: str) -> str:
    """Return a token of the list as the model spells it. Raises `ConfigError` where it sees several words, or none."""
    model = tokenizer.plain
    # a piece inside of words is named as the vocabulary has it: ##ology
    inside = growing.kind == "WordPiece" and token.startswith(growing.prefix)
    text = token.removeprefix(growing.prefix) if inside else token
    if model.normalizer is not None:
        text = model.normalizer.normalize_str(text)
    words = [text] if model.pre_tokenizer is None else [word for word, _ in model.pre_tokenizer.pre_tokenize_str(text)]
    if len(words) != 1 or not words[0]:
        told = " + ".join(map(repr, words)) or "nothing"
        raise ConfigError(
            f"the token {token!r}: the tokenizer in {tokenizer.folder} splits text before its model sees it, here into "
            f"{told}",
            "tokens that it leaves in one piece",
            "list the parts as tokens of their own",
        )
    return growing.prefix + words[0] if inside else words[0] + growing.suffix


def _learn(
    files: TokenizerFiles, growing: GrowingVocabulary, tokenizer: TextTokenizer, texts: Iterable[str], num_wanted: int
) -> int:
    """Add tokens that frequent neighbours make; return their number."""
    if growing.kind == "WordLevel":
        raise not_extensible(files, "a WordLevel model knows whole words alone and joins none")
    words = words_of(tokenizer, texts)
    total = sum(len(word) * count for word, count in words.items())
    old = frozenset(growing.ids)

    def join(left: str, right: str) -> str | None:
        # a token that is there and did not come out is one that the model does not take here
        return None if (joined := growing.joined(left, right)) in old else joined

    merger = PairMerger(words, join)
    made: dict[str, float] = {}
    joins = []
    for one in merger.joins():
        made.setdefault(one.joined, growing.score(one, total, made))
        joins.append(one)
        if (len(made) if growing.kind == "BPE" else merger.num_in_use) >= num_wanted:
            break
    # BPE needs each token on the way to another; of other models those stay that later joins have not used up.
    kept = [one for one in joins if growing.kind == "BPE" or merger.occurrences[one.joined] > 0]
    for one in kept:
        growing.add_join(one, made[one.joined])
    return len({one.joined for one in kept})


def words_of(tokenizer: TextTokenizer, texts: Iterable[str]) -> Counter[Word]:
    """Count the words of some texts, each as the tokens that it takes; tokens that must not be joined end a word."""
    names: dict[Any, str] = {number: name for name, number in tokenizer.plain.get_vocab(with_added_tokens=True).items()}
    whole = tokenizer.special_ids | {tokenizer.unknown_id}
    whole |= {number for number, name in names.items() if BYTE_PIECE.fullmatch(name)}
    whole |= set(tokenizer.plain.get_added_tokens_decoder())
    found: Counter[Word] = Counter()
    for batch in _batches(texts):
        for ids, words in tokenizer.encode_with_words(batch):
            word: list[str] = []
            for number, is_new in zip(ids.tolist(), (np.diff(words, prepend=-2) != 0).tolist(), strict=True):
                if is_new or number in whole or names[number].startswith(_BLANKS):
                    found[tuple(word)] += 1
                    word = []
                if number not in whole:
                    word.append(names[number])
            found[tuple(word)] += 1
    return Counter({word: count for word, count in found.items() if len(word) > 1})


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    left = iter(texts)
    while batch := list(itertools.islice(left, _BATCH)):
        yield batch


def _measured(tokenizer: TextTokenizer, texts: Iterable[str]) -> Usage:
    num_bytes = num_tokens = unspelt = 0
    for batch in _batches(texts):
        ids = tokenizer.encode(batch)
        num_bytes += sum(len(text.encode()) for text in batch)
        num_tokens += sum(each.size for each in ids)
        unspelt += int(tokenizer.unspelt_bytes(batch, ids).sum())
    return Usage(num_bytes, num_tokens, unspelt)


def _check(before: TextTokenizer, after: TextTokenizer, growing: GrowingVocabulary, given: list[str]) -> None:
    """Compare the extended tokenizer with the old one.

    Raises:
        ConfigError: a token of the list never comes out of text.
        DataError: `tokenizers` reads it otherwise than it was written.
    """
    old, new = before.model.get_vocab(), after.model.get_vocab()
    same = before.eos_id == after.eos_id and before.unknown_id == after.unknown_id
    if not same or before.special_ids != after.special_ids or any(new.get(name) != n for name, n in old.items()):
        raise DataError(
            f"the tokenizer in {before.folder} cannot be extended: its tokens would get other ids",
            "a tokenizer that `tokenizers` reads as its file says",
            "please report it with its tokenizer.json",
        )
    inside = growing.prefix if model_type(growing.tree) == "WordPiece" else ""
    whole = [token for token in given if not (inside and token.startswith(inside))]
    lost = [token for token, ids in zip(whole, after.encode(whole), strict=True) if ids.size != 1]
    if lost:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise ConfigError(
            f"tokens that would never come out of text: {', '.join(map(repr, lost[:_SHOWN]))}{more}",
            "tokens that the model can reach from its own",
            "leave them out, or let tokens be learnt from text (name sources)",
        )
