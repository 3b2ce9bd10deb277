"""Comparison of the tokenizer in an exported folder with our own reader and with the ids in the shards of the run.

Users read the folder with `AutoTokenizer`, which rebuilds some classes by rules of their own, so that is what is
compared. The documents are those of the shards: their ids as text, split again. A tokenizer that loses something (case,
blanks) may not give a document's ids again; then both readers still have to split its text alike.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.shards.dataset import TokenDataset
from engine.data.shards.remote import is_remote
from engine.data.tokenizer.files import read_files
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.errors import CheckpointError, ConfigError, DataError
from engine.logs import logger
from engine.serve.source import Trained

log = logger(__name__)

_DOCUMENTS = 32
"""Number of documents of each data set that are compared."""
_LONGEST = 2048
"""Number of tokens of a document that are compared."""
# A text that is cut ends in other tokens than the whole one: merges may reach over the cut. The last 64 do not count.
_BEHIND_CUT = 64


@dataclass(frozen=True)
class SameTokens:
    """Token ids on which both readers agree."""

    ids: list[int]
    """Token ids of the fixed text."""
    num_shard_tokens: int
    """Number of tokens of the run's shards that the exported tokenizer reproduces."""


def same_tokens(trained: Trained, folder: Path, name: Path, text: str) -> SameTokens:
    """Compare the exported tokenizer on `text` and on documents of the run; `name` is how errors call the folder.

    Raises:
        ConfigError: transformers reads it as a class that splits text by rules of its own.
        CheckpointError: it splits text otherwise than our reader, or gives other ids than the shards have.
    """
    assert trained.tokenizer is not None
    ours, theirs = load_tokenizer(trained.tokenizer), _their_reader(folder, name)
    expected = ours.encode([text])[0].tolist()
    if expected != _ids(theirs, text):
        _refuse_class(trained.tokenizer, theirs, folder)
        raise differs(name, "its tokenizer cuts text into other tokens", f"those of {trained.tokenizer}")
    compared = [_compare(ours, theirs, ids, trained, name) for ids in _documents(trained, ours)]
    given = [tokens for tokens in compared if tokens]
    others = [tokens for tokens in compared if tokens == 0]
    # Some may differ: a shard's text may not be what decoding gives back. Most differ only under another tokenizer.
    if len(others) > len(given):
        raise differs(
            name,
            f"its tokenizer gives other ids than the shards of the run have, for {len(others)} of {len(compared)} "
            "documents",
            f"the tokenizer that the shards were written with; {trained.tokenizer} is not",
        )
    return SameTokens(expected, sum(given))


def _their_reader(folder: Path, name: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library and its parsers raise whatever they like
        reason = (str(error).splitlines() or [""])[0]
        raise differs(name, f"transformers cannot read its tokenizer: {reason}", "a folder that it reads") from error


def _refuse_class(tokenizer: Path, theirs: Any, folder: Path) -> None:
    """Raise `ConfigError` where transformers takes another class than the folder names: for some types of models
    (qwen2 since version 5) it does, and that class splits text by rules of its own."""
    named = read_files(folder).settings.get("tokenizer_class")
    taken = type(theirs).__name__
    if taken.removesuffix("Fast") in (str(named).removesuffix("Fast"), "TokenizersBackend", "PreTrainedTokenizer"):
        return
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    raise ConfigError(
        f"the tokenizer in {tokenizer} with a model of type {model_type}: transformers reads every tokenizer of that "
        f"type as {taken}, which splits text by rules of its own",
        f"a tokenizer that splits text as {taken} does",
        "train such a model with the tokenizer of a published one (`palimpsest tokenizer --import`), or a model of "
        "another form; `--verify none` writes the folder for readers that take tokenizer.json as it is",
    )


def _compare(ours: TextTokenizer, theirs: Any, ids: np.ndarray, trained: Trained, name: Path) -> int | None:
    """Return the number of ids that both readers reproduce; 0 where they give others, None where that is unknown."""
    cut = ids[:_LONGEST]
    if not ours.vocabulary.ordinary_V[cut].all():
        return None  # what is unknown, and special tokens, have no text
    text = ours.decode(cut)
    if any(token in text for token in _special(ours)):
        return None  # a quotation, which their reader takes for the token
    again = ours.encode([text])[0]
    if again.tolist() != _ids(theirs, text):
        raise differs(name, "its tokenizer cuts a document of the shards into other tokens", f"{trained.tokenizer}'s")
    end = cut.size if cut.size == ids.size else cut.size - _BEHIND_CUT
    # equal text, other ids: another tokenizer (0); other text: the tokenizer loses something, which says nothing (None)
    if np.array_equal(again[:end], cut[:end]):
        return end
    return 0 if ours.decode(again) == text else None


def _special(tokenizer: TextTokenizer) -> list[str]:
    numbers = np.flatnonzero(~tokenizer.vocabulary.ordinary_V).tolist()
    names = (tokenizer.model.id_to_token(number) for number in numbers)
    return [name for name in names if name]


def _documents(trained: Trained, tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    """Yield ids of the first documents of each data set that the run was trained on, without the end of text."""
    # a converted model was trained on nothing that is here
    stages = () if trained.run is None else trained.run.stages
    for location in dict.fromkeys(location for stage in stages for location in stage.data.training_locations):
        if is_remote(location):
            reason = "only local shards are read for that"
            log.warning("the tokenizer was not compared with the ids in %s: %s", location, reason)
            continue
        try:
            shard = TokenDataset(location, tokenizer.hash).shard(0)
        except (DataError, IndexError) as error:
            reason = str(error).splitlines()[0]
            log.warning("the tokenizer was not compared with the ids in %s: %s", location, reason)
            continue
        bounds = shard.documents[: _DOCUMENTS + 1].tolist()
        for first, end in itertools.pairwise(bounds):
            # without the end of text, which is the last token of each document
            yield np.array(shard.tokens[first : end - 1], np.int64)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def differs(name: Path, what: str, allowed: str) -> CheckpointError:
    """Return the error for a folder that is not the model of the run."""
    return CheckpointError(
        f"{name} is not the model of the run: {what}",
        allowed,
        "the folder was not kept; please report this with the versions of torch and transformers",
    )
