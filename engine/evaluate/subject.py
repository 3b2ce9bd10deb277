"""A model under evaluation: one of transformers' classes, the tokenizer as our own reader, and the facts that decide
what can be measured.

Runs and folders are both opened as transformers' class (`engine.serve.language_model`), so that a run and its exported
folder have the same numbers. Text is split by `engine.data.tokenizer`: a text that spells a special token is a
quotation of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from engine.checkpoint.interchange.initial import model_of
from engine.config.schema.model import make_model
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.errors import ConfigError
from engine.serve.language_model import open_language_model
from engine.tasks.framing import Framing

Kind = Literal["causal", "masked", "spans", "classes", "tokens", "answers", "other"]
"""Prediction of a model: the next token, masked tokens, spans behind sentinels, a class of a text, a class of each
token, the span that answers a question."""
_HEADS: dict[str, Kind] = {
    "ForMaskedLM": "masked",
    "ForPreTraining": "masked",
    "ForSequenceClassification": "classes",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "answers",
}
TASKS: tuple[Kind, ...] = ("classes", "tokens", "answers")
"""Kinds of models that were fine-tuned on labelled examples."""
_UNLIMITED = 1 << 20
"""Length from which on a tokenizer's `model_max_length` means that there is none."""
_LENGTH_WITHOUT_LIMIT = 512
"""Tokens of a row of a model without a longest one (T5): its own training's."""


@dataclass(frozen=True)
class Subject:
    """A model under evaluation, in fp32 and evaluation mode."""

    model: Any
    tokenizer: Any
    """Tokenizer of transformers, which frames a text as the model was trained."""
    text: TextTokenizer
    """The same tokenizer as our own reader: text alone, nothing framed."""
    kind: Kind
    origin: str
    """Description of the source, for messages."""
    framing: Framing | None = None
    """Encoder of labelled examples; None of a model without a task's head."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row that the model takes, special ones included."""
        known = (getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        limits = [int(limit) for limit in known if limit is not None and limit < _UNLIMITED]
        return min(limits, default=_LENGTH_WITHOUT_LIMIT)

    @property
    def device(self) -> torch.device:
        return self.model.device


def open_subject(source: Path, tokenizer: Path | None = None) -> Subject:
    """Open a run folder, a checkpoint or a Hugging Face folder; on a GPU where there is one.

    Raises:
        ConfigError: it is none of them, or its model has no twin in Hugging Face's library.
        CheckpointError: no checkpoint is whole.
        DataError: the tokenizer cannot be used.
    """
    opened = open_language_model(source, tokenizer)
    kind, framing = _kind(opened.model), None
    with TemporaryDirectory() as folder:
        opened.tokenizer.save_pretrained(folder)
        text = load_tokenizer(folder)
        if kind in TASKS:
            framing = Framing(Path(folder), make_model(**model_of(str(source))))
    model: Any = opened.model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    return Subject(model, opened.tokenizer, text, kind, opened.origin, framing)


def require_kind(subject: Subject, kinds: tuple[Kind, ...], purpose: str, allowed: str) -> None:
    """Raise `ConfigError` where a model predicts something else than `purpose` needs."""
    if subject.kind not in kinds:
        raise ConfigError(
            f"{purpose} with {subject.origin}, a {type(subject.model).__name__}", allowed, "name another model"
        )


def _kind(model: Any) -> Kind:
    name = type(model).__name__
    for ending, kind in _HEADS.items():
        if name.endswith(ending):
            return kind
    if model.can_generate():
        return "spans" if model.config.is_encoder_decoder else "causal"
    return "other"
