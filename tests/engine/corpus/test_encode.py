"""A chunk becomes the tokens that the tokenizer gives, with all that is asked of its documents."""

import numpy as np
import pytest
import xxhash

import engine.corpus.encode
import engine.corpus.encoded_chunks
from engine.corpus.encode import EncodeOptions, Task, belongs_to_validation, encode, encode_to_file
from engine.corpus.encoded_chunks import Records, load, read, record_begins, save
from engine.corpus.sources.chunks import TextChunk
from engine.corpus.spread import stored_order
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import DataError
from tests.engine.data.corpus import made_up_texts


def chunk_of(texts):
    return TextChunk("text", [("made up", number, text.encode()) for number, text in enumerate(texts, 1)], 5)


def test_documents_are_what_the_tokenizer_gives(tokenizer_folder):
    tokenizer, texts = load_tokenizer(tokenizer_folder), made_up_texts(50)
    part = encode(chunk_of(texts), tokenizer, EncodeOptions("text", 0.3))
    documents = np.split(part.tokens, np.cumsum(part.documents.lengths)[:-1])
    assert [item.tolist() for item in documents] == [[*i.tolist(), tokenizer.eos_id] for i in tokenizer.encode(texts)]
    assert part.tokens.dtype == np.uint16
    assert part.documents.text_bytes.tolist() == [len(text.encode()) for text in texts]
    digests = [xxhash.xxh3_128_intdigest(text.encode()) for text in texts]
    assert [(int(high) << 64) + int(low) for high, low in part.documents.hashes] == digests
    assert part.documents.is_validation.tolist() == [belongs_to_validation(text.encode(), 0.3) for text in texts]
    assert part.bands.shape == (50, 0)


def test_documents_without_a_token_are_left_out_and_counted(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    part = encode(chunk_of(["a", "", "b", ""]), tokenizer, EncodeOptions("text", 0.0))
    assert (part.documents.lengths.size, int(part.documents.empty)) == (2, 2)
    nothing = encode(chunk_of([""]), tokenizer, EncodeOptions("text", 0.0, "en", similarity=0.8))
    assert nothing.tokens.size == nothing.documents.lengths.size == 0


def test_batches_of_the_tokenizer_change_nothing(tokenizer_folder, monkeypatch):
    tokenizer, texts = load_tokenizer(tokenizer_folder), made_up_texts(50)
    at_once = encode(chunk_of(texts), tokenizer, EncodeOptions("text", 0.3, "en"))
    monkeypatch.setattr(engine.corpus.encode, "_CHARACTERS_AT_ONCE", 100)
    in_batches = encode(chunk_of(texts), tokenizer, EncodeOptions("text", 0.3, "en"))
    assert np.array_equal(at_once.tokens, in_batches.tokens)
    assert np.array_equal(at_once.sentence_starts, in_batches.sentence_starts)


def test_a_part_comes_back_from_its_file_or_not_at_all(tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder)
    options = EncodeOptions("text", 0.3, "en", similarity=0.8)
    chunk = chunk_of(["One. Two.", "Three"])
    task = Task(chunk, tokenizer_folder, tokenizer.hash, options, tmp_path / "a.part", (0, 0), 7)
    encoded = encode_to_file(task)
    assert (encoded.file_number, encoded.read_bytes) == (7, 5)
    part, found = encode(chunk, tokenizer, options), load(tmp_path / "a.part")
    assert found is not None
    documents, bands = found
    assert documents.lengths.tolist() == part.documents.lengths.tolist()
    assert documents.sentences.tolist() == [2, 1]
    assert np.array_equal(bands, part.bands)
    content = (tmp_path / "a.part").read_bytes()
    for damaged in (b"", content[:10], content[:-1], content[:50] + b"?" + content[51:]):
        (tmp_path / "a.part").write_bytes(damaged)
        assert load(tmp_path / "a.part") is None


@pytest.mark.parametrize("language", [None, "en"])
def test_documents_of_a_part_are_read_one_by_one_and_verified(tokenizer_folder, tmp_path, monkeypatch, language):
    monkeypatch.setattr(engine.corpus.encoded_chunks, "_LARGEST_GAP_BYTES", 100)  # several stretches
    tokenizer, texts = load_tokenizer(tokenizer_folder), [f"One. {text} Two." for text in made_up_texts(60)]
    part = encode(chunk_of(texts), tokenizer, EncodeOptions("text", 0.3, language))
    order = stored_order((3, 5), part.documents.is_validation)
    assert part.documents.is_validation[order].tolist() == sorted(part.documents.is_validation)
    save(tmp_path / "a.part", part, order)
    begins = record_begins(part.documents, order, part.tokens.itemsize)
    wanted = order[::7]
    lengths, sentences = part.documents.lengths, part.documents.sentences
    records = Records(
        tmp_path / "a.part", begins[wanted], lengths[wanted], sentences[wanted], np.zeros(wanted.size, np.int64)
    )
    ids = np.split(part.tokens, np.cumsum(lengths)[:-1])
    starts = np.split(part.sentence_starts, np.cumsum(sentences)[:-1])
    found = list(read(records, part.tokens.dtype))
    assert [(a.tolist(), b.tolist()) for a, b, _ in found] == [(ids[i].tolist(), starts[i].tolist()) for i in wanted]
    content = bytearray((tmp_path / "a.part").read_bytes())
    content[int(begins[wanted[2]]) + 9] ^= 1
    (tmp_path / "a.part").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.part is damaged or gone"):
        list(read(records, part.tokens.dtype))
    (tmp_path / "a.part").write_bytes(content[:100])
    with pytest.raises(DataError, match=r"a\.part is damaged or gone"):
        list(read(records, part.tokens.dtype))


def test_a_part_that_cannot_be_written_is_told(tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder)
    task = Task(
        chunk_of(["a"]), tokenizer_folder, tokenizer.hash, EncodeOptions("text", 0.0), tmp_path / "no" / "a", (0, 0), 0
    )
    with pytest.raises(DataError, match="cannot write"):
        encode_to_file(task)


def test_the_held_out_part_follows_the_text_alone_and_has_its_share():
    texts = [str(number).encode() for number in range(20_000)]
    is_validation = [belongs_to_validation(text, 0.1) for text in texts]
    assert is_validation == [xxhash.xxh3_64(text).intdigest() / 2**64 < 0.1 for text in texts]
    # binomial: standard deviation sqrt(n p (1 - p)), five of them
    assert abs(sum(is_validation) - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    # a larger share holds out the same documents and more
    assert all(belongs_to_validation(text, 0.2) for text, out in zip(texts, is_validation, strict=True) if out)
    assert not any(belongs_to_validation(text, 0.0) for text in texts)
