"""Check of a run's tokenizer and data, as far as they are there: problems that `train` would report, told at once.

Only tokenizers and indexes are read, of folders on this machine; what lies at a URL is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.schema.run import RunConfig
from engine.errors import PalimpsestError


@dataclass(frozen=True)
class Inputs:
    """Findings as sentences. `missing` may still come to be before the run; with `wrong` the run cannot start."""

    found: tuple[str, ...]
    missing: tuple[str, ...]
    wrong: tuple[str, ...]


def look(config: RunConfig) -> Inputs:
    """Return the findings about the tokenizer, the training data and the held-out data of a run."""
    found: list[str] = []
    missing: list[str] = []
    wrong: list[str] = []
    # Without a readable tokenizer the shards are compared with the model's vocabulary alone.
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
    found += [
        f"stages.{number}.replay.source: the run's reservoir of {config.reservoir.rows:,} rows at most"
        for number, run_stage in enumerate(config.stages)
        if run_stage.replays_reservoir and config.reservoir is not None
    ]
    for folder in _folders(config):
        key, location = folder.key, folder.location
        if "://" in location:
            found.append(f"{key}: {location} is not looked at")
        elif not Path(location).exists():
            missing.append(f"{key}: no folder {location}; `palimpsest prepare` writes it")
        else:
            try:
                found.append(f"{key}: {location} has {_tokens(folder, expected, needed, config)}")
            except PalimpsestError as error:
                wrong.append(f"{key}: {error.wrong}")
    return Inputs(tuple(found), tuple(missing), tuple(wrong))


def _tokenizer(config: RunConfig) -> tuple[str, int]:
    """Return the (hash, number of tokens) of the run's tokenizer. Raises `PalimpsestError`."""
    from engine.data.tokenizer.folder import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer)
    return tokenizer.hash, tokenizer.vocab_size


class Folder(NamedTuple):
    """One data set of a run stage."""

    key: str
    location: str
    read_tokens: int | None
    """Tokens read over the run stage; None where sources mix, or the data is held out."""
    step_tokens: int
    """Tokens of a step of the run stage."""


def _folders(config: RunConfig) -> list[Folder]:
    """Return the data of all run stages, with the key of each; `stages.N` stands before it where there are several."""
    found = []
    for number, run_stage in enumerate(config.stages):
        prefix = f"stages.{number}." if len(config.stages) > 1 else ""
        data, length = run_stage.data, run_stage.sequence_length
        whole, step = run_stage.batches.samples(run_stage.num_steps) * length, run_stage.batches.largest * length
        keys: list[tuple[str, str, int | None]] = [] if data.train is None else [("data.train", data.train, whole)]
        keys += [(f"data.sources {source.name}", source.path, None) for source in data.sources]
        if (replay := run_stage.replay) is not None and replay.source is not None:
            keys.append(("replay.source", replay.source, None))
        keys += [(key, location, None) for key, location in _validation_locations(data.validation)]
        found += [Folder(prefix + key, location, read_tokens, step) for key, location, read_tokens in keys]
    return found


def _validation_locations(named: Any) -> list[tuple[str, str]]:
    """Return (key path, folder or URL) of the held-out data: one location, several by name, or a folder of folders."""
    if named is None:
        return []
    if isinstance(named, dict):
        return [(f"data.validation {name}", location) for name, location in named.items()]
    from engine.data.shards.folders import data_sets, domains

    names = domains(data_sets(Path(named)))
    return [(f"data.validation {name}", str(Path(named) / name)) for name in names] or [("data.validation", named)]


def _tokens(folder: Folder, expected: str | None, needed: int, config: RunConfig) -> str:
    """Return the tokens of a folder of shards, and how often they are read, as text. Raises `DataError`."""
    from engine.data.shards.dataset import TokenDataset
    from engine.errors import DataError

    location = folder.location
    # The index alone: hashes of whole shards would take minutes, and `train` reads them anyway.
    index = TokenDataset(location, expected).index
    if index.vocab_size > max(needed, config.model.vocab_size):
        raise DataError(
            f"the shards in {location} have {index.vocab_size:,} tokens in their vocabulary, model.vocab_size = "
            f"{config.model.vocab_size:,}"
        )
    text = f"{index.num_tokens:,} tokens in {len(index.shards):,} shards"
    if folder.read_tokens is None:
        return text
    if not index.num_tokens:
        raise DataError(f"{location} has no tokens")
    small = f"; that is less than a step's {folder.step_tokens:,}" if index.num_tokens < folder.step_tokens else ""
    return f"{text}; the run reads them {folder.read_tokens / index.num_tokens:.3g} times{small}"
