"""A data set whose documents that are to be forgotten have tokens of their own, and the ways in which rows are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.config.schema.objective import ObjectiveConfig
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.tombstones import Tombstones
from engine.data.shards.writer import Compression, ShardWriter
from tests.engine.data.corpus import EOS, VOCABULARY, made_up_vocabulary

MARKED, OTHER = range(700, 800), range(800, 899)
"""Tokens of the documents that are forgotten, and those that stand there in the data set of the comparison."""
LENGTH, COUNT = 24, 60
FORGOTTEN = (0, 7, 8, 21, 30, 44, 59)
"""The first and the last, two side by side, and a long one (30)."""
NOTHING_DRAWN: dict[str, Any] = {"mask_share": 0.9, "random_share": 0.0}
"""Random replacements would be drawn from the marked tokens, too."""
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "causal, rows": {"attention": "row"},
    "causal, best fit": {"packing": "best_fit"},
    "fill in the middle": {"objective": ObjectiveConfig(name="fill_in_the_middle")},
    "masked": {"objective": ObjectiveConfig(name="masked", **NOTHING_DRAWN)},
    "masked words": {"objective": ObjectiveConfig(name="masked", mask_unit="word", **NOTHING_DRAWN)},
    "masked spans, best fit": {
        "objective": ObjectiveConfig(name="masked", mask_unit="span", **NOTHING_DRAWN),
        "packing": "best_fit",
    },
    "next sentence": {"objective": ObjectiveConfig(name="masked", pairs="next_sentence", **NOTHING_DRAWN)},
    "sentence order": {"objective": ObjectiveConfig(name="masked", pairs="sentence_order", **NOTHING_DRAWN)},
    "span corruption": {"objective": ObjectiveConfig(name="span_corruption")},
    "span corruption, rows": {"objective": ObjectiveConfig(name="span_corruption"), "attention": "row"},
}


def write(folder: Path, marks: range, compression: Compression = "none") -> TokenDataset:
    """Documents of one to six sentences; those of `FORGOTTEN` have tokens among `marks` alone."""
    generator = np.random.default_rng(3)
    shape = (VOCABULARY, EOS, "tokenizer-hash", 600, made_up_vocabulary(), compression)
    with ShardWriter(folder, *shape) as writer:
        for number in range(COUNT):
            lengths = generator.integers(1, 9, 20 if number == 30 else generator.integers(1, 7))
            drawn = generator.integers(0, len(marks) if number in FORGOTTEN else 699, lengths.sum())
            # 0 is the end of text
            tokens = drawn + (marks.start if number in FORGOTTEN else 1)
            writer.add(np.append(tokens, EOS), np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    return TokenDataset(folder)


def tombstones_of(dataset: TokenDataset) -> Tombstones:
    """The documents of `FORGOTTEN` by shard and number in it."""
    found, before = {}, 0
    for shard in dataset.index.shards:
        found[shard.content_hash] = [n - before for n in FORGOTTEN if before <= n < before + shard.num_documents]
        before += shard.num_documents
    assert len(dataset.index.shards) > 3
    return Tombstones(found)
