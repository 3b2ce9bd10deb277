"""megatron-core's data sets beside ours: GPTDataset, and BERTMaskedWordPieceDataset without pairs.

Their indexed files hold the same tokens, in sentences of `SENTENCE_TOKENS` at most, for their BERT leaves out documents
with a sentence of more than 512 and fills a row from one document. Their index of samples is built before time is
counted. Rows are put together by torch's collation, as their loaders do it, read in order: the index is shuffled.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

SENTENCE_TOKENS = 64
MASKED_SHARE = 0.15


def write(folder: Path, documents: Iterator[np.ndarray]) -> None:
    """The documents as `PREFIX.bin` and `PREFIX.idx`."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # pyright: ignore[reportMissingImports]

    folder.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(str(folder / "corpus.bin"), dtype=np.uint16)
    for document in documents:
        full, rest = divmod(document.size, SENTENCE_TOKENS)
        builder.add_document(document, [SENTENCE_TOKENS] * full + [rest] * (rest > 0))
    builder.finalize(str(folder / "corpus.idx"))


def tokenizer(size: int, **special: int) -> SimpleNamespace:
    """What their data sets ask a tokenizer for, over ids that are no text."""
    return SimpleNamespace(
        vocab_size=size,
        inv_vocab={number: f"w{number}" for number in range(size)},
        unique_identifiers={"class": "made up"},
        eos=special["eod"],
        **special,
    )


def gpt(folder: Path, length: int, rows: int, skip: int, seed: int, tokens: SimpleNamespace) -> Iterator[Any]:
    """GPT's rows with loss masks at ends of text and positions, no attention mask (the cheapest they offer)."""
    from megatron.core.datasets.gpt_dataset import (  # pyright: ignore[reportMissingImports]
        GPTDataset,
        GPTDatasetConfig,
    )

    config = GPTDatasetConfig(
        **_common(folder, length, seed, tokens),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    yield from _batches(GPTDataset, folder, config, rows, skip)


def bert(folder: Path, length: int, rows: int, skip: int, seed: int, tokens: SimpleNamespace) -> Iterator[Any]:
    """BERT's rows of one segment: 15 % of single tokens masked 80/10/10, padded to the length."""
    from megatron.core.datasets.bert_dataset import (  # pyright: ignore[reportMissingImports]
        BERTMaskedWordPieceDataset,
        BERTMaskedWordPieceDatasetConfig,
    )

    config = BERTMaskedWordPieceDatasetConfig(
        **_common(folder, length, seed, tokens),
        masking_probability=MASKED_SHARE,
        short_sequence_probability=0.0,
        masking_max_ngram=1,
        masking_do_full_word=False,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=False,
        classification_head=False,
    )
    yield from _batches(BERTMaskedWordPieceDataset, folder, config, rows, skip)


def _common(folder: Path, length: int, seed: int, tokens: SimpleNamespace) -> dict[str, Any]:
    return {
        "random_seed": seed,
        "sequence_length": length,
        "blend": ([str(folder / "corpus")], None),
        "split": "1,0,0",
        "path_to_cache": str(folder / "cache"),
        "tokenizer": tokens,
    }


def _batches(kind: Any, folder: Path, config: Any, rows: int, skip: int) -> Iterator[Any]:
    """Collated rows of one epoch after the other; after a restart a sampler goes on at the consumed samples."""
    import torch
    from megatron.core.datasets.utils import Split  # pyright: ignore[reportMissingImports]
    from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.utils.data import default_collate

    if not torch.distributed.is_initialized():  # what builds the index asks for its rank
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    prefix = str(folder / "corpus")
    indexed = kind.build_low_level_dataset(prefix, config)
    count = kind.numel_low_level_dataset(indexed)
    wanted = int(indexed.sequence_lengths.sum()) // config.sequence_length
    data = kind(indexed, prefix, np.arange(count, dtype=np.int32), wanted, Split.train, config)
    step = skip
    while True:
        numbers = np.arange(step * rows, (step + 1) * rows) % len(data)
        yield default_collate([data[number] for number in numbers.tolist()])
        step += 1
