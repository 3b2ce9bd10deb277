"""Variants of training examples: synonyms, deletions, and whatever a command of the user's makes (back-translation).

After Wei and Zou 2019 (arXiv 1901.11196, EDA), whose other two operators, swaps and insertions, are not here. A variant
is a function of the text, the seed, the epoch and the number of the example: the n-th variant of an example is the one
of epoch n. Labels are those of the example. Words are runs of letters; in a run without spaces (Chinese) they are the
longest ones that have synonyms, else single characters.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.config.schema.data import AugmentConfig
from engine.errors import ConfigError, DataError
from engine.tasks.examples import TextExamples

PURPOSE = 0xA0C3
"""Keeps this stream of random numbers apart from every other one of the same seed."""
_RUNS = re.compile(r"[\u3400-\u9fff]+|[^\W_]+(?:'[^\W_]+)?|\s+|.", re.DOTALL)
_HAN = re.compile(r"[\u3400-\u9fff]")
Synonyms = Mapping[str, Sequence[str]]


def augmented(examples: TextExamples, config: AugmentConfig, seed: int) -> TextExamples:
    """Return the examples, and behind them `config.copies` variants of all, an epoch's after the other's.

    Raises:
        ConfigError, DataError: the file of synonyms or the command is not what it has to be.
    """
    synonyms = read_synonyms(config.synonyms) if config.synonyms is not None else {}
    texts, pairs, found = examples.texts, examples.pairs, examples
    for epoch in range(1, config.copies + 1):
        made = _varied(texts, synonyms, config, seed, epoch, column=0)
        second = None if pairs is None else _varied(pairs, synonyms, config, seed, epoch, column=1)
        found = replace(
            found,
            texts=found.texts + made,
            pairs=None if found.pairs is None or second is None else found.pairs + second,
            labels=found.labels + examples.labels,
        )
    return found


def _varied(
    texts: list[str], synonyms: Synonyms, config: AugmentConfig, seed: int, epoch: int, column: int
) -> list[str]:
    given = texts if config.command is None else _by_command(config.command, texts, epoch)
    return [variant(text, synonyms, config, (seed, epoch, example, column)) for example, text in enumerate(given)]


def variant(text: str, synonyms: Synonyms, config: AugmentConfig, key: tuple[int, ...]) -> str:
    """Return a text with some words replaced by synonyms and some deleted; `key` is (seed, epoch, example, column).

    One word at least stays.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([PURPOSE, *key])))
    parts = list(_parts(text, synonyms))
    words = [number for number, part in enumerate(parts) if part[0].isalnum()]
    # Drawn for every word, whatever becomes of it, so that one rate does not move the draws of the other.
    replaced, chosen, deleted = generator.random((3, len(words)))
    kept = set(words)
    for number, draw, choice, gone in zip(words, replaced, chosen, deleted, strict=True):
        others = synonyms.get(parts[number].lower(), ())
        if others and draw < config.synonym_rate:
            parts[number] = others[int(choice * len(others))]
        if gone < config.deletion_rate and len(kept) > 1:
            kept.remove(number)
    gone_words = set(words) - kept
    # the blank behind a deleted word goes with it
    left = [
        part
        for number, part in enumerate(parts)
        if number not in gone_words and not (part.isspace() and number - 1 in gone_words)
    ]
    return "".join(left)


def _parts(text: str, synonyms: Synonyms) -> Iterator[str]:
    """Yield words, blanks and other characters, which together are the text."""
    longest = max((len(word) for word in synonyms if _HAN.match(word)), default=1)
    for run in _RUNS.findall(text):
        at = 0
        while _HAN.match(run) and at < len(run):
            size = next((n for n in range(min(longest, len(run) - at), 1, -1) if run[at : at + n] in synonyms), 1)
            yield run[at : at + size]
            at += size
        if not at:
            yield run


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """Return the synonyms of each word of a file: on a line a word and its synonyms, with tabs between them.

    Raises:
        ConfigError: the file cannot be read.
        DataError: a line has no synonym.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.augment.synonyms = {path} cannot be read: {error}", "a text file in UTF-8", "check the path"
        ) from None
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        word, *others = (part.strip() for part in line.split("\t"))
        if not line.strip():
            continue
        if not word or not others or not all(others):
            raise DataError(
                f"line {number} of {path} is {line!r:.60}",
                "a word and its synonyms, with tabs between",
                "mend the line",
            )
        found.setdefault(word.lower(), []).extend(others)
    return found


def _by_command(command: str, texts: list[str], epoch: int) -> list[str]:
    """Return what a command makes of texts: it reads a JSON string a line and writes one for each, in their order."""
    given = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    told = f"data.augment.command = {command!r}"
    try:
        done = subprocess.run(
            [*shlex.split(command), str(epoch)], input=given, capture_output=True, text=True, encoding="utf-8"
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{told} cannot be started: {error}", "a program and its arguments", "check it") from None
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise ConfigError(f"{told} ended with code {done.returncode}: {why}", "code 0", "run it by hand")
    try:
        made = [json.loads(line) for line in done.stdout.splitlines()]
    except ValueError:
        made = []
    if len(made) != len(texts) or not all(isinstance(text, str) and text.strip() for text in made):
        raise DataError(
            f"{told} wrote {len(done.stdout.splitlines())} lines for {len(texts)} texts, or lines that are no text",
            "a JSON string for each line that it reads",
            "run it by hand",
        )
    return made
