"""A preparation that was interrupted: the next one keeps what is finished, and nothing else is taken for it."""

from dataclasses import replace
from pathlib import Path

import pytest

import engine.corpus.encode
import engine.corpus.encode_sources
import engine.corpus.sources.chunks
from engine.corpus.options import PrepareOptions, Progress
from engine.corpus.prepare import prepare
from engine.corpus.recipe import PLAN_FILE, WORK
from engine.data.shards.dataset import TokenDataset
from engine.errors import DataError
from tests.engine.corpus.outputs import files_of, parts_of, stop_after
from tests.engine.data.corpus import made_up_texts, write_json_lines


@pytest.fixture
def in_parts(options, tmp_path, monkeypatch) -> PrepareOptions:
    """The preparation of four files that make two parts or more each."""
    monkeypatch.setattr(engine.corpus.sources.chunks, "_SHELF_BYTES", 1)
    monkeypatch.setattr(engine.corpus.sources.chunks, "_SMALLEST_CHUNK", 5000)
    paths = [tmp_path / f"large-{number}.jsonl" for number in range(4)]
    for number, path in enumerate(paths):
        write_json_lines(path, made_up_texts(100, number))
    return replace(options, sources=tuple(map(str, paths)))


def test_what_is_finished_is_kept_unless_it_is_damaged(in_parts, tmp_path):
    options = in_parts
    with pytest.raises(KeyboardInterrupt):
        prepare(options, stop_after(3))
    before = parts_of(options.output)
    assert len(before) == 3
    damaged = sorted(before)[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    told: list[Progress] = []

    def until_written(now: Progress) -> None:
        told.append(now)
        if now.doing == "writing shards":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(options, until_written)
    after = parts_of(options.output)
    assert len(after) > 3
    assert {path for path in before if after[path] == before[path]} == set(before) - {damaged}
    assert 0 < told[-2].kept_tokens < told[-2].tokens
    prepare(options)
    prepare(replace(options, output=tmp_path / "at once"))
    assert files_of(options.output) == files_of(tmp_path / "at once")
    assert not (options.output / WORK).exists()


def test_another_command_is_refused_where_one_is_unfinished(in_parts, tmp_path):
    options = in_parts
    with pytest.raises(KeyboardInterrupt):
        prepare(options, stop_after(2))
    for change in ({"sentences": "en"}, {"validation_fraction": 0.3}, {"sources": options.sources[1:]}):
        with pytest.raises(DataError, match="holds an unfinished output of another command:") as caught:
            prepare(replace(options, **change))
        assert next(iter(change)) in str(caught.value)
    prepare(replace(options, sentences="en", overwrite=True))
    assert TokenDataset(options.output / "train").index.has_sentences


def test_parts_without_a_plan_are_of_nobody(in_parts, tmp_path):
    """As when the removal of another command's parts was killed: they may be of another tokenizer or other options."""
    options = in_parts
    with pytest.raises(KeyboardInterrupt):
        prepare(replace(options, sentences="en"), stop_after(2))
    assert parts_of(options.output)
    (options.output / WORK / PLAN_FILE).unlink()
    prepare(options)
    prepare(replace(options, output=tmp_path / "at once"))
    assert files_of(options.output) == files_of(tmp_path / "at once")


def test_a_source_that_was_mended_is_read_again_and_the_others_are_kept(in_parts, tmp_path):
    options = in_parts
    last = Path(options.sources[-1])
    good = last.read_bytes()
    last.write_bytes(good + b"{\n")
    with pytest.raises(DataError, match="is no JSON"):
        prepare(options)
    before = parts_of(options.output)
    last.write_bytes(good)
    told: list[Progress] = []
    prepare(options, told.append)
    assert before
    assert max(now.kept_tokens for now in told) > 0
    prepare(replace(options, output=tmp_path / "at once"))
    assert files_of(options.output) == files_of(tmp_path / "at once")


def test_two_at_once_do_not_mix(options):
    def other(_: Progress) -> None:
        prepare(options)

    with pytest.raises(DataError, match="another preparation is writing to"):
        prepare(options, other)


def test_a_full_disk_is_told_and_what_is_finished_is_kept(in_parts, tmp_path, monkeypatch):
    options = in_parts
    real, saved = engine.corpus.encode.save, []

    def save(path, part, order):
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        saved.append(path)
        real(path, part, order)

    monkeypatch.setattr(engine.corpus.encode, "save", save)
    with pytest.raises(DataError, match="No space left on device") as caught:
        prepare(options)
    assert "the same command goes on where this one stopped" in str(caught.value)
    assert sorted(parts_of(options.output)) == saved
    monkeypatch.setattr(engine.corpus.encode, "save", real)
    prepare(options)


def test_another_command_begins_anew_where_nothing_was_finished(options):
    write_json_lines(Path(options.sources[0]), made_up_texts(50), key="body")
    with pytest.raises(DataError, match="name the key of the text with --text-key"):
        prepare(options)
    prepare(replace(options, text_key="body"))
    assert not (options.output / WORK).exists()
