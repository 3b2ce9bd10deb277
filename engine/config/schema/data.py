"""The sections of a run stage's data: which token shards it reads, in which mixture, and where they are cached."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from engine.config.schema.section import Kind, Section

Attention = Literal["document", "row"]
PackingName = Literal["concatenate", "best_fit"]


class DataSource(Section):
    """One data set of a mixture."""

    kinds: ClassVar[dict[str, Kind]] = {"path": "execution"}

    name: str = Field(min_length=1, max_length=64)
    """What metrics call it (`loss/NAME`, `tokens/NAME`). Part of the seed of its order: sources do not move one
    another."""
    path: str
    """Folder of token shards that `palimpsest prepare` wrote, or its URL."""
    weight: PositiveFloat | None = None
    """Its share of the samples, relative to the other sources'. None for all: their tokens weigh."""
    epochs: PositiveFloat | None = None
    """It gives no more samples after so many passes; the others go on in their proportions. None: it never ends."""
    max_tokens: PositiveInt | None = None
    """It gives no more samples after so many tokens (whole samples of `sequence_length`). None: it never ends."""


class CacheConfig(Section):
    """Where shards that are read from a URL lie on each node."""

    kind: ClassVar[Kind] = "execution"

    folder: Path
    """Folder on a disk of the node; its ranks, and other runs, share it."""
    bytes: PositiveInt
    """Most bytes that it ever holds: two windows of shards or more."""


class DataConfig(Section):
    """Which token shards a run stage reads, and how documents share a row.

    Folders may move. What the training data holds may not change under a run: the loader's state carries its
    fingerprint. Held-out data is free: another set only begins another curve.
    """

    kinds: ClassVar[dict[str, Kind]] = {
        "train": "execution",
        "validation": "execution",
        "cache": "execution",
        "on_damage": "schedule",
    }

    train: str | None = None
    """Folder of token shards that `palimpsest prepare` wrote, or its URL (s3://, https://, ...). Either this or
    `sources`."""
    sources: tuple[DataSource, ...] = ()
    """Several such folders, mixed sample by sample in exact proportions."""
    temperature: PositiveFloat = 1.0
    """Of sources without weights: each weighs its tokens to the power of 1 / temperature. 1 is in proportion, more is
    closer to equal shares."""
    validation: str | dict[str, str] | None = None
    """Folder of held-out token shards, or its URL; or several by name. A folder of such folders, as `palimpsest
    prepare` writes one per domain, is that mapping: the names are those of the sub-folders. Metrics have
    `validation_loss` over all targets, and `validation_loss/NAME` of each name."""
    cache: CacheConfig | None = None
    """Needed where a folder is a URL."""
    window_shards: PositiveInt = 16
    """Samples are shuffled inside windows of this many (shuffled) shards."""
    attention: Attention = "document"
    """`document`: attention and targets stay inside a document; `row`: documents of one row see each other."""
    packing: PackingName = "concatenate"
    """`concatenate`: rows are consecutive stretches of a shard; `best_fit`: documents (longer ones in parts) stay
    whole, each in the row where least room is left."""
    on_damage: Literal["fail", "quarantine"] = "fail"
    """What to do where a shard of the training data turns out to be damaged or missing. `fail`: end the run, on all
    ranks. `quarantine`: all ranks do without its samples from that step on, say so, and keep it in mind over
    restarts."""

    @property
    def validation_places(self) -> tuple[str, ...]:
        """Every folder or URL of held-out data as it is named."""
        if self.validation is None:
            return ()
        return (self.validation,) if isinstance(self.validation, str) else tuple(self.validation.values())
