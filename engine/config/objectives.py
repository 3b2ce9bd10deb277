"""The objectives: the families that they train, the keys that they use, and the lengths of their rows. Pure.

`OBJECTIVES` is the table; whatever differs between objectives outside of `engine.data.objectives` stands in its
entries. To add one: its name and its keys in `engine.config.schema.objective`, an entry here, a sampler
`engine/data/objectives/NAME.py`, and tests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from engine.config.schema.data import Attention
from engine.config.schema.model import FamilyName
from engine.config.schema.objective import ObjectiveConfig, ObjectiveName
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.stage import RunStage

REPLAYED = "replay_"
"""Beginning of the names of the inputs that the head over the vocabulary gets beside those of a task's head."""


class RowLengths(NamedTuple):
    """Numbers of tokens in a row of a run stage."""

    tokens: int
    """Tokens that the model (where there is a decoder, the encoder) sees."""
    predicted: int
    """Tokens that the head computes the loss of over the vocabulary; 0 for the head of a task, which has few labels."""
    decoder: int = 0
    """Tokens that the decoder sees; 0 where there is none."""

    def shared_by(self, ranks: int) -> RowLengths:
        """Return the lengths on one of `ranks` ranks that share the sequence dimension of a row."""
        return RowLengths(*(length // ranks for length in self))

    def filled(self, ranks: int) -> RowLengths:
        """Return the lengths with the decoder's rounded up to a multiple of `ranks`: no key sets it, and it follows
        from the others, so nobody could choose one that divides."""
        if self.decoder == 0:
            return self
        decoder = -(-self.decoder // ranks) * ranks
        return self._replace(predicted=decoder, decoder=decoder)


class SpanLengths(NamedTuple):
    """Numbers of tokens in a row of span corruption."""

    read: int
    """Tokens of text, before spans become sentinels."""
    encoder: int
    """Length that the encoder's row is padded to."""
    decoder: int
    """Length that the decoder's row is padded to."""


def num_masked(num_tokens: int, rate: float) -> int:
    """Return the number of masked tokens of a row: the share rounded, at least one (Devlin et al. 2019, their code)."""
    return max(1, round(num_tokens * rate))


def noise(num_tokens: int, rate: float, mean_span_length: float) -> tuple[int, int]:
    """Return (tokens, spans) of noise among 2 tokens or more, with at least as many tokens outside of spans as spans.

    Raffel et al. 2020, "Exploring the Limits of Transfer Learning", reference code (`random_spans_noise_mask`), but
    that there are never more spans than tokens between them.
    """
    tokens = min(max(round(num_tokens * rate), 1), num_tokens - 1)
    spans = max(round(tokens / mean_span_length), 1)
    return tokens, min(spans, num_tokens - tokens)


def span_lengths(sequence_length: int, rate: float, mean_span_length: float) -> SpanLengths:
    """Return how many tokens fit an encoder of `sequence_length` (3 or more) once their spans are sentinels.

    Sentinels and the end of the text count. One token more adds one or none, so the encoder is always filled
    (`compute_input_and_target_lengths` of the same reference code). With rate 0.15 and spans of 3 an encoder of 512
    holds 568 tokens of text: 85 of them are noise in 28 spans, 568 - 85 + 28 + 1 = 512, and the decoder has 114.
    """
    beyond = 3
    # The encoder's length never falls as the text grows, so doubling brackets the answer and a bisection finds it.
    while _corrupted(beyond, rate, mean_span_length)[0] <= sequence_length:
        beyond *= 2
    too_long: Callable[[int], bool] = lambda read: _corrupted(read, rate, mean_span_length)[0] > sequence_length  # noqa: E731
    read = bisect_left(range(beyond + 1), True, lo=3, key=too_long) - 1
    return SpanLengths(read, *_corrupted(read, rate, mean_span_length))


def _corrupted(num_tokens: int, rate: float, mean_span_length: float) -> tuple[int, int]:
    tokens, spans = noise(num_tokens, rate, mean_span_length)
    # Encoder: text outside of spans, a sentinel per span, the end. Decoder: noise, a sentinel before each, the end.
    return num_tokens - tokens + spans + 1, tokens + spans + 1


def _causal_lengths(length: int, objective: ObjectiveConfig) -> RowLengths:
    del objective
    return RowLengths(length, length)


def _masked_lengths(length: int, objective: ObjectiveConfig) -> RowLengths:
    return RowLengths(length, num_masked(length, objective.rate))


def _span_lengths(length: int, objective: ObjectiveConfig) -> RowLengths:
    decoder = span_lengths(length, objective.rate, objective.mean_span_length).decoder
    return RowLengths(length, decoder, decoder)


def _example_lengths(length: int, objective: ObjectiveConfig) -> RowLengths:
    del objective
    return RowLengths(length, 0)  # the head of a task has no logits over the vocabulary


def _answer_lengths(length: int, objective: ObjectiveConfig) -> RowLengths:
    decoder = objective.answer_length
    return RowLengths(length, decoder or length, decoder)


@dataclass(frozen=True)
class Objective:
    """One objective: its family, its keys, and the lengths of its rows."""

    families: tuple[FamilyName, ...]
    """Families of models that it trains."""
    keys: tuple[str, ...]
    """Keys of `stages.N.objective` that it uses, beside `name`."""
    lengths: Callable[[int, ObjectiveConfig], RowLengths]
    """Lengths of a row, as a function of the stage's `sequence_length`."""
    shortest: int = 1
    """Smallest `sequence_length`, with room for special tokens."""
    packs_documents: bool = False
    """Whole documents may be packed into rows (`data.packing: best_fit`)."""
    sees_padding: bool = False
    """Tokens see what stands behind them, so rows need segments that tell padding apart."""
    special_tokens: bool = True
    """The tokenizer needs special tokens beside the end of the text."""
    module: str | None = None
    """Module of `engine.data.objectives` that makes its rows. None means that it is called as the objective."""
    is_task: bool = False
    """It learns from examples that `palimpsest finetune` encodes."""
    has_head: bool = False
    """The model has a head of the same name (`model.task_head`) in place of the one over the vocabulary."""
    measures: tuple[str, ...] = ()
    """Names of the measures of its predictions that are single numbers, the main one first; a task alone has some."""


def _task(keys: tuple[str, ...], measures: tuple[str, ...]) -> Objective:
    families: tuple[FamilyName, ...] = ("bert", "gpt")
    return Objective(
        families,
        keys,
        _example_lengths,
        sees_padding=True,
        special_tokens=False,
        module="examples",
        is_task=True,
        has_head=True,
        measures=measures,
    )


OBJECTIVES: Mapping[ObjectiveName, Objective] = {
    "causal": Objective(("gpt",), (), _causal_lengths, packs_documents=True, special_tokens=False),
    "fill_in_the_middle": Objective(("gpt",), ("fill_rate", "suffix_first_share"), _causal_lengths),
    "masked": Objective(
        ("bert",),
        ("pairs", "rate", "mask_unit", "mask_share", "random_share"),
        _masked_lengths,
        shortest=3,
        packs_documents=True,
        sees_padding=True,
    ),
    "span_corruption": Objective(("t5",), ("rate", "mean_span_length"), _span_lengths, shortest=3, sees_padding=True),
    "classification": _task(("labels", "label_smoothing"), ("accuracy", "f1_micro", "f1_macro", "matthews")),
    "regression": _task((), ("mean_squared_error", "pearson", "spearman")),
    "token_classification": _task(("labels", "label_smoothing"), ("f1", "precision", "recall", "accuracy")),
    "question_answering": _task(
        ("stride", "no_answer", "cut_answers", "longest_answer", "label_smoothing"), ("f1", "exact_match")
    ),
    "answer": Objective(
        ("gpt", "t5"),
        ("answer_length", "label_smoothing"),
        _answer_lengths,
        shortest=2,
        packs_documents=True,
        sees_padding=True,
        special_tokens=False,
        is_task=True,
    ),
}
"""Every objective by its name."""


PRETRAINING: Mapping[FamilyName, ObjectiveName] = {"bert": "masked", "gpt": "causal", "t5": "span_corruption"}
"""The objective that each family is pretrained with, unless a run says otherwise."""


def row_lengths(stage: RunStage) -> RowLengths:
    """Return the lengths of a stage's rows; replayed text beside a task may have more to predict than the task."""
    length, replayed = stage.sequence_length, stage.replayed_objective
    own = OBJECTIVES[stage.objective.name].lengths(length, stage.objective)
    if replayed is None:
        return own
    return own._replace(predicted=max(own.predicted, OBJECTIVES[replayed.name].lengths(length, replayed).predicted))


def held_lengths(stage: RunStage, parallel: ParallelConfig) -> RowLengths:
    """Return the lengths of a stage's rows as a layout holds them: a decoder's filled up to a multiple of
    `sequence_ranks`."""
    return row_lengths(stage).filled(parallel.sequence_ranks)


def has_segments(attention: Attention, objective: ObjectiveConfig) -> bool:
    """Return True if rows carry segments: documents must not see each other, or padding could be seen."""
    return attention == "document" or OBJECTIVES[objective.name].sees_padding
