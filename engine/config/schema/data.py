"""The sections of a run stage's data: which token shards it reads, in which mixture, and where they are cached."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Tag

from engine.config.schema.objective import ObjectiveConfig
from engine.config.schema.section import KeyKind, Section

Attention = Literal["document", "row"]
PackingName = Literal["concatenate", "best_fit"]


class DataSource(Section):
    """One data set of a mixture."""

    kinds: ClassVar[dict[str, KeyKind]] = {"path": "execution", "weight": "schedule", "loss_weight": "schedule"}

    name: str = Field(min_length=1, max_length=64)
    """Name of the source in metrics (`loss/NAME`, `tokens/NAME`). It is part of the seed of the source's order, so
    sources do not change each other's."""
    path: str
    """Folder of token shards that `palimpsest prepare` wrote, or its URL."""
    weight: PositiveFloat | None = None
    """Share of the samples, relative to the other sources' shares. None, for all sources, means in proportion to their
    tokens, or that `weights_table` says it."""
    loss_weight: PositiveFloat = 1.0
    """Weight of the source's targets in the loss, whatever the share of its samples."""
    epochs: PositiveFloat | None = None
    """Number of passes after which the source gives no more samples; the others go on in their proportions. None means
    no limit."""
    max_tokens: PositiveInt | None = None
    """Number of tokens (whole samples of `sequence_length`) after which the source gives no more samples. None means no
    limit."""


class TableRow(Section):
    """One row of a table over the run stage: where it begins. It is in force until the next one begins."""

    kind: ClassVar[KeyKind] = "schedule"

    from_step: NonNegativeInt | None = None
    """Number of finished steps of the run stage from which on the row is in force. None means that `from_tokens` says
    it."""
    from_tokens: NonNegativeInt | None = None
    """Number of consumed tokens of the run stage from which on the row is in force, rounded up to a whole step. None
    means that `from_step` says it."""


class WeightsRow(TableRow):
    """Weights of the sources from a step of the run stage on."""

    weights: dict[str, NonNegativeFloat]
    """Weight of each source, by its name; 0 for a source that gives nothing while the row is in force."""


class RatioRow(TableRow):
    """Ratio of replayed samples from a step of the run stage on."""

    ratio: float
    """Share of replayed samples, 0 or more and less than 1."""


class ReplayConfig(Section):
    """Samples of earlier data that are mixed into a run stage."""

    kinds: ClassVar[dict[str, KeyKind]] = {
        "ratio": "schedule",
        "loss_weight": "schedule",
        "source": "execution",
        "validation": "execution",
    }

    # told apart before they are read, so that an error speaks of the one that was meant
    ratio: Annotated[
        Annotated[float, Tag("number")] | Annotated[tuple[RatioRow, ...], Tag("table")],
        Discriminator(lambda value: "table" if isinstance(value, (list, tuple)) else "number"),
    ]
    """Share of replayed samples, 0 or more and less than 1; or a table of shares by step or tokens."""
    source: str | None = None
    """Folder of token shards that are replayed, or its URL. None means the run's own reservoir,
    which is refused where it keeps none."""
    loss_weight: PositiveFloat = 1.0
    """Weight of the targets of replayed samples in the loss; with an `objective`, of the mean loss of all of them."""
    objective: ObjectiveConfig | None = None
    """Objective of pretraining that the replayed samples have in a run stage that learns a task: the loss is then the
    task's mean plus `loss_weight` times theirs. None means the run stage's own objective; `palimpsest finetune` sets
    the one that the model's family is pretrained with."""
    validation: str | dict[str, str] | None = None
    """Held-out text for this `objective`, as `data.validation`; a folder without sets of its own is called `replay`.
    None means none."""


class ColumnsConfig(Section):
    """Columns of a file of labelled examples."""

    text: str = "text"
    """Name of the column with the text, or with the first text of a pair."""
    pair: str | None = None
    """Name of the column with the second text of a pair. None means that examples are single texts."""
    entities_of_relation: tuple[str, str] | None = None
    """Names of the two columns with the spans `{start, end}` of characters in `text` between which the label is a
    relation (`classification`); marks are put around them. None means texts without marks."""
    label: str = "label"
    """Name of the column with the label, or with the number that a regression predicts."""
    prompt: str = "prompt"
    """Name of the column with the prompt (`answer`)."""
    answer: str = "answer"
    """Name of the column with the answer to the prompt (`answer`)."""
    messages: str | None = None
    """Name of the column with a dialogue (`answer`): a list of objects with `role` and `content`. None means prompts
    and answers."""
    tokens: str = "tokens"
    """Name of the column with the list of a text's words (`token_classification`)."""
    tags: str = "tags"
    """Name of the column with the list of their labels (`token_classification`)."""
    entities: str = "entities"
    """Name of the column with the spans of characters in `text`, a list of `{start, end, label}`, that takes the place
    of words and their labels (`token_classification`)."""
    context: str = "context"
    """Name of the column with the text that the answer is a part of (`question_answering`)."""
    question: str = "question"
    """Name of the column with the question (`question_answering`)."""
    answers: str = "answers"
    """Name of the column with the answers, a list of `{text, start}` with the first character in the context, or
    SQuAD's lists of texts and of starts (`question_answering`)."""
    id: str = "id"
    """Name of the column with the name of a question; rows without it are named by their numbers
    (`question_answering`)."""


class AugmentConfig(Section):
    """Variants of the training examples of a task (Wei and Zou 2019, arXiv 1901.11196), beside the examples."""

    copies: int = Field(default=1, ge=1, le=1024)
    """Number of variants of each example; the n-th is the variant of epoch n."""
    synonyms: Path | None = None
    """File with a word and its synonyms on a line, with tabs between them. None means that no word is replaced."""
    synonym_rate: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the words that have synonyms which are replaced by one."""
    deletion_rate: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the words that are deleted; one at least stays."""
    command: str | None = None
    """Program that makes a text of each text before that, such as a translation there and back: it reads a JSON string
    a line, writes one for each, and gets the number of the epoch as its last argument. None means none."""


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
        "columns": "execution",
        "validation": "execution",
        "cache": "execution",
        "on_damage": "schedule",
        "temperature": "schedule",
        "weights_table": "schedule",
    }

    train: str | None = None
    """Folder of token shards that `palimpsest prepare` wrote, or its URL (s3://, https://, ...). None means that
    `sources` name them."""
    sources: tuple[DataSource, ...] = ()
    """Several such folders, mixed sample by sample in exact proportions."""
    temperature: PositiveFloat = 1.0
    """Temperature of a mixture without weights: each source weighs its tokens to the power of 1 / temperature. 1 is in
    proportion, more is closer to equal shares."""
    weights_table: tuple[WeightsRow, ...] | None = None
    """Weights of the sources that change over the run stage, by step or tokens, instead of the weights of `sources`.
    None means that they do not change."""
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
    augment: AugmentConfig | None = None
    """Variants of the training examples of a task; `palimpsest finetune` makes them. None means none."""
    columns: ColumnsConfig | None = None
    """Columns of the examples, where `train` and `validation` are files of them; `palimpsest finetune` encodes them.
    None means token shards."""
    packing: PackingName = "concatenate"
    """Packing of documents into rows. `concatenate`: rows are consecutive parts of a shard; `best_fit`: documents
    (longer ones in parts) stay whole, each in the row where least room is left."""
    row_lengths: tuple[PositiveInt, ...] = ()
    """Lengths below `sequence_length`, rising, that the rows of a task's step may have: the examples of a step need
    rows of one length, as far as their numbers allow, and its rows are as long as its longest one needs. None of them
    means that all rows have `sequence_length` tokens."""
    on_damage: Literal["fail", "quarantine"] = "fail"
    """Reaction to a damaged or missing shard of the training data. `fail`: end the run, on all ranks. `quarantine`: go
    on without its samples from that step on, on all ranks, say so, and remember it over restarts."""

    @property
    def training_locations(self) -> tuple[str, ...]:
        """The folders and URLs of training data."""
        return tuple(source.path for source in self.sources) or ((self.train,) if self.train else ())

    @property
    def validation_locations(self) -> tuple[str, ...]:
        """The folders and URLs of held-out data."""
        if self.validation is None:
            return ()
        return (self.validation,) if isinstance(self.validation, str) else tuple(self.validation.values())
