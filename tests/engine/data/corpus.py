"""Small corpora for the data tests: made-up documents, as text and as token shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engine.data.shards.dataset import TokenDataset
from engine.data.shards.writer import Compression, ShardWriter
from engine.data.tokenizer.vocabulary import Vocabulary, packed

EOS = 0
VOCABULARY = 1000
SENTENCE = "the a rank of step wave little falls rises under over 日本 naïve 😀 if return x = y + 1"


def made_up_documents(count: int, longest: int = 60, seed: int = 0) -> list[np.ndarray]:
    """Documents of 2 to `longest` tokens, each ended by `EOS`, which is nowhere else."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest + 1, count)
    return [np.append(generator.integers(1, VOCABULARY, length - 1), EOS) for length in lengths]


def write_shards(
    folder: Path,
    documents: list[np.ndarray],
    shard_tokens: int = 400,
    vocab_size: int = VOCABULARY,
    compression: Compression = "none",
) -> TokenDataset:
    """The documents as shards of at most `shard_tokens` tokens."""
    item_bytes = 2 if vocab_size <= 2**16 else 4
    how = {"shard_bytes": shard_tokens * item_bytes, "compression": compression}
    with ShardWriter(folder, vocab_size, EOS, "tokenizer-hash", **how) as writer:
        for document in documents:
            writer.add(document)
    return TokenDataset(folder)


def made_up_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of some words and lines."""
    generator, words = np.random.default_rng(seed), SENTENCE.split()
    texts = []
    for _ in range(count):
        lines = [" ".join(generator.choice(words, generator.integers(1, 9))) for _ in range(generator.integers(1, 6))]
        texts.append("\n".join(lines) + f"\n{generator.integers(10**9)}")
    return texts


def write_json_lines(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text, "source": "made up"}) + "\n" for text in texts), encoding="utf-8")
    return path


SPECIAL = {"padding": 900, "classify": 901, "separate": 902, "mask": 903}
SENTINELS, FILL = tuple(range(999, 949, -1)), (904, 905, 906)
NUM_ORDINARY = 899
"""Ordinary tokens of `made_up_vocabulary`: 1 to 899."""


def made_up_vocabulary() -> Vocabulary:
    """Of `VOCABULARY` tokens; every token that 3 divides goes on with a word, a multiple of 10 ends one."""
    ids = np.arange(VOCABULARY)
    return Vocabulary(
        **SPECIAL,
        sentinels=SENTINELS,
        fill=FILL,
        size=VOCABULARY,
        ordinary=packed((ids > 0) & (ids <= NUM_ORDINARY)),
        begins_word=packed(ids % 3 != 0),
        ends_word=packed(ids % 10 == 0),
    )


def write_sentences(
    folder: Path,
    count: int,
    longest: int = 9,
    seed: int = 0,
    shard_tokens: int = 400,
    compression: Compression = "none",
) -> TokenDataset:
    """Documents of 1 to 12 sentences of 1 to `longest` tokens as shards with sentences and `made_up_vocabulary`."""
    generator = np.random.default_rng(seed)
    shape = (VOCABULARY, EOS, "tokenizer-hash", 2 * shard_tokens, made_up_vocabulary(), compression)
    with ShardWriter(folder, *shape) as writer:
        for _ in range(count):
            lengths = generator.integers(1, longest + 1, generator.integers(1, 13))
            tokens = generator.integers(1, NUM_ORDINARY + 1, lengths.sum())
            writer.add(np.append(tokens, EOS), np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    return TokenDataset(folder)
