"""What of a run's tokenizer and data is there, and whether it suits the model: what `train` would say, at once.

Only tokenizers and indexes are read, of folders on this machine; what lies at a URL is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.schema.run import RunConfig
from engine.errors import PalimpsestError


@dataclass(frozen=True)
class Inputs:
    """Findings as sentences. `missing` may still come to be before the run; with `wrong` the run cannot start."""

    found: tuple[str, ...]
    missing: tuple[str, ...]
    wrong: tuple[str, ...]


def look(config: RunConfig) -> Inputs:
    """Looks at the tokenizer, the training data and the held-out data of a run."""
    found: list[str] = []
    missing: list[str] = []
    wrong: list[str] = []
    expected: str | None = None
    needed = config.model.vocab_size
    if not config.tokenizer.exists():
        missing.append(f"tokenizer: no folder {config.tokenizer}; `palimpsest tokenizer` writes it")
    else:
        try:
            expected, needed = _tokenizer(config)
        except PalimpsestError as error:
            wrong.append(f"tokenizer: {error.wrong}")
        if needed > config.model.vocab_size:
            wrong.append(
                f"model.vocab_size = {config.model.vocab_size:,}, but the tokenizer {config.tokenizer} has {needed:,} "
                f"tokens; allowed: {needed:,} or more"
            )
    for key, place, read_tokens in _places(config):
        if "://" in place:
            found.append(f"{key}: {place} is not looked at")
        elif not Path(place).exists():
            missing.append(f"{key}: no folder {place}; `palimpsest prepare` writes it")
        else:
            try:
                found.append(f"{key}: {place} has {_tokens(place, expected, needed, read_tokens, config)}")
            except PalimpsestError as error:
                wrong.append(f"{key}: {error.wrong}")
    return Inputs(tuple(found), tuple(missing), tuple(wrong))


def _tokenizer(config: RunConfig) -> tuple[str, int]:
    """(hash, number of tokens)."""
    from engine.data.tokenizer.folder import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer)
    return tokenizer.hash, tokenizer.vocab_size


def _places(config: RunConfig) -> list[tuple[str, str, int | None]]:
    """(key path, folder or URL, tokens read over the run) of the data; None where sources mix or it is held out."""
    stage = config.stages[0]
    data = stage.data
    whole = stage.batches.samples(stage.num_steps) * stage.sequence_length
    places: list[tuple[str, str, int | None]] = [] if data.train is None else [("data.train", data.train, whole)]
    places += [(f"data.sources {source.name}", source.path, None) for source in data.sources]
    return places + [(key, place, None) for key, place in _held_out(data.validation)]


def _held_out(named: Any) -> list[tuple[str, str]]:
    """(key path, folder or URL) of the held-out data: a place, several by name, or a folder of such folders."""
    if named is None:
        return []
    if isinstance(named, dict):
        return [(f"data.validation {name}", place) for name, place in named.items()]
    from engine.data.shards.index import FILE

    folder = Path(named)
    inside = [] if (folder / FILE).exists() else sorted(path.parent for path in folder.glob(f"*/{FILE}"))
    if not inside or {"train", "validation"} & {path.name for path in inside}:  # the parts of one output
        return [("data.validation", named)]
    return [(f"data.validation {path.name}", str(path)) for path in inside]


def _tokens(place: str, expected: str | None, needed: int, read_tokens: int | None, config: RunConfig) -> str:
    """Tokens of a folder of shards, and how often they are read. Raises `DataError`."""
    from engine.data.shards.dataset import TokenDataset
    from engine.errors import DataError

    index = TokenDataset(place, expected).index
    if index.vocab_size > max(needed, config.model.vocab_size):
        raise DataError(
            f"the shards in {place} have {index.vocab_size:,} tokens in their vocabulary, model.vocab_size = "
            f"{config.model.vocab_size:,}"
        )
    text = f"{index.num_tokens:,} tokens in {len(index.shards):,} shards"
    if read_tokens is None:
        return text
    if not index.num_tokens:
        raise DataError(f"{place} has no tokens")
    step = config.stages[0].batches.largest * config.stages[0].sequence_length
    small = f"; that is less than a step's {step:,}" if index.num_tokens < step else ""
    return f"{text}; the run reads them {read_tokens / index.num_tokens:.3g} times{small}"
