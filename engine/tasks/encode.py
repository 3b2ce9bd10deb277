"""Examples as token shards: what the model sees of each, its label beside it.

Text is split as in pretraining (a special token that a text spells stays text), and framed as `AutoTokenizer` frames
a text or a pair with the exported model, so that training and use agree. A folder is named by a hash of all that its
content follows from: it is written once, whole, and found again by the next start.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engine.config.schema.model import ModelConfig
from engine.data.objectives.examples import LABEL, SECOND
from engine.data.shards.index import FILE
from engine.data.shards.writer import ShardWriter
from engine.data.tokenizer.files import MODEL_FILE
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.errors import ConfigError, DataError
from engine.serve.new_folder import new_folder
from engine.serve.tokenizer_files import write_tokenizer
from engine.tasks.examples import Examples

VERSION = 1
"""Raised when examples are encoded otherwise."""
_AT_ONCE = 1024


@dataclass(frozen=True)
class Encoded:
    """An example as the model sees it: its ids, and how many of them come before the second text."""

    ids: np.ndarray
    second: int


class Framing:
    """Encodes texts and pairs with the special tokens that a model sees around them."""

    def __init__(self, tokenizer: Path, model: ModelConfig) -> None:
        """Read the tokenizer. Raises `DataError` where it cannot be used."""
        self.tokenizer: TextTokenizer = load_tokenizer(tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(tokenizer, Path(folder), model)
            self._framed = Tokenizer.from_file(str(Path(folder) / MODEL_FILE))
        self._framed.no_padding()
        self.frame = hashlib.sha256(self._framed.to_str().encode()).hexdigest()
        """Hash of the tokenizer and of the special tokens that it puts around a text."""

    def encode(self, examples: Examples, length: int) -> Iterator[Encoded]:
        """Yield the examples, cut to `length` tokens: of a pair the longer text loses its end first.

        Raises:
            DataError: an example has no token.
        """
        self._framed.enable_truncation(length, strategy="longest_first")
        for first in range(0, len(examples), _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            texts = self.tokenizer.plain.encode_batch(examples.texts[rows], add_special_tokens=False)
            pairs = [None] * len(texts)
            if examples.pairs is not None:
                pairs = self.tokenizer.plain.encode_batch(examples.pairs[rows], add_special_tokens=False)
            for number, (text, pair) in enumerate(zip(texts, pairs, strict=True), start=first + 1):
                found = self._framed.post_process(text, pair)
                if not found.ids:
                    raise DataError(f"row {number} of {examples.location} has no token", "text", "drop the row")
                # types 0 0 0 1 1: the second text begins at token 3
                types = found.type_ids
                yield Encoded(np.array(found.ids, np.int64), types.index(1) if 1 in types else len(types))

    def longest(self, examples: Examples, most: int) -> int:
        """Return the number of tokens of the longest example, `most` at the most."""
        return max(encoded.ids.size for encoded in self.encode(examples, most))


def encoded_folder(
    examples: Examples, labels: list[int] | list[float], framing: Framing, length: int, folder: Path, part: str
) -> Path:
    """Return the folder of the encoded examples in `folder`, written if it is not there.

    Raises:
        DataError: an example has no token, or the disk is full.
    """
    facts = {
        "version": VERSION,
        "frame": framing.frame,
        "length": length,
        "labels": labels,
        "examples": {key: value for key, value in asdict(examples).items() if key != "location"},
    }
    name = f"{part}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"
    output = folder / name
    if (output / FILE).is_file():
        return output
    tokenizer = framing.tokenizer
    try:
        with new_folder(output) as partial:
            shape = (partial, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.hash)
            with ShardWriter(*shape, vocabulary=tokenizer.vocabulary) as writer:
                for encoded, label in zip(framing.encode(examples, length), labels, strict=True):
                    columns: dict[str, Any] = {LABEL: label}
                    if examples.pairs is not None:
                        columns[SECOND] = encoded.second
                    writer.add(encoded.ids, columns=columns)
    except ConfigError:
        if not (output / FILE).is_file():  # else another process was first, with the same content
            raise
    return output
