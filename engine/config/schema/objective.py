"""The section of a run stage's objective: what it learns to predict."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from engine.config.schema.section import Section

ObjectiveName = Literal[
    "causal",
    "fill_in_the_middle",
    "masked",
    "span_corruption",
    "classification",
    "regression",
    "token_classification",
    "question_answering",
    "answer",
]
"""Names of the objectives; `engine.config.objectives.OBJECTIVES` says what each of them is."""
PairKind = Literal["next_sentence", "sentence_order"]
Pairs = Literal["none", PairKind]
MaskUnit = Literal["token", "word", "span"]


class ObjectiveConfig(Section):
    """The objective of a run stage and its settings. `objective: NAME` alone stands for `objective: {name: NAME}`."""

    name: ObjectiveName = "causal"
    """Name of the objective: the next token (`causal`), or the next token with documents rearranged
    (`fill_in_the_middle`), masked tokens (`masked`), spans of the text (`span_corruption`), or of labelled examples
    the label (`classification`), a number (`regression`), the labels of the words (`token_classification`) or the
    answer in a context (`question_answering`), or the answers to prompts (`answer`)."""
    pairs: Pairs = "none"
    """Kind of the pairs of segments that rows are made of (`masked`); how a pair belongs together is predicted, too."""
    rate: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of the tokens that are masked (`masked`) or corrupted (`span_corruption`)."""
    mask_unit: MaskUnit = "token"
    """Unit of the text that is masked as a whole (`masked`)."""
    mask_share: float = Field(default=0.8, ge=0.0, le=1.0)
    """Share of the masked tokens that the model sees as the mask token; it sees all but these and `random_share` of
    them unchanged."""
    random_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the masked tokens that the model sees as a random token."""
    mean_span_length: float = Field(default=3.0, ge=1.0)
    """Mean length of a span, in tokens (`span_corruption`, and `masked` with `mask_unit: span`)."""
    fill_rate: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the documents that are rearranged (`fill_in_the_middle`)."""
    suffix_first_share: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the rearranged documents that have the suffix before the prefix."""
    labels: tuple[str, ...] = ()
    """Names of the labels, in the order of their numbers (`classification`, `token_classification`). `palimpsest
    finetune` finds them in the training data where they are left out."""
    stride: PositiveInt = 128
    """Number of tokens that two neighbouring windows of a long context share (`question_answering`)."""
    no_answer: bool = False
    """Questions without an answer in their context: allowed, and predicted (`question_answering`)."""
    cut_answers: Literal["refuse", "cover"] = "refuse"
    """Answers that begin or end inside of a token (`question_answering`). `refuse`: an error before training; `cover`:
    the tokens that hold all of them are predicted."""
    longest_answer: PositiveInt = 30
    """Largest number of tokens of a predicted answer (`question_answering`)."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each label's weight that training spreads evenly over all labels (Szegedy et al. 2016, arXiv 1512.00567,
    section 7): those of a text or of a word (`classification`, `token_classification`), the tokens of a row
    (`question_answering`), or the vocabulary (`answer`). Losses of evaluations are without it."""

    answer_length: int = Field(default=0, ge=0)
    """Tokens of a row of the decoder of T5 (`answer`), its end of text included. `palimpsest finetune` sets it to the
    longest answer where it is left out. 0 stands for a model without an encoder, whose rows hold prompt and answer."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        # What this returns counts as Python's, whose lists are no tuples to a strict reader, unlike JSON's.
        if isinstance(value, dict) and isinstance(labels := value.get("labels"), list):
            return value | {"labels": tuple(labels)}
        return value
