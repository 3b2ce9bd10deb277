"""Small corpora for the data tests: made-up documents, as text and as token shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engine.data.dataset import TokenDataset
from engine.data.shards import ShardWriter

EOS = 0
VOCABULARY = 1000
SENTENCE = "the a rank of step wave little falls rises under over 日本 naïve 😀 if return x = y + 1"


def made_up_documents(count: int, longest: int = 60, seed: int = 0) -> list[np.ndarray]:
    """Documents of 2 to `longest` tokens, each ended by `EOS`, which is nowhere else."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest + 1, count)
    return [np.append(generator.integers(1, VOCABULARY, length - 1), EOS) for length in lengths]


def write_shards(
    folder: Path, documents: list[np.ndarray], shard_tokens: int = 400, vocab_size: int = VOCABULARY
) -> TokenDataset:
    """The documents as shards of at most `shard_tokens` tokens."""
    item_bytes = 2 if vocab_size <= 2**16 else 4
    with ShardWriter(folder, vocab_size, EOS, "tokenizer-hash", shard_tokens * item_bytes) as writer:
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
