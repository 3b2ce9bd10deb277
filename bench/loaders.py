"""Data loaders side by side: ours and its peers over the same tokens, each as an endless iterator of batches.

All yield int64 tokens and targets of the same shape in a shuffled order (`bench.data` counts their time). Ours adds
what training asks for besides: hashes of the shards, weights, document numbers, masks that survive a restart. A peer
that is not installed is left out, and named. B batch (rows), T time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

EOS, PADDING, CLASSIFY, SEPARATE, MASK, FIRST_ORDINARY = 0, 1, 2, 3, 4, 5
VOCAB = 30_000
BATCH_TOKENS = 32_768
SEED = 1
REPLAY_RATIO = Fraction(1, 10)
"""Share of replayed samples, where ours mixes them in."""


@dataclass(frozen=True)
class Task:
    """Tokens per row, and whether a GPT or a BERT is fed."""

    model: str
    length: int

    @property
    def rows(self) -> int:
        return BATCH_TOKENS // self.length

    def __str__(self) -> str:
        return f"{self.model} {self.length}"


def documents(num_tokens: int) -> Iterator[np.ndarray]:
    """Documents of 50 to 1,500 made-up tokens, each ended by `EOS`."""
    generator, left = np.random.default_rng(0), num_tokens
    while left > 0:
        size = min(int(generator.integers(50, 1500)), left)
        yield np.append(generator.integers(FIRST_ORDINARY, VOCAB, size - 1), EOS).astype(np.uint16)
        left -= size


def write_ours(folder: Path, num_tokens: int) -> None:
    from engine.data.shards.writer import ShardWriter
    from engine.data.tokenizer.vocabulary import Vocabulary, packed

    ordinary = packed(np.arange(VOCAB) >= FIRST_ORDINARY)
    vocabulary = Vocabulary(
        padding=PADDING,
        classify=CLASSIFY,
        separate=SEPARATE,
        mask=MASK,
        sentinels=(),
        fill=(),
        size=VOCAB,
        ordinary=ordinary,
        begins_word=ordinary,
        ends_word=packed(np.zeros(VOCAB, bool)),
    )
    with ShardWriter(folder, VOCAB, EOS, "made up", 4 << 20, vocabulary) as writer:
        for document in documents(num_tokens):
            writer.add(document)


def write_flat(folder: Path, num_tokens: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.concatenate(list(documents(num_tokens))).tofile(folder / "tokens.bin")


def _rows(num_tokens: int, width: int) -> np.ndarray:
    """(rows, width): consecutive stretches."""
    flat = np.concatenate(list(documents(num_tokens)))
    return flat[: flat.size // width * width].reshape(-1, width)


def write_arrow(folder: Path, num_tokens: int, width: int) -> None:
    import pyarrow as pa
    from datasets import Dataset

    rows = _rows(num_tokens, width)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), width)
    Dataset(pa.table({"input_ids": column})).save_to_disk(str(folder), max_shard_size="8MB")


def write_mosaic(folder: Path, num_tokens: int, width: int) -> None:
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    with MDSWriter(out=str(folder), columns={"input_ids": f"ndarray:uint16:{width}"}, size_limit=8 << 20) as writer:
        for row in _rows(num_tokens, width):
            writer.write({"input_ids": row})


def write_litdata(folder: Path, num_tokens: int, width: int) -> None:
    from litdata.streaming import Cache, TokensLoader  # pyright: ignore[reportMissingImports]

    rows = _rows(num_tokens, width)
    cache = Cache(str(folder), chunk_size=width * (4_000_000 // width), item_loader=TokensLoader(block_size=width))
    import torch

    for number, row in enumerate(rows):
        cache[number] = torch.from_numpy(row.astype(np.int32))
    cache.done()
    cache.merge()


def ours(folder: Path, task: Task, skip: int) -> Iterator[Any]:
    """Shards verified by hash, documents apart, masks that are functions of the sample; `skip` steps are passed by the
    state of a restart."""
    from engine.data.shards.dataset import TokenDataset

    return _ours([TokenDataset(folder)], task, skip)


def ours_with_replay(folder: Path, task: Task, skip: int) -> Iterator[Any]:
    """Ours, where one sample in ten comes from a second data set."""
    from engine.data.shards.dataset import TokenDataset

    return _ours([TokenDataset(folder), TokenDataset(folder)], task, skip)


def _ours(sets: list[Any], task: Task, skip: int) -> Iterator[Any]:
    from engine.config.rules.tables import REPLAY
    from engine.config.schema.objective import ObjectiveConfig
    from engine.data.loader import Loader
    from engine.data.shares import ShareTable
    from engine.data.source import WeightedDataset
    from engine.data.stream import Stream

    objective = ObjectiveConfig(name="masked" if task.model == "bert" else "causal")
    parts = [WeightedDataset(dataset, name) for dataset, name in zip(sets, ("", REPLAY), strict=False)]
    table = ShareTable(((0, (1,)),), ((0, REPLAY_RATIO),) if len(sets) > 1 else None)
    shape = (task.length, task.rows, SEED, 16, "document", "concatenate", objective, table)
    stream = Stream(parts, *shape)
    if skip:
        fast = stream.clone()
        fast.leave_out(0, (skip - 1) * task.rows)
        fast.skip()
        stream.restore({**fast.state(), "left_out": []})
    loader = Loader(stream)
    while True:
        yield loader.step(0, 1, task.rows)[0]


def memmap(folder: Path, task: Task, skip: int) -> Iterator[Any]:
    """What nanoGPT does, with a shuffle: no epochs' bookkeeping, no hash, no boundaries."""
    import torch

    flat = np.memmap(folder / "tokens.bin", np.uint16, mode="r")
    count = (flat.size - 1) // task.length
    order = np.random.default_rng(SEED).permutation(count)
    step = skip
    while True:
        starts = order[np.arange(step * task.rows, (step + 1) * task.rows) % count] * task.length
        rows = np.stack([flat[start : start + task.length + 1] for start in starts]).astype(np.int64)
        yield torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
        step += 1


def _collator() -> Callable[[list[Any]], Any]:
    """transformers' masking over a tokenizer with our ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    special = {"[EOS]": EOS, "[PAD]": PADDING, "[CLS]": CLASSIFY, "[SEP]": SEPARATE, "[MASK]": MASK}
    words = special | {f"w{n}": n for n in range(FIRST_ORDINARY, VOCAB)}
    names = {"eos_token": "[EOS]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[PAD]")), mask_token="[MASK]", **names
    )
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)


def _batches(rows: Iterator[Any], task: Task, skip: int) -> Iterator[Any]:
    """Rows of T + 1 (GPT) or T tokens as batches, GPT's shifted, BERT's masked."""
    import torch

    collate = _collator() if task.model == "bert" else None
    for _ in range(skip * task.rows):
        next(rows)
    while True:
        chosen = [torch.as_tensor(next(rows)).long() for _ in range(task.rows)]
        if collate is not None:
            yield collate([{"input_ids": row} for row in chosen])
        else:
            batch = torch.stack(chosen)
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def datasets_map(folder: Path, task: Task, skip: int) -> Iterator[Any]:
    """Hugging Face datasets, map style, through a DataLoader without workers (a sampler's state would skip)."""
    from datasets import load_from_disk

    data: Any = load_from_disk(str(folder)).with_format("torch")
    collate = _collator() if task.model == "bert" else None
    order, step = np.random.default_rng(SEED).permutation(len(data)), skip
    while True:
        numbers = order[np.arange(step * task.rows, (step + 1) * task.rows) % len(data)]
        batch = data[numbers]["input_ids"].long()
        yield collate([{"input_ids": row} for row in batch]) if collate else (batch[:, :-1], batch[:, 1:])
        step += 1


def datasets_iterable(folder: Path, task: Task, skip: int) -> Iterator[Any]:
    """Hugging Face datasets, iterable: shuffled shards and a buffer."""
    from datasets import load_from_disk

    data: Any = load_from_disk(str(folder))
    stream = data.to_iterable_dataset(num_shards=4).shuffle(seed=SEED, buffer_size=1000).with_format("torch")

    def rows() -> Iterator[Any]:
        while True:
            for item in stream:
                yield item["input_ids"]

    yield from _batches(rows(), task, skip)


def mosaic(folder: Path, task: Task, skip: int) -> Iterator[Any]:
    """mosaicml-streaming, as its documentation sets it up."""
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]

    data = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=task.rows)
    if skip:
        data.load_state_dict(data.state_dict(skip * task.rows, from_beginning=True))

    def rows() -> Iterator[Any]:
        while True:
            for item in data:
                yield item["input_ids"].astype(np.int64)

    yield from _batches(rows(), task, 0)


def litdata(folder: Path, task: Task, skip: int) -> Iterator[Any]:
    """litdata with its loader for tokens."""
    from litdata import StreamingDataset  # pyright: ignore[reportMissingImports]
    from litdata.streaming import TokensLoader  # pyright: ignore[reportMissingImports]

    width = task.length + (task.model == "gpt")
    data = StreamingDataset(str(folder), shuffle=True, seed=SEED, item_loader=TokensLoader(block_size=width))

    def rows() -> Iterator[Any]:
        while True:
            yield from data

    yield from _batches(rows(), task, skip)


def write_megatron(folder: Path, num_tokens: int) -> None:
    from bench import megatron

    megatron.write(folder, documents(num_tokens))


def megatron(folder: Path, task: Task, skip: int) -> Iterator[Any]:
    """megatron-core's data sets."""
    from bench import megatron

    tokens = megatron.tokenizer(VOCAB, eod=EOS, pad=PADDING, cls=CLASSIFY, sep=SEPARATE, mask=MASK)
    read = megatron.bert if task.model == "bert" else megatron.gpt
    yield from read(folder, task.length, task.rows, skip, SEED, tokens)


@dataclass(frozen=True)
class Side:
    """A loader, how its data is written, and the package that it needs."""

    read: Callable[[Path, Task, int], Iterator[Any]]
    write: Callable[..., None]
    package: str
    by_width: bool = True
    """Its data is written for a width of rows."""
    models: tuple[str, ...] = ("gpt", "bert")

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


SIDES = {
    "ours": Side(ours, write_ours, "engine", by_width=False),
    "ours with replay": Side(ours_with_replay, write_ours, "engine", by_width=False),
    "datasets map": Side(datasets_map, write_arrow, "datasets"),
    "datasets iterable": Side(datasets_iterable, write_arrow, "datasets"),
    "mosaicml-streaming": Side(mosaic, write_mosaic, "streaming"),
    "litdata": Side(litdata, write_litdata, "litdata"),
    "megatron-core": Side(megatron, write_megatron, "megatron", by_width=False),
    "torch memmap": Side(memmap, write_flat, "torch", by_width=False, models=("gpt",)),
}
