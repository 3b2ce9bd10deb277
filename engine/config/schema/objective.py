"""The section of what a run stage learns to predict."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from engine.config.schema.section import Section


class ObjectiveConfig(Section):
    """What is predicted from what. `objective: NAME` alone stands for `objective: {name: NAME}`."""

    name: Literal["causal", "fill_in_the_middle", "masked", "span_corruption"] = "causal"
    pairs: Literal["none", "next_sentence", "sentence_order"] = "none"
    """`masked`: rows are pairs of segments; which kind of pair is predicted, too."""
    rate: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of the tokens that is masked (`masked`) or corrupted (`span_corruption`)."""
    mask_unit: Literal["token", "word", "span"] = "token"
    """`masked`: what is masked as a whole."""
    mask_share: float = Field(default=0.8, ge=0.0, le=1.0)
    """Of the masked tokens, how many the model sees as the mask token; the rest but `random_share` it sees as are."""
    random_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """Of the masked tokens, how many the model sees as a random token."""
    mean_span_length: float = Field(default=3.0, ge=1.0)
    """Mean length of a span, in tokens."""
    fill_rate: float = Field(default=0.5, ge=0.0, le=1.0)
    """`fill_in_the_middle`: share of the documents that are rearranged."""
    suffix_first_share: float = Field(default=0.5, ge=0.0, le=1.0)
    """Of these, how many have the suffix before the prefix."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value
