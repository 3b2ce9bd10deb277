"""Documents of a domain: text files and data sets as `prepare` reads them, or token shards that it has written."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.corpus.sources.chunks import read_texts, split_domain
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.index import FILE
from engine.data.tokenizer import plain_text
from engine.data.tokenizer.folder import TextTokenizer
from engine.errors import ConfigError, DataError
from engine.train.ledger_report import told_bytes

_COMPARED = 32
"""Documents of shards whose text is split again, to see that the tokenizer is theirs."""
_AT_ONCE = 256


@dataclass(frozen=True)
class Domain:
    """A name and where its text is."""

    name: str
    source: str

    @property
    def is_prepared(self) -> bool:
        """True if it is a folder of token shards."""
        return (Path(self.source) / FILE).is_file()


@dataclass(frozen=True)
class Documents:
    """Token ids of a domain's documents, without ends of text, and the bytes that they stand for."""

    ids: list[list[int]]
    num_bytes: int | None
    """UTF-8 bytes of the original text; None where only tokens are known, and decoding may not give the text back."""
    unspelt_bytes: int = 0
    """Bytes among them that no token spells."""


def named(given: list[str], option: str) -> list[Domain]:
    """Return the domains of `NAME=SOURCE`; a source without a name has that of its file.

    Raises:
        ConfigError: two have one name.
    """
    found = []
    for each in given:
        name, source = split_domain(each)
        found.append(Domain(name or Path(source.removeprefix("hf:")).name.split(".")[0] or source, source))
    twice = next((one.name for one in found if sum(other.name == one.name for other in found) > 1), None)
    if twice is not None:
        raise ConfigError(f"{option} names {twice} twice", "NAME=SOURCE, each name once", "give them other names")
    return found


def read_documents(domain: Domain, tokenizer: TextTokenizer, text_key: str, limit: int | None) -> Documents:
    """Read the first `limit` documents of a domain (None: all).

    Raises:
        DataError: the source cannot be read, has no text, or holds the tokens of another tokenizer.
    """
    read = _shards(domain, tokenizer, limit) if domain.is_prepared else _texts(domain, tokenizer, text_key, limit)
    if not any(read.ids):
        raise DataError(f"{domain.source} holds no text", "a document or more", "check the source")
    return read


def _texts(domain: Domain, tokenizer: TextTokenizer, text_key: str, limit: int | None) -> Documents:
    ids: list[list[int]] = []
    num_bytes = unspelt = 0
    documents = itertools.islice(read_texts([domain.source], text_key, False), limit)
    while texts := list(itertools.islice(documents, _AT_ONCE)):
        found = tokenizer.encode(texts)
        ids += [each.tolist() for each in found]
        num_bytes += sum(len(text.encode()) for text in texts)
        unspelt += int(tokenizer.unspelt_bytes(texts, found).sum())
    return Documents(ids, num_bytes, unspelt)


def _shards(domain: Domain, tokenizer: TextTokenizer, limit: int | None) -> Documents:
    dataset = TokenDataset(Path(domain.source))
    ids = [document.tolist() for document in itertools.islice(_documents(dataset), limit)]
    _require_same_tokens(domain, ids, tokenizer)
    whole = limit is None or len(ids) < limit
    told = told_bytes(Path(domain.source), dataset.index.num_tokens) if whole else 0
    if not told and _spells_bytes(tokenizer):
        told = sum(len(tokenizer.decode(np.array(each)).encode()) for each in ids)
    return Documents(ids, told or None)


def _documents(dataset: TokenDataset) -> Iterator[np.ndarray]:
    for number in range(dataset.num_shards):
        shard = dataset.shard(number)
        for first, end in itertools.pairwise(shard.documents.tolist()):
            document = np.array(shard.tokens[first:end], np.int64)
            yield document[:-1] if document.size and document[-1] == dataset.index.eos_id else document
        dataset.release()


def _require_same_tokens(domain: Domain, ids: list[list[int]], tokenizer: TextTokenizer) -> None:
    """Raise `DataError` where most documents, split again, have other tokens: they are of another tokenizer."""
    fits = [each for each in ids[:_COMPARED] if max(each, default=0) < tokenizer.vocab_size]
    again = tokenizer.encode([tokenizer.decode(np.array(each, np.int64)) for each in fits])
    same = sum(found.tolist() == each for found, each in zip(again, fits, strict=True))
    if 2 * same < min(len(ids), _COMPARED):
        raise DataError(
            f"the shards in {domain.source} were written with another tokenizer than the model's: of "
            f"{min(len(ids), _COMPARED)} documents {same} have the same tokens when they are split again",
            "shards that `prepare --tokenizer` wrote with the model's tokenizer",
            "name the text itself, or prepare it with that tokenizer",
        )


def _spells_bytes(tokenizer: TextTokenizer) -> bool:
    """Return True if decoding gives back every byte of a text: byte-level BPE that normalises nothing."""
    tree = json.loads(tokenizer.model.to_str())
    decoder = tree.get("decoder") or {}
    return (
        plain_text.model_type(tree) == "BPE" and decoder.get("type") == "ByteLevel" and tree.get("normalizer") is None
    )
