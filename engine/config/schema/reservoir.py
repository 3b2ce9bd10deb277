"""The section of the replay reservoir: how many documents it keeps, of which domains, and with which weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from engine.config.schema.section import KeyKind, Section


class PinConfig(Section):
    """Copies of the reservoir's rows, for sources that will vanish. They are written when a run stage ends."""

    kind: ClassVar[KeyKind] = "schedule"

    max_bytes: PositiveInt
    """Bytes of tokens at most, in files of 64 MiB: of each domain the same share of its tokens."""
    domains: tuple[str, ...] = ()
    """Domains whose rows are copied. None named means all."""


class ReservoirConfig(Section):
    """Reservoir of documents that the run has trained on, which later run stages can replay.

    A domain is a source of the data by its name, or a run stage's only data set by the run stage's name.
    """

    kind: ClassVar[KeyKind] = "schedule"

    rows: PositiveInt
    """Number of rows at most: documents, or parts of long ones. A row takes 18 bytes of memory on each rank."""
    quota: Literal["uniform", "proportional", "square_root", "fixed"] = "proportional"
    """Shares of the domains. `uniform`: equal ones; `proportional`: as their tokens; `square_root`: as the square roots
    of these; `fixed`: as `shares` says. A domain with fewer rows than its share gives the rest to the others."""
    shares: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Shares by domain, in any unit, for the quota `fixed`; a domain that is not named has none."""
    recency: float = Field(default=1.0, ge=0.01, le=100.0)
    """Factor of a document's weight from one run stage to the next: above 1 later documents are more likely to stay."""
    weight_column: str | None = None
    """Column of the shards with a weight of each document, its quality for example: the chance to stay grows with it.
    `prepare --weight-key` writes the column `weight`. None means that all weigh 1; `recency` multiplies either."""
    pin: PinConfig | None = None
    """Copies of the rows, which are read where a row's shard is gone. None means that there are none."""
    span_tokens: int = Field(default=2048, ge=1, le=2**15 - 1)
    """Number of tokens of a row at most; longer documents have several. It cannot change once the run has begun."""

    def __hash__(self) -> int:
        # without `shares`: a mapping has no hash
        return hash((self.rows, self.quota, self.recency, self.span_tokens))
