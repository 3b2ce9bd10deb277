"""Encoding gives the same documents with any number of workers, and errors come through from them."""

import os

import pytest
import xxhash

from engine.data import encode as encode_module
from engine.data.encode import EncodeOptions, available_cpus, encode_chunks, is_held_out
from engine.data.sources import Chunk
from engine.data.tokenizer import load_tokenizer
from engine.errors import DataError, EnvironmentProblem
from tests.engine.data.corpus import made_up_texts


def chunks(texts, size=7):
    for start in range(0, len(texts), size):
        items = [(start + i + 1, text.encode()) for i, text in enumerate(texts[start : start + size])]
        yield Chunk("made up", "text", items, start)


def flat(encoded):
    return [
        (ids.tolist(), held_out, size)
        for chunk in encoded
        for ids, held_out, size in zip(chunk.ids, chunk.held_out, chunk.text_bytes, strict=True)
    ]


def test_workers_change_nothing(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = made_up_texts(120)
    alone = flat(encode_chunks(chunks(texts), tokenizer, EncodeOptions("text", 0.3), workers=1))
    assert flat(encode_chunks(chunks(texts), tokenizer, EncodeOptions("text", 0.3), workers=2)) == alone
    assert [ids for ids, _, _ in alone] == [[*ids.tolist(), tokenizer.eos_id] for ids in tokenizer.encode(texts)]
    assert [size for _, _, size in alone] == [len(text.encode()) for text in texts]


def test_documents_without_a_token_are_left_out_and_counted(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    [encoded] = encode_chunks(chunks(["a", "", "b", ""]), tokenizer, EncodeOptions("text", 0.0), workers=1)
    assert (len(encoded.ids), encoded.empty_documents) == (2, 2)


def test_the_held_out_part_follows_the_text_alone_and_has_its_share():
    texts = [str(number).encode() for number in range(20_000)]
    held_out = [is_held_out(text, 0.1) for text in texts]
    assert held_out == [xxhash.xxh3_64(text).intdigest() / 2**64 < 0.1 for text in texts]
    # binomial: standard deviation sqrt(n p (1 - p)), five of them
    assert abs(sum(held_out) - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    # a larger share holds out the same documents and more
    assert all(is_held_out(text, 0.2) for text, out in zip(texts, held_out, strict=True) if out)
    assert not any(is_held_out(text, 0.0) for text in texts)


def test_an_error_in_a_worker_comes_through_whole(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    bad = [*chunks(made_up_texts(10)), Chunk("here", "text", [(4, b"\xff")], 0)]
    with pytest.raises(DataError, match="here:4 is no UTF-8") as caught:
        list(encode_chunks(bad, tokenizer, EncodeOptions("text", 0.0), workers=2))
    assert caught.value.remedy


def die(*_):
    os._exit(1)


def test_a_worker_that_dies_is_told(tokenizer_folder, monkeypatch):
    monkeypatch.setattr(encode_module, "_encode_in_worker", die)
    with pytest.raises(EnvironmentProblem, match="a worker process died") as caught:
        list(encode_chunks(chunks(["a"]), load_tokenizer(tokenizer_folder), EncodeOptions("text", 0.0), workers=2))
    assert "fewer --workers" in str(caught.value)


def test_there_is_a_cpu():
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)
