"""First characters and first tokens of sentences.

The rules are those of `sentencex` (Wikimedia's, abbreviations of some 300 languages; Chinese, Japanese and other
full stops end a sentence in every language). Invariant: sentences cover their document, and finding them changes no
token of it.
"""

from __future__ import annotations

import re

import numpy as np

from engine.errors import ConfigError

LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*")


def check_language(language: str) -> None:
    """Raise `ConfigError` for what is no language code; unknown languages fall back to the nearest known rules."""
    if not LANGUAGE.fullmatch(language):
        raise ConfigError(f"sentences in language {language!r}", "a code such as en or zh", "name the main language")


def sentence_starts(text: str, language: str) -> np.ndarray:
    """Return the characters at which the sentences of a text begin, int64, rising from 0; no sentence is blank."""
    from sentencex import get_sentence_boundaries  # pyright: ignore[reportAttributeAccessIssue]  # compiled, untyped

    starts = [item["start_index"] for item in get_sentence_boundaries(language, text) if item["text"].strip()]
    return np.array([0, *starts[1:]], np.int64)  # blanks before the first sentence are its own


def sentences_in_tokens(starts: np.ndarray, token_starts: np.ndarray) -> np.ndarray:
    """Return the first token of each sentence, int64, rising from 0.

    `starts` are the sentences' characters, `token_starts` (n,) the characters at which the tokens begin. A token
    across a boundary belongs to the earlier sentence; a sentence without a token of its own is none.
    """
    # sentences from characters 0 and 6, tokens from 0, 3, 5 and 8: first tokens 0 and 3; the one at 5 crosses over
    firsts = np.unique(np.searchsorted(token_starts, starts))
    return np.concatenate([[0], firsts[(firsts > 0) & (firsts < token_starts.size)]])
