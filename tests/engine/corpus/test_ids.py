"""Ids of documents stay with their documents, through duplicates, held-out documents, sentences, workers and kills."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

import engine.corpus.encode_sources
import engine.corpus.sources.chunks
from engine.corpus.options import PrepareOptions
from engine.corpus.pool import workers
from engine.corpus.prepare import prepare
from engine.corpus.sources.chunks import id_text
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.folders import PARTS
from engine.data.shards.index import FILE, read_index
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import ConfigError, DataError
from tests.engine.data.corpus import made_up_texts, write_json_lines

STRANGE = ["a\nb", 'quote " and \\', "日本 😀", " blank ", "\u2028", "x" * 5000]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(texts: list[str]) -> list[dict]:
    """Numbers, floats, true, and text of any kind as ids."""
    ids = [*STRANGE, 0, 1.5, True, -7, *(f"doc-{number}" for number in range(10, len(texts)))]
    return [{"text": text, "meta": {"a": 1}, "id": found} for text, found in zip(texts, ids, strict=True)]


def as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@pytest.fixture
def options(tokenizer_folder, tmp_path) -> PrepareOptions:
    source = write_rows(tmp_path / "texts.jsonl", rows_of(made_up_texts(200)))
    return PrepareOptions(
        (str(source),), tokenizer_folder, tmp_path / "out", validation_fraction=0.2, shard_bytes=2000, id_key="id"
    )


def by_id(output: Path, tokenizer) -> dict[str, str]:
    """The text of each id, by hand from the raw files: lines of JSON beside the documents' tokens."""
    found = {}
    for part in PARTS:
        for shard in read_index(output / part).shards:
            assert shard.ids is not None
            assert shard.ids.file == shard.tokens.file.replace("tokens", "ids")
            names = [json.loads(line) for line in (output / part / shard.ids.file).read_text().split("\n")[:-1]]
            dataset = TokenDataset(output / part)
            number = [entry.tokens.file for entry in dataset.index.shards].index(shard.tokens.file)
            assert dataset.ids(number) == names
            tokens, bounds = dataset.shard(number).tokens.tolist(), dataset.shard(number).documents.tolist()
            assert len(names) == len(bounds) - 1
            for name, first, end in zip(names, bounds[:-1], bounds[1:], strict=True):
                found[name] = tokenizer.model.decode(tokens[first : end - 1])
    return found


def test_every_document_has_its_id_on_either_side(options):
    prepare(options)
    tokenizer = load_tokenizer(options.tokenizer)
    expected = {as_text(row["id"]): row["text"] for row in rows_of(made_up_texts(200))}
    assert by_id(options.output, tokenizer) == expected
    for part in PARTS:
        TokenDataset(options.output / part).verify()
    # not one token, and so no order, differs from a preparation without ids
    prepare(replace(options, output=options.output.with_name("plain"), id_key=None))
    for part in PARTS:
        one, other = (read_index(folder / part) for folder in (options.output, options.output.with_name("plain")))
        assert one.fingerprint == other.fingerprint
        assert other.shards[0].ids is None
        assert "ids" not in (options.output.with_name("plain") / part / FILE).read_text()


def test_ids_survive_duplicates_sentences_workers_and_compression(options, tmp_path):
    texts = made_up_texts(200)
    doubled = [*rows_of(texts), *({"text": text, "id": f"again-{n}"} for n, text in enumerate(texts[:50]))]
    source = write_rows(tmp_path / "doubled.jsonl", doubled)
    how = replace(options, sources=(str(source),), deduplicate="near", sentences="en", similarity=0.9)
    prepare(how)
    expected = {as_text(row["id"]): row["text"] for row in rows_of(texts)}
    found = by_id(options.output, load_tokenizer(options.tokenizer))
    assert found.keys() <= expected.keys()  # the first of equal ones stays, with its own id
    assert len(found) > 150
    assert all(expected[name] == text for name, text in found.items())
    with workers(2) as pool:
        assert pool is not None
        prepare(replace(how, output=tmp_path / "two"), pool=pool)
    for path in sorted((options.output / "train").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "train" / path.name).read_bytes()
    prepare(replace(how, output=tmp_path / "packed", compression="zstd"))
    plain, packed = (TokenDataset(folder / "train") for folder in (options.output, tmp_path / "packed"))
    assert [plain.ids(n) for n in range(plain.num_shards)] == [packed.ids(n) for n in range(packed.num_shards)]


def test_ids_survive_a_kill(options, tmp_path, monkeypatch):
    files = [write_json_lines(tmp_path / f"{n}.jsonl", [f"{text} {n}" for text in made_up_texts(30)]) for n in range(3)]
    for n, path in enumerate(files):
        rows = [json.loads(line) | {"id": f"{n}/{k}"} for k, line in enumerate(path.read_text().splitlines())]
        write_rows(path, rows)
    # a source of its own kind each: three part files
    monkeypatch.setattr(engine.corpus.sources.chunks, "_SHELF_BYTES", 1)
    how = replace(options, sources=tuple(map(str, files)))
    real, calls = engine.corpus.encode_sources.encode_to_file, []

    def killed(task):
        calls.append(task.path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(task)

    monkeypatch.setattr(engine.corpus.encode_sources, "encode_to_file", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(how)
    monkeypatch.setattr(engine.corpus.encode_sources, "encode_to_file", real)
    prepare(how)
    assert len(calls) == 3
    prepare(replace(how, output=tmp_path / "whole"))
    for path in sorted((options.output / "train").iterdir()):
        assert path.read_bytes() == (tmp_path / "whole" / "train" / path.name).read_bytes()


def test_columns_of_tables_give_ids(options, tmp_path):
    texts = made_up_texts(40)
    table = pyarrow.table({"text": texts, "number": list(range(40)), "other": ["x"] * 40})
    parquet.write_table(table, tmp_path / "t.parquet")
    expected = {str(number): text for number, text in enumerate(texts)}
    for name in (str(tmp_path / "t.parquet"), f"hf:{tmp_path / 'hub'}"):
        if name.startswith("hf:"):
            (tmp_path / "hub").mkdir()
            write_rows(tmp_path / "hub" / "a.jsonl", [{"text": t, "number": n} for n, t in enumerate(texts)])
        prepare(replace(options, sources=(name,), id_key="number", overwrite=True))
        assert by_id(options.output, load_tokenizer(options.tokenizer)) == expected
        with pytest.raises(DataError, match="nothing"):
            prepare(replace(options, sources=(name,), id_key="nothing", output=tmp_path / "no"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, r"texts\.jsonl:2 has no id under 'id'"),
        ({"id": None}, r"texts\.jsonl:2 has no id under 'id'"),
        ({"id": ""}, r"texts\.jsonl:2 has no id under 'id'"),
        ({"id": ["a"]}, r"texts\.jsonl:2 has an array under 'id'"),
        ({"id": {"a": 1}}, r"texts\.jsonl:2 has an object under 'id'"),
        ({"id": 5}, r"texts\.jsonl:3 has the id '5', as .*texts\.jsonl:2 has"),
        ({"id": "\ud800"}, r"texts\.jsonl:2 holds half a surrogate pair"),
    ],
)
def test_a_missing_or_repeated_id_is_told_with_its_line(options, tmp_path, row, said):
    rows = [{"text": "one", "id": "a"}, {"text": "two", **row}, {"text": "three", "id": "5"}, {"text": "f", "id": "b"}]
    write_rows(tmp_path / "texts.jsonl", rows)
    with pytest.raises(DataError, match=said):
        prepare(options)


def test_a_repeated_id_is_told_over_files_and_domains_also_of_a_duplicate(options, tmp_path):
    for name in ("one", "two"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{n} text", "id": f"{name}{n}"} for n in range(20)])
    with (tmp_path / "two.jsonl").open("a") as file:
        file.write(json.dumps({"text": "3 text", "id": "one3"}) + "\n")
    sources = tuple(f"{name}={tmp_path / name}.jsonl" for name in ("one", "two"))
    with pytest.raises(DataError, match=r"two\.jsonl:21 has the id 'one3', as .*one\.jsonl:4 has"):
        prepare(replace(options, sources=sources, deduplicate="exact", validation_fraction=0.0))


def test_text_has_no_keys(options, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"--id-key id: .*a\.txt is plain text"):
        prepare(replace(options, sources=(str(tmp_path / "a.txt"),)))
    with pytest.raises(ConfigError, match="key of the text, too"):
        prepare(replace(options, id_key="text"))


def test_a_damaged_file_of_ids_is_told(options):
    prepare(options)
    path = options.output / "train" / "shard-000000.ids"
    content = path.read_bytes()
    path.write_bytes(content[:-3] + b"zz\n")
    dataset = TokenDataset(options.output / "train")
    dataset.shard(0)  # training does without it
    with pytest.raises(DataError, match="damaged"):
        dataset.ids(0)
    with pytest.raises(DataError, match="damaged"):
        dataset.verify()


def test_ids_as_text():
    values = {
        "a b": "a b",
        "5": 5,
        "1.5": 1.5,
        "true": True,
        "-0.0": -0.0,
        "123456789012345678901": 123456789012345678901,
    }
    assert {id_text("x", value, "id"): value for value in values.values()} == values
