"""The sections of a run stage's data: which token shards it reads, in which mixture, and where they are cached."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from engine.config.schema.section import KeyKind, Section

Attention = Literal["document", "row"]
PackingName = Literal["concatenate", "best_fit"]


class DataSource(Section):
    """One data set of a mixture."""

    kinds: ClassVar[dict[str, KeyKind]] = {"path": "execution"}

    name: str = Field(min_length=1, max_length=64)
    """Name of the source in metrics (`loss/NAME`, `tokens/NAME`). It is part of the seed of the source's order, so
    sources do not change each other's."""
    path: str
    """Folder of token shards that `palimpsest prepare` wrote, or its URL."""
    weight: PositiveFloat | None = None
    """Share of the samples, relative to the other sources' shares. None, for all sources, means in proportion to their
    tokens."""
    epochs: PositiveFloat | None = None
    """Number of passes after which the source gives no more samples; the others go on in their proportions. None means
    no limit."""
    max_tokens: PositiveInt | None = None
    """Number of tokens (whole samples of `sequence_length`) after which the source gives no more samples. None means no
    limit."""


class CacheConfig(Section):
    """Local copies, on each node, of shards that are read from a URL."""

    kind: ClassVar[KeyKind] = "execution"

    folder: Path
    """Folder on a disk of the node; its ranks, and other runs, share it."""
    bytes: PositiveInt
    """Largest size of the folder, in bytes: two windows of shards or more."""


class DataConfig(Section):
    """Data of a run stage: the token shards that it reads, and how documents share a row.

    Folders may move. What the training data holds may not change under a run: the loader's state carries its
    fingerprint. Held-out data is free: another set only begins another curve.
    """

    kinds: ClassVar[dict[str, KeyKind]] = {
        "train": "execution",
        "validation": "execution",
        "cache": "execution",
        "on_damage": "schedule",
    }

    train: str | None = None
    """Folder of token shards that `palimpsest prepare` wrote, or its URL (s3://, https://, ...). None means that
    `sources` name them."""
    sources: tuple[DataSource, ...] = ()
    """Several such folders, mixed sample by sample in exact proportions."""
    temperature: PositiveFloat = 1.0
    """Temperature of a mixture without weights: each source weighs its tokens to the power of 1 / temperature. 1 is in
    proportion, more is closer to equal shares."""
    validation: str | dict[str, str] | None = None
    """Folder of held-out token shards, or its URL, or several of them by name; a folder of such folders, as `palimpsest
    prepare` writes one per domain, is that mapping. Metrics have `validation_loss` over all targets, and
    `validation_loss/NAME` for each name. None means no validation."""
    cache: CacheConfig | None = None
    """Cache on each node for shards from URLs. None means no cache, and no URL."""
    window_shards: PositiveInt = 16
    """Number of (shuffled) shards in a window; samples are shuffled inside of windows."""
    attention: Attention = "document"
    """Reach of attention and targets: inside of a document (`document`), or over all documents of a row (`row`)."""
    packing: PackingName = "concatenate"
    """Packing of documents into rows. `concatenate`: rows are consecutive parts of a shard; `best_fit`: documents
    (longer ones in parts) stay whole, each in the row where least room is left."""
    on_damage: Literal["fail", "quarantine"] = "fail"
    """Reaction to a damaged or missing shard of the training data. `fail`: end the run, on all ranks. `quarantine`: go
    on without its samples from that step on, on all ranks, say so, and remember it over restarts."""

    @property
    def validation_places(self) -> tuple[str, ...]:
        """The folders and URLs of held-out data."""
        if self.validation is None:
            return ()
        return (self.validation,) if isinstance(self.validation, str) else tuple(self.validation.values())
