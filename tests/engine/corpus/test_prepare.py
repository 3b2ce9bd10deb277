"""Text becomes the same shards however it is worked on, split by content, and no other output is harmed."""

import itertools
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import engine.corpus.encode
import engine.corpus.encode_sources
import engine.corpus.sources.chunks
from engine.corpus.encode import belongs_to_validation
from engine.corpus.options import PrepareOptions, Progress
from engine.corpus.pool import Pool, workers
from engine.corpus.prepare import prepare
from engine.corpus.recipe import RECIPE_FILE
from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.folders import PARTS
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import ConfigError, DataError
from tests.engine.corpus.outputs import files_of, parts_of, stop_after, texts_in
from tests.engine.data.corpus import made_up_texts, write_json_lines
from tests.engine.data.tokenizer import foreign


def test_every_document_lands_on_one_side_and_whole(options):
    prepared = prepare(options)
    tokenizer = load_tokenizer(options.tokenizer)
    train, validation = (texts_in(options.output / part, tokenizer) for part in PARTS)
    texts = made_up_texts(200)
    assert sorted(train + validation) == sorted(texts)
    assert sorted(validation) == sorted(text for text in texts if belongs_to_validation(text.encode(), 0.2))
    assert 10 < len(validation) < 80
    for part, found in (("train", train), ("validation", validation)):
        assert prepared.parts[part].documents == len(found) == TokenDataset(options.output / part).index.num_documents
        assert prepared.parts[part].text_bytes == sum(len(text.encode()) for text in found)
        assert prepared.parts[part].tokens == TokenDataset(options.output / part).index.num_tokens
    TokenDataset(options.output / "train", tokenizer.hash)


def test_workers_load_what_their_work_needs_and_no_more(options):
    """They start for every preparation, and again for its first item they load the module that holds its function."""
    modules = set()

    class Noting(Pool):
        def run(self, function, items):
            modules.add(function.__module__)
            return super().run(function, items)

    prepare(options, pool=Noting(1))
    assert len(modules) == 3
    asked = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "datasets", "pyarrow", "fsspec", "pydantic", "typer"}
    heavy.add("engine.corpus.prepare")
    assert not heavy & set(done.stdout.split())


def test_duplicates_land_on_the_same_side(options, tmp_path):
    twice = write_json_lines(tmp_path / "texts.jsonl", made_up_texts(50) * 2)
    prepare(replace(options, sources=(str(twice),)))
    tokenizer = load_tokenizer(options.tokenizer)
    train, validation = (texts_in(options.output / part, tokenizer) for part in PARTS)
    assert validation
    assert not set(train) & set(validation)


def test_the_bytes_do_not_depend_on_workers_or_time(options, tmp_path):
    prepare(options)
    with workers(2) as pool:
        assert pool is not None
        prepare(replace(options, output=tmp_path / "two"), pool=pool)
    assert files_of(options.output) == files_of(tmp_path / "two")


def test_preparing_the_same_again_verifies_and_keeps(options):
    first = prepare(options)
    before = {path: path.stat().st_mtime_ns for path in options.output.rglob("*")}
    again = prepare(options)
    assert (first.was_there, again.was_there) == (False, True)
    assert again.parts == first.parts
    assert {path: path.stat().st_mtime_ns for path in options.output.rglob("*")} == before
    shard = options.output / "train" / "shard-000000.tokens"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match="is truncated"):
        prepare(options)
    assert not prepare(replace(options, overwrite=True)).was_there
    assert prepare(options).was_there


def test_an_output_in_the_order_of_earlier_versions_is_kept(options):
    prepare(options)
    tree = json.loads((options.output / RECIPE_FILE).read_bytes())
    del tree["recipe"]["order"]
    (options.output / RECIPE_FILE).write_text(json.dumps(tree))
    assert prepare(options).was_there


@pytest.mark.parametrize("name", ["ours", "T5"])
def test_an_output_of_an_earlier_version_counts_unless_that_read_special_tokens_out_of_text(options, name, tmp_path):
    if name == "T5":
        texts = write_json_lines(tmp_path / "letters.jsonl", ["the rank</s>"] * 50)
        folder = foreign.class_folder("T5", tmp_path / "t5")
        options = replace(options, tokenizer=folder, sources=(str(texts),), validation_fraction=0)
    prepare(options)
    path = options.output / RECIPE_FILE
    tree = json.loads(path.read_text())
    del tree["recipe"]["special_tokens_in_text"]
    path.write_text(json.dumps(tree))
    if name == "ours":
        assert prepare(options).was_there
        return
    with pytest.raises(DataError, match="special_tokens_in_text: None -> 'spelt'"):
        prepare(options)


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
    assert not files_of(options.output)
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
    assert sorted(texts_in(tmp_path / "out" / "train", load_tokenizer(wide))) == sorted(made_up_texts(5))


def test_progress_rises_to_the_whole(options):
    told: list[Progress] = []
    prepare(options, told.append)
    reading = [now for now in told if now.doing == "encoding"]
    assert reading[-1].documents == 200
    assert reading[-1].done == reading[-1].total == Path(options.sources[0]).stat().st_size
    assert told[-1].done == told[-1].total == len(list(options.output.rglob("*.tokens")))
    for doing in {now.doing for now in told}:
        same = [now for now in told if now.doing == doing]
        assert all(a.documents <= b.documents and a.done <= b.done for a, b in itertools.pairwise(same))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0"),
        ({"validation_fraction": -0.1}, "--validation-fraction -0.1"),
        ({"similarity": 0.0}, "--similarity 0.0"),
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


def test_a_domain_of_duplicates_alone_is_told_apart_from_too_little_text(options):
    [source] = options.sources
    doubled = replace(options, sources=(f"a={source}", f"b={source}"), deduplicate="exact")
    with pytest.raises(DataError, match=r"all documents of train/b have duplicates before them: \d+ exact, 0 near"):
        prepare(doubled)


def test_an_output_that_cannot_be_written_is_refused(options):
    options.output.write_text("a file")
    with pytest.raises(DataError, match=r"cannot write to .*out"):
        prepare(options)


def test_an_output_that_cannot_be_written_is_told_before_the_sources_are_read(options, monkeypatch):
    options.output.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != options.output)

    class Unused(Pool):
        def run(self, function, items):
            raise AssertionError("the sources were read")

    with pytest.raises(DataError, match=r"cannot write to .*out: Permission denied"):
        prepare(options, pool=Unused(1))


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


def test_compressed_output_is_the_same_data(options, tmp_path):
    prepare(options)
    prepare(replace(options, output=tmp_path / "packed", compression="zstd"))
    packed, plain = (TokenDataset(folder / "train") for folder in (tmp_path / "packed", options.output))
    assert packed.fingerprint == plain.fingerprint
    assert packed.index.stored_bytes < plain.index.stored_bytes
    with pytest.raises(DataError, match="compression: 'zstd' -> 'none'"):
        prepare(replace(options, output=tmp_path / "packed"))


def test_domains_have_folders_of_their_own(options, tmp_path):
    other = write_json_lines(tmp_path / "other.jsonl", made_up_texts(100, seed=5))
    named = replace(options, sources=(f"one={options.sources[0]}", f"two={other}"))
    prepared = prepare(named)
    assert list(prepared.parts) == ["train/one", "validation/one", "train/two", "validation/two"]
    tokenizer = load_tokenizer(options.tokenizer)
    for name, texts in (("one", made_up_texts(200)), ("two", made_up_texts(100, seed=5))):
        found = [text for part in PARTS for text in texts_in(options.output / part / name, tokenizer)]
        assert sorted(found) == sorted(texts)
    with pytest.raises(DataError, match="token shards made otherwise"):
        prepare(replace(named, sources=(f"three={options.sources[0]}", f"two={other}")))
    with pytest.raises(ConfigError, match="some sources have a domain and others not"):
        prepare(replace(named, sources=(f"one={options.sources[0]}", str(other))))
    prepare(replace(options, overwrite=True))
    assert sorted(path.name for path in (options.output / "train").iterdir() if path.is_dir()) == []


def test_the_same_text_comes_once_on_request(options, tmp_path):
    texts = made_up_texts(50)
    first = write_json_lines(tmp_path / "texts.jsonl", [*texts, *texts[:20]])
    second = write_json_lines(tmp_path / "second.jsonl", [*texts[40:], "only here"])
    named = replace(options, sources=(f"a={first}", f"b={second}"), validation_fraction=0.0)
    assert prepare(named).parts["train/a"].documents == 70
    prepared = prepare(replace(named, deduplicate="exact", output=tmp_path / "once"))
    tokenizer = load_tokenizer(options.tokenizer)
    assert sorted(texts_in(tmp_path / "once" / "train" / "a", tokenizer)) == sorted(texts)
    assert texts_in(tmp_path / "once" / "train" / "b", tokenizer) == ["only here"]
    assert [part.exact_duplicates for part in prepared.parts.values()] == [20, 10]


def test_nearly_the_same_text_comes_once_whatever_the_workers(options, tmp_path):
    long = [" ".join(made_up_texts(40, seed)) for seed in range(30)]
    nearly = [text + " and an end" for text in long[:12]]
    write_json_lines(Path(options.sources[0]), [*long, *nearly, long[0]])
    near = replace(options, deduplicate="near")
    prepared = prepare(near)
    assert sum(part.near_duplicates for part in prepared.parts.values()) == 12
    assert sum(part.exact_duplicates for part in prepared.parts.values()) == 1
    tokenizer = load_tokenizer(options.tokenizer)
    assert sorted(text for part in PARTS for text in texts_in(options.output / part, tokenizer)) == sorted(long)
    with workers(2) as pool:
        assert pool is not None
        prepare(replace(near, output=tmp_path / "two"), pool=pool)
    assert files_of(options.output) == files_of(tmp_path / "two")


def test_a_shelf_of_small_files_makes_one_part(options, tmp_path):
    (tmp_path / "many").mkdir()
    for number, text in enumerate(made_up_texts(100)):
        (tmp_path / "many" / f"{number:03d}.txt").write_text(text)
    options = replace(options, sources=(str(tmp_path / "many"),))
    with pytest.raises(KeyboardInterrupt):
        prepare(options, stop_after(2))
    assert len(parts_of(options.output)) == 1
    prepare(options)
    (tmp_path / "many" / "050.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"050\.txt:1 is no UTF-8"):
        prepare(replace(options, output=tmp_path / "bad"))


def test_foreign_files_are_not_written_among(options, tmp_path):
    options.output.mkdir()
    (options.output / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"out holds thesis\.txt, which no preparation wrote"):
            prepare(replace(options, overwrite=overwrite))
    assert [path.name for path in options.output.iterdir()] == ["thesis.txt"]
    (options.output / "thesis.txt").rename(options.output / ".hidden")
    prepare(options)
    (options.output / "notes.txt").write_text("about what was prepared here")
    assert prepare(options).was_there
    assert not prepare(replace(options, overwrite=True)).was_there


@pytest.mark.parametrize("blank_line_ends", [False, True])
def test_what_a_refusal_advises_is_not_refused(options, tmp_path, blank_line_ends):
    """One document cannot lie on both sides; each remedy that is named works as it is, with no --overwrite."""
    source = tmp_path / "book.txt"
    source.write_text("\n\n".join(made_up_texts(100)))
    book = replace(options, sources=(str(source),))
    with pytest.raises(DataError, match=r"none of 1 documents of .* falls into validation") as caught:
        prepare(book)
    assert "--blank-line-ends if an empty line ends a document" in caught.value.remedy
    assert "--validation-fraction 0 holds nothing out" in caught.value.remedy
    prepare(replace(book, blank_line_ends=True) if blank_line_ends else replace(book, validation_fraction=0.0))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_the_memory_for_a_document_that_is_longer_than_a_chunk_is_told(options, tmp_path, monkeypatch, caplog, suffix):
    monkeypatch.setattr(engine.corpus.encode_sources, "LARGEST_CHUNK", 1 << 16)
    monkeypatch.setattr(logging.getLogger("palimpsest"), "propagate", True)
    text = " ".join(made_up_texts(10_000))[: 1 << 18]
    path = tmp_path / f"long.{suffix}"
    path.write_text(text if suffix == "txt" else json.dumps({"text": text}) + "\n")
    prepare(replace(options, sources=(str(path),), output=tmp_path / "out", validation_fraction=0.0))
    [told] = [record.getMessage() for record in caplog.records if "encoded whole" in record.getMessage()]
    assert told.startswith(f"{path}:1 is a document of 0 MiB")
