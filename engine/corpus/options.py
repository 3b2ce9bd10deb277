"""Options of a preparation, their check, and how far one has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.config.paths import disk_path
from engine.corpus.assemble import Deduplicate
from engine.corpus.sentences import check_language
from engine.corpus.sources.chunks import Keys
from engine.data.shards.writer import DEFAULT_SHARD_BYTES, Compression
from engine.errors import ConfigError


@dataclass(frozen=True)
class PrepareOptions:
    """Sources, output and options of a preparation; all but `max_unspelt` and `overwrite` can change the bytes."""

    sources: tuple[str, ...]
    """Files, folders, globs, or `hf:NAME_OR_FOLDER[:CONFIG][@SPLIT]`; all or none with `DOMAIN=` before them."""
    tokenizer: Path
    output: Path
    validation_fraction: float = 0.05
    """Share of the documents that goes to validation; 0 writes no `validation` folder."""
    shard_bytes: int = DEFAULT_SHARD_BYTES
    text_key: str = "text"
    id_key: str | None = None
    """Key of an id of each document, which is kept beside its shard; None keeps none."""
    weight_key: str | None = None
    """Key of a weight of each document, which is kept beside its shard, for reservoirs; None keeps none."""
    blank_line_ends: bool = False
    """Text files hold many documents, each ended by an empty line; otherwise a file is a document."""
    sentences: str | None = None
    """Language whose rules find the sentences, which pairs need; None finds none."""
    deduplicate: Deduplicate = "none"
    """Leaves out documents with the text of an earlier one (`exact`), or nearly (`near`, which includes exact)."""
    similarity: float = 0.8
    """Least share of their runs of five tokens that near duplicates have in common (Jaccard's)."""
    compression: Compression = "none"
    max_unspelt: float = 0.05
    """Largest share of the bytes of a domain's text that the tokenizer may fail to spell."""
    overwrite: bool = False

    @property
    def keys(self) -> Keys:
        """Keys of what is kept of a document beside its text."""
        return Keys(self.id_key, self.weight_key)


@dataclass(frozen=True)
class Progress:
    """Progress of a preparation; bytes are those of the sources as they lie there (0 in all when unknown)."""

    doing: str
    documents: int
    tokens: int
    kept_tokens: int
    """Tokens that an earlier attempt had finished."""
    done: int
    """Bytes read, bands compared, or shards written."""
    total: int
    text_bytes: int = 0
    """Bytes of the text that has been encoded."""
    unspelt_bytes: int = 0
    """Those of them that no token spells."""


Show = Callable[[Progress], None]
"""Called with every step of the progress."""


def check_options(options: PrepareOptions) -> None:
    """Raise `ConfigError` for an option that makes no sense."""
    if not 0 <= options.validation_fraction < 1:
        raise ConfigError(
            f"--validation-fraction {options.validation_fraction}", "from 0 to less than 1", "0 holds nothing out"
        )
    if not 0 < options.similarity <= 1:
        raise ConfigError(f"--similarity {options.similarity}", "above 0 and up to 1", "0.8 is the default")
    if not 0 <= options.max_unspelt <= 1:
        raise ConfigError(f"--max-unspelt {options.max_unspelt}", "from 0 to 1", "0.05 is the default, 1 allows all")
    if options.shard_bytes < 1:
        raise ConfigError(f"shards of {options.shard_bytes} bytes", "1 or more", "name a larger --shard-megabytes")
    if options.sentences is not None:
        check_language(options.sentences)
    disk_path(str(options.output), "--output")
    for option, key in (("--id-key", options.id_key), ("--weight-key", options.weight_key)):
        if key == options.text_key:
            raise ConfigError(f"{option} {key} is the key of the text, too", "another key", "name another one, or none")
    if not options.sources:
        raise ConfigError("no source is named", "files, folders, globs, or hf:NAME_OR_FOLDER", "name one")
