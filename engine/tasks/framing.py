"""Texts as the model sees them: split into tokens, with the special tokens that the model has around them.

Text is split as in pretraining (a special token that a text spells stays text), and framed as `AutoTokenizer` frames
a text or a pair with the exported model, so that training and use agree.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from engine.config.schema.model import ModelConfig
from engine.data.objectives.examples import SECOND
from engine.data.tokenizer.files import MODEL_FILE
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.errors import DataError
from engine.serve.tokenizer_files import write_tokenizer
from engine.tasks.dialogues import ChatTemplate, own_template
from engine.tasks.examples import TextExamples, require_marks
from engine.tasks.kind import EncodedRow

_AT_ONCE = 1024


class Framing:
    """Encodes texts and pairs with the special tokens that a model sees around them."""

    def __init__(self, tokenizer: Path, model: ModelConfig) -> None:
        """Read the tokenizer. Raises `DataError` where it cannot be used."""
        self.tokenizer: TextTokenizer = load_tokenizer(tokenizer)
        self.model = model
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(tokenizer, Path(folder), model)
            self._framed = Tokenizer.from_file(str(Path(folder) / MODEL_FILE))
        self._framed.no_padding()
        written = self._framed.to_str() + (own_template(tokenizer) or "")
        self.frame = hashlib.sha256(written.encode()).hexdigest()
        """Hash of the tokenizer, of the special tokens that it puts around a text, and of its chat template."""

    @cached_property
    def chat(self) -> ChatTemplate:
        """Chat template of the tokenizer."""
        return ChatTemplate(self.tokenizer.folder)

    def encodings(self, texts: list[str], pairs: list[str] | None, length: int) -> Iterator[Encoding]:
        """Yield the texts, or pairs of texts, framed and cut to `length` tokens: of a pair the longer text loses its
        end first."""
        self._framed.enable_truncation(length, strategy="longest_first")
        for first in range(0, len(texts), _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            split = self.tokenizer.plain.encode_batch(texts[rows], add_special_tokens=False)
            seconds: list[Any] = [None] * len(split)
            if pairs is not None:
                seconds = self.tokenizer.plain.encode_batch(pairs[rows], add_special_tokens=False)
            for text, pair in zip(split, seconds, strict=True):
                yield self._framed.post_process(text, pair)

    def windows(
        self, questions: list[str], contexts: list[str], length: int, stride: int, location: str
    ) -> Iterator[list[Encoding]]:
        """Yield the windows of each question and its context, framed, of `length` tokens at the most.

        Neighbours share `stride` tokens of the context, but no more than half of those that a window has room for.

        Raises:
            DataError: a question leaves no room for its context, or one of both has no token.
        """
        for first in range(0, len(questions), _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            split = self.tokenizer.plain.encode_batch(questions[rows], add_special_tokens=False)
            texts = self.tokenizer.plain.encode_batch(contexts[rows], add_special_tokens=False)
            for row, (question, context) in enumerate(zip(split, texts, strict=True), start=first + 1):
                room = length - len(question.ids) - self._framed.num_special_tokens_to_add(is_pair=True)
                if room < 2 or not question.ids or not context.ids:
                    raise DataError(
                        f"row {row} of {location} has a question of {len(question.ids)} tokens and a context of "
                        f"{len(context.ids)}, in rows of {length}",
                        "text, and room for two tokens of the context behind the question",
                        "shorten or drop the row, or raise sequence_length",
                    )
                self._framed.enable_truncation(length, stride=min(stride, room // 2), strategy="only_second")
                found = self._framed.post_process(question, context)
                yield [found, *found.overflowing]

    def rows(self, examples: TextExamples, length: int) -> Iterator[EncodedRow]:
        """Yield the rows of texts or pairs; of a pair with the number of tokens before the second text.

        Raises:
            DataError: an example has no token.
        """
        framed = self.encodings(examples.texts, examples.pairs, length)
        for number, found in enumerate(framed, start=1):
            if not found.ids:
                raise DataError(f"row {number} of {examples.location} has no token", "text", "drop the row")
            require_marks(examples, number - 1, found, self.tokenizer.unknown_id)
            # types 0 0 0 1 1: the second text begins at token 3
            types = found.type_ids
            second = types.index(1) if 1 in types else len(types)
            yield EncodedRow(np.array(found.ids, np.int64), {} if examples.pairs is None else {SECOND: second})
