"""Text becomes the same shards however it is worked on, split by content, and no other output is harmed."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from engine.data.dataset import TokenDataset
from engine.data.prepare import PARTS, RECIPE_FILE, PrepareOptions, Progress, prepare
from engine.data.tokenizer import load_tokenizer
from engine.data.tokenizer_training import train_tokenizer
from engine.errors import ConfigError, DataError
from tests.engine.data.corpus import made_up_texts, write_json_lines


@pytest.fixture
def options(tokenizer_folder, tmp_path) -> PrepareOptions:
    source = write_json_lines(tmp_path / "texts.jsonl", made_up_texts(200))
    return PrepareOptions((str(source),), tokenizer_folder, tmp_path / "out", validation_fraction=0.2, shard_bytes=2000)


def texts_in(folder: Path, tokenizer) -> list[str]:
    """The documents of some shards, by hand: raw tokens split after each end-of-text, decoded."""
    dataset = TokenDataset(folder)
    texts = []
    for number in range(dataset.num_shards):
        ids = dataset.shard(number).tokens.tolist()
        while ids:
            end = ids.index(tokenizer.eos_id)
            texts.append(tokenizer.model.decode(ids[:end]))
            ids = ids[end + 1 :]
    return texts


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


def test_every_document_lands_on_one_side_whole_and_in_order(options):
    prepared = prepare(options)
    tokenizer = load_tokenizer(options.tokenizer)
    train, validation = (texts_in(options.output / part, tokenizer) for part in PARTS)
    texts = made_up_texts(200)
    assert sorted(train + validation) == sorted(texts)
    assert [text for text in texts if text in set(train)] == train
    assert [text for text in texts if text in set(validation)] == validation
    assert 10 < len(validation) < 80
    for part, found in (("train", train), ("validation", validation)):
        assert prepared.parts[part].documents == len(found) == TokenDataset(options.output / part).index.num_documents
        assert prepared.parts[part].text_bytes == sum(len(text.encode()) for text in found)
        assert prepared.parts[part].tokens == TokenDataset(options.output / part).index.num_tokens
    TokenDataset(options.output / "train", tokenizer.hash)


def test_duplicates_land_on_the_same_side(options, tmp_path):
    twice = write_json_lines(tmp_path / "texts.jsonl", made_up_texts(50) * 2)
    prepare(replace(options, sources=(str(twice),)))
    tokenizer = load_tokenizer(options.tokenizer)
    train, validation = (texts_in(options.output / part, tokenizer) for part in PARTS)
    assert validation
    assert not set(train) & set(validation)


def test_the_bytes_do_not_depend_on_workers_or_time(options, tmp_path):
    prepare(options)
    prepare(replace(options, output=tmp_path / "two", workers=2))
    assert files_of(options.output) == files_of(tmp_path / "two")


def test_preparing_the_same_again_verifies_and_keeps(options):
    first = prepare(options)
    before = {path: path.stat().st_mtime_ns for path in options.output.rglob("*")}
    again = prepare(replace(options, workers=2))
    assert (first.was_there, again.was_there) == (False, True)
    assert again.parts == first.parts
    assert {path: path.stat().st_mtime_ns for path in options.output.rglob("*")} == before
    shard = options.output / "train" / "shard-000000.tokens"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match="is truncated"):
        prepare(options)
    assert not prepare(replace(options, overwrite=True)).was_there
    assert prepare(options).was_there


def test_moved_sources_are_the_same_sources(options, tmp_path):
    prepare(options)
    moved = Path(options.sources[0]).rename(tmp_path / "moved.jsonl")
    assert prepare(replace(options, sources=(str(moved),))).was_there


def test_another_output_is_never_touched_unless_told(options, tmp_path):
    prepare(options)
    before = files_of(options.output)
    other = write_json_lines(tmp_path / "other.jsonl", made_up_texts(100, seed=5))
    changed = {
        "shard_bytes: 2000 -> 3000": replace(options, shard_bytes=3000),
        "sources: texts.jsonl -> other.jsonl": replace(options, sources=(str(other),)),
        "validation_fraction: 0.2 -> 0.0": replace(options, validation_fraction=0.0),
    }
    for message, different in changed.items():
        with pytest.raises(DataError, match=re.escape(message)) as caught:
            prepare(different)
        assert "--overwrite" in str(caught.value)
    assert files_of(options.output) == before
    prepare(replace(options, validation_fraction=0.0, overwrite=True))
    assert not (options.output / "validation").exists()


def test_shards_without_a_recipe_and_a_damaged_recipe_are_in_the_way(options):
    prepare(options)
    (options.output / RECIPE_FILE).write_text("{")
    with pytest.raises(DataError, match=r"a prepare\.json that cannot be read"):
        prepare(options)
    (options.output / RECIPE_FILE).unlink()
    with pytest.raises(DataError, match=r"token shards without a prepare\.json in train, validation"):
        prepare(options)


def test_an_attempt_that_failed_is_finished_by_the_next(options, tmp_path):
    good = Path(options.sources[0]).read_text()
    Path(options.sources[0]).write_text(good + "{broken\n")
    with pytest.raises(DataError, match=r"texts\.jsonl:201 is no JSON"):
        prepare(options)
    assert not list(options.output.rglob("*.json"))
    Path(options.sources[0]).write_text(good)
    prepare(options)
    prepare(replace(options, output=tmp_path / "fresh"))
    assert files_of(options.output) == files_of(tmp_path / "fresh")


def test_a_large_vocabulary_is_written_wide(tokenizer_folder, tmp_path):
    """A tokenizer with an id beyond 65,535."""
    wide = tmp_path / "wide"
    wide.mkdir()
    for path in tokenizer_folder.iterdir():
        (wide / path.name).write_bytes(path.read_bytes())
    tree = json.loads((wide / "tokenizer.json").read_text())
    tree["model"]["vocab"] |= {"filler": 66_000}
    (wide / "tokenizer.json").write_text(json.dumps(tree))
    source = write_json_lines(tmp_path / "a.jsonl", made_up_texts(5))
    prepare(PrepareOptions((str(source),), wide, tmp_path / "out", validation_fraction=0))
    assert TokenDataset(tmp_path / "out" / "train").index.dtype == "uint32"
    assert texts_in(tmp_path / "out" / "train", load_tokenizer(wide)) == made_up_texts(5)


def test_progress_rises_to_the_whole(options):
    told: list[Progress] = []
    prepare(options, told.append)
    assert told[-1].documents == 200
    assert told[-1].read_bytes == told[-1].total_bytes == Path(options.sources[0]).stat().st_size
    assert all(a.documents <= b.documents and a.read_bytes <= b.read_bytes for a, b in itertools.pairwise(told))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_fraction": 1.0}, "validation fraction 1.0"),
        ({"validation_fraction": -0.1}, "validation fraction -0.1"),
        ({"workers": 0}, "0 workers"),
        ({"shard_bytes": 0}, "shards of 0 bytes"),
        ({"sources": ()}, "no source is named"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare(replace(options, **change))
    assert not options.output.exists()


@pytest.mark.parametrize(
    ("content", "message"), [("", "there is no text in"), ('{"text": ""}\n', "there is no text in")]
)
def test_empty_input_is_refused(options, content, message):
    Path(options.sources[0]).write_text(content)
    with pytest.raises(DataError, match=message):
        prepare(options)
    assert not list(options.output.rglob("index.json"))


def test_a_side_without_a_document_is_refused(options):
    write_json_lines(Path(options.sources[0]), ["one"])
    with pytest.raises(DataError, match=r"falls into validation with validation fraction 0\.001") as caught:
        prepare(replace(options, validation_fraction=0.001))
    assert "0 holds nothing out" in str(caught.value)


def test_an_output_that_cannot_be_written_is_refused(options):
    options.output.write_text("a file")
    with pytest.raises(DataError, match=r"cannot write to .*out"):
        prepare(options)


def test_a_tokenizer_of_sentencepiece_prepares_too(options, tmp_path):
    folder = tmp_path / "sp"
    tokenizer = train_tokenizer(made_up_texts(200), folder, "sentencepiece-bpe", 430)
    prepare(replace(options, tokenizer=folder))
    train, validation = (texts_in(options.output / part, tokenizer) for part in PARTS)
    assert sorted(train + validation) == sorted(made_up_texts(200))


def test_a_failed_overwrite_gives_the_earlier_output_back(options, tmp_path):
    prepare(options)
    before = files_of(options.output)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"good\n\n\xff\n")
    with pytest.raises(DataError, match="is no UTF-8"):
        prepare(replace(options, sources=(str(bad),), overwrite=True))
    assert files_of(options.output) == before
    assert prepare(options).was_there


def test_sentences_are_kept_on_request_and_the_tokens_stay_the_same(options, tmp_path):
    texts = [f"One {number} is here. Another one? Yes!" for number in range(100)]
    write_json_lines(Path(options.sources[0]), texts)
    prepare(options)
    with pytest.raises(DataError, match=re.escape("sentences: None -> 'en'")):
        prepare(replace(options, sentences="en"))
    prepared = prepare(replace(options, sentences="en", output=tmp_path / "cut"))
    with_them, without = TokenDataset(tmp_path / "cut" / "train"), TokenDataset(options.output / "train")
    assert [shard.tokens for shard in with_them.index.shards] == [shard.tokens for shard in without.index.shards]
    assert (with_them.index.has_sentences, without.index.has_sentences) == (True, False)
    assert with_them.index.num_sentences == prepared.parts["train"].sentences == 3 * with_them.index.num_documents
    assert with_them.fingerprint != without.fingerprint
    shard = with_them.shard(0)
    assert shard.sentences is not None
    assert set(shard.documents) <= set(shard.sentences)
    with pytest.raises(ConfigError, match="sentences in language"):
        prepare(replace(options, sentences="?"))


def test_the_index_knows_the_tokenizers_vocabulary(options):
    prepare(options)
    assert TokenDataset(options.output / "train").index.vocabulary == load_tokenizer(options.tokenizer).vocabulary
