"""Our files are Megatron's byte for byte, theirs become shards where they lie, and damage of either is found.

The layout is written out here a second time, from megatron-core's documentation; where megatron-core is installed, its
own reader and builder are asked, too.
"""

import re
import struct

import numpy as np
import pytest

from engine.corpus.megatron_import import import_megatron
from engine.data.loader import Loader
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.megatron import prefix_of, read_sequences, write_indexed_dataset
from engine.data.shards.writer import ShardWriter
from engine.data.stream import Stream
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import DataError
from tests.engine.data.corpus import EOS, made_up_documents, write_shards

CODES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}


def write_by_hand(prefix, documents, dtype="int32", lengths=None):
    """A set as Megatron's preprocessing writes it: `documents` are lists of sequences."""
    sequences = [np.asarray(sequence, dtype) for document in documents for sequence in document]
    prefix.with_name(f"{prefix.name}.bin").write_bytes(b"".join(item.tobytes() for item in sequences))
    sizes = [item.size for item in sequences] if lengths is None else lengths
    places, at = [], 0
    for size in sizes:
        places.append(at)
        at += size * np.dtype(dtype).itemsize
    ends = [0]
    for document in documents:
        ends.append(ends[-1] + len(document))
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sizes), len(ends))
    idx += struct.pack(f"<{len(sizes)}i{len(places)}q{len(ends)}q", *sizes, *places, *ends)
    prefix.with_name(f"{prefix.name}.idx").write_bytes(idx)
    return prefix


def files(prefix):
    return [prefix.with_name(f"{prefix.name}.{suffix}").read_bytes() for suffix in ("bin", "idx")]


def split(document):
    """Two sentences, where there is room."""
    return [document[:2], document[2:]] if document.size > 2 else [document]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, "uint16"), (65499, "uint16"), (65500, "int32")])
@pytest.mark.parametrize("with_sentences", [False, True])
def test_the_files_are_those_that_megatron_writes(tmp_path, vocab_size, dtype, with_sentences):
    documents = made_up_documents(50)
    with ShardWriter(tmp_path / "ours", vocab_size, EOS, "hash", 600) as writer:
        for document in documents:
            starts = np.array([0, 2]) if document.size > 2 else np.array([0])
            writer.add(document, starts if with_sentences else None)
    write_indexed_dataset(TokenDataset(tmp_path / "ours"), tmp_path / "theirs")
    by_hand = write_by_hand(
        tmp_path / "by_hand", [split(document) if with_sentences else [document] for document in documents], dtype
    )
    assert files(tmp_path / "theirs") == files(by_hand)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "by_hand.bin",
        "by_hand.idx",
        "ours",
        *(
            "theirs.bin",
            "theirs.idx",
        ),
    ]


def test_megatron_core_agrees(tmp_path):
    """Its builder writes the same bytes, its reader reads ours, and we read its."""
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    import torch

    documents = made_up_documents(30)
    builder = module.IndexedDatasetBuilder(str(tmp_path / "built.bin"), np.uint16)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [part.size for part in split(document)])
    builder.finalize(str(tmp_path / "built.idx"))
    with ShardWriter(tmp_path / "ours", 1000, EOS, "hash", 600) as writer:
        for document in documents:
            writer.add(document, np.array([0, 2]) if document.size > 2 else np.array([0]))
    write_indexed_dataset(TokenDataset(tmp_path / "ours"), tmp_path / "theirs")
    assert files(tmp_path / "theirs") == files(tmp_path / "built")
    read = module.IndexedDataset(str(tmp_path / "theirs"))
    assert np.array_equal(np.concatenate([read[i] for i in range(len(read))]), np.concatenate(documents))
    assert read_sequences(tmp_path / "built").lengths.tolist() == read.sequence_lengths.tolist()


@pytest.fixture
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


def made_up(tokenizer, count=60):
    return [np.where(document >= tokenizer.vocab_size, 7, document) for document in made_up_documents(count)]


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_a_set_is_trained_on_where_it_lies_as_if_it_had_been_prepared(tmp_path, tokenizer, dtype):
    documents = made_up(tokenizer)
    assert tokenizer.eos_id == EOS
    (tmp_path / "theirs").mkdir()
    prefix = write_by_hand(tmp_path / "theirs" / "set", [[document] for document in documents], dtype)
    index = import_megatron(prefix, tokenizer, tmp_path / "taken", shard_bytes=400 * np.dtype(dtype).itemsize)
    assert index.num_bytes > sum(path.stat().st_size for path in (tmp_path / "taken").glob("shard-*"))
    assert not list((tmp_path / "taken").glob("*.tokens"))
    taken = TokenDataset(tmp_path / "taken", tokenizer.hash)
    assert taken.index.vocabulary == tokenizer.vocabulary
    prepared = write_shards(tmp_path / "prepared", documents, 400, tokenizer.vocab_size)
    assert taken.num_shards == prepared.num_shards > 3
    one, other = (Loader(Stream(dataset, 16, 8, 5, 2, "document")) for dataset in (taken, prepared))
    for _ in range(30):
        [a], [b] = one.step(0, 1, 8), other.step(0, 1, 8)
        assert all(np.array_equal(a.inputs[name], b.inputs[name]) for name in b.inputs)
    (tmp_path / "moved").mkdir()
    for name in ("theirs", "taken"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    TokenDataset(tmp_path / "moved" / "taken").verify()


def test_sentences_come_along_and_there_and_back_is_the_same(tmp_path, tokenizer):
    documents = made_up(tokenizer)
    prefix = write_by_hand(tmp_path / "set", [split(document) for document in documents], "uint16")
    import_megatron(prefix, tokenizer, tmp_path / "taken", shard_bytes=800)
    taken = TokenDataset(tmp_path / "taken")
    assert taken.index.has_sentences
    assert taken.index.num_sentences == sum(len(split(document)) for document in documents)
    write_indexed_dataset(taken, tmp_path / "again")
    assert files(tmp_path / "again") == files(prefix)


def test_a_bin_that_changes_later_is_a_damaged_shard(tmp_path, tokenizer):
    prefix = write_by_hand(tmp_path / "set", [[document] for document in made_up(tokenizer)], "uint16")
    import_megatron(prefix, tokenizer, tmp_path / "taken", shard_bytes=800)
    path = tmp_path / "set.bin"
    content = path.read_bytes()
    path.write_bytes(content + b"more")
    TokenDataset(tmp_path / "taken").verify()  # what was taken over still stands
    path.write_bytes(content[:900] + bytes([content[900] ^ 1]) + content[901:])
    with pytest.raises(DataError, match=r"set\.bin is damaged"):
        TokenDataset(tmp_path / "taken").verify()
    path.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"set\.bin is truncated"):
        TokenDataset(tmp_path / "taken").verify()
    path.unlink()
    with pytest.raises(DataError, match=r"set\.bin is missing"):
        TokenDataset(tmp_path / "taken").verify()


def test_sets_that_do_not_fit_are_refused(tmp_path, tokenizer):
    def taken(documents):
        import_megatron(write_by_hand(tmp_path / "set", documents), tokenizer, tmp_path / "taken")

    with pytest.raises(DataError, match=r"1 of 2 documents .* do not end with token 0") as caught:
        taken([[[1, 2, 0]], [[3, 4]]])
    assert "--append-eod" in str(caught.value)
    with pytest.raises(DataError, match=r"holds tokens 0 to 5000, tokenizer .* has 300"):
        taken([[[5000, 0]]])
    with pytest.raises(DataError, match="holds no token"):
        taken([])
    assert not (tmp_path / "taken" / "index.json").exists()
    taken([[], [[5, 0]], []])  # empty documents are none
    assert TokenDataset(tmp_path / "taken").index.num_documents == 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda idx: b"GARBAGE" + idx[7:], "is no index of Megatron's: it begins with b'GARBAGE"),
        (lambda idx: b"", "is no index of Megatron's"),
        (lambda idx: idx[:9] + struct.pack("<Q", 2) + idx[17:], "has version 2 and dtype code 4 (int32)"),
        (lambda idx: idx[:17] + b"\x07" + idx[18:], "dtype code 7 (float32)"),
        (lambda idx: idx[:17] + b"\x63" + idx[18:], "dtype code 99 (unknown)"),
        (lambda idx: idx[:-1], "is truncated"),
        (lambda idx: idx[:34] + struct.pack("<i", 9) + idx[38:], "contradicts itself"),
        (lambda idx: idx[:-8] + struct.pack("<q", 1), "contradicts itself"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, edit, message):
    write_by_hand(tmp_path / "set", [[[1, 2, 0]], [[3, 0]]])
    path = tmp_path / "set.idx"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(DataError, match=re.escape(message)):
        read_sequences(tmp_path / "set")


def test_files_that_are_gone_or_of_another_size_are_named(tmp_path):
    write_by_hand(tmp_path / "set", [[[1, 2, 0]]])
    (tmp_path / "set.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"set\.bin has 4 bytes\n.*12 bytes, as set\.idx has it"):
        read_sequences(tmp_path / "set")
    (tmp_path / "set.bin").unlink()
    with pytest.raises(DataError, match=r"set\.bin cannot be read: No such file"):
        read_sequences(tmp_path / "set")
    with pytest.raises(DataError, match=r"other\.idx cannot be read: No such file"):
        read_sequences(tmp_path / "other")
    assert prefix_of(tmp_path / "set.bin") == prefix_of(tmp_path / "set.idx") == prefix_of(tmp_path / "set")


def test_a_place_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    dataset = write_shards(tmp_path / "ours", made_up_documents(5))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*set\.bin and \.idx: File exists"):
        write_indexed_dataset(dataset, tmp_path / "file" / "set")
