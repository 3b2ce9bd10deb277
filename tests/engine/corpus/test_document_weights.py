"""Weights of documents stay with their documents, through duplicates, held-out documents, workers and compression."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from engine.corpus.options import PrepareOptions
from engine.corpus.pool import workers
from engine.corpus.prepare import prepare
from engine.corpus.recipe import PARTS
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.document_weights import COLUMN
from engine.data.shards.index import read_index
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import ConfigError, DataError
from tests.engine.data.corpus import made_up_texts


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(texts: list[str]) -> list[dict]:
    """Whole numbers and fractions, small and large ones."""
    return [
        {"text": text, "quality": number + 1 if number % 2 else (number + 1) / 7e9} for number, text in enumerate(texts)
    ]


@pytest.fixture
def options(tokenizer_folder, tmp_path) -> PrepareOptions:
    source = write_rows(tmp_path / "texts.jsonl", rows_of(made_up_texts(200)))
    return PrepareOptions(
        (str(source),),
        tokenizer_folder,
        tmp_path / "out",
        validation_fraction=0.2,
        shard_bytes=2000,
        weight_key="quality",
    )


def by_text(output: Path, tokenizer) -> dict[str, float]:
    """The weight of each text."""
    found = {}
    for part in PARTS:
        dataset = TokenDataset(output / part)
        dataset.verify()
        for number in range(dataset.num_shards):
            tokens, bounds = dataset.shard(number).tokens.tolist(), dataset.shard(number).documents.tolist()
            weights = dataset.column(COLUMN, number)
            for weight, first, end in zip(weights.tolist(), bounds[:-1], bounds[1:], strict=True):
                found[tokenizer.model.decode(tokens[first : end - 1])] = weight
    return found


def test_every_document_has_its_weight_on_either_side(options, tmp_path):
    prepare(options)
    expected = {row["text"]: float(row["quality"]) for row in rows_of(made_up_texts(200))}
    tokenizer = load_tokenizer(options.tokenizer)
    assert by_text(options.output, tokenizer) == expected
    with workers(2) as pool:
        assert pool is not None
        prepare(replace(options, output=tmp_path / "two"), pool=pool)
    for path in sorted((options.output / "train").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "train" / path.name).read_bytes()
    prepare(replace(options, output=tmp_path / "packed", compression="zstd", deduplicate="exact"))
    assert by_text(tmp_path / "packed", tokenizer) == expected
    # not one token differs from a preparation without weights
    prepare(replace(options, output=tmp_path / "plain", weight_key=None))
    for part in PARTS:
        one, other = (read_index(folder / part) for folder in (options.output, tmp_path / "plain"))
        assert [shard.content_hash for shard in one.shards] == [shard.content_hash for shard in other.shards]
        assert other.columns == ()


def test_a_column_of_a_table_gives_the_weights(options, tmp_path):
    rows = rows_of(made_up_texts(50))
    table = pyarrow.table({key: [row[key] for row in rows] for key in ("text", "quality")})
    parquet.write_table(table, tmp_path / "rows.parquet")
    prepare(replace(options, sources=(str(tmp_path / "rows.parquet"),), id_key="quality"))
    found = by_text(options.output, load_tokenizer(options.tokenizer))
    assert found == {row["text"]: float(row["quality"]) for row in rows}
    with pytest.raises(DataError, match=r"has no column 'worth'") as caught:
        prepare(replace(options, sources=(str(tmp_path / "rows.parquet"),), weight_key="worth", overwrite=True))
    assert "--weight-key" in caught.value.remedy


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "no weight"),
        ({"quality": None}, "no weight"),
        ({"quality": 0}, "has 0 under"),
        ({"quality": -1.5}, "has -1.5 under"),
        ({"quality": float("nan")}, "has nan under"),
        ({"quality": 1e31}, "has 1e\\+31 under"),
        ({"quality": "high"}, "a string"),
        ({"quality": True}, "true or false"),
    ],
)
def test_what_is_no_weight_is_refused_by_its_line(options, tmp_path, value, said):
    rows = rows_of(made_up_texts(5))
    rows[2] = {"text": rows[2]["text"]} | value
    source = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError, match=rf"bad\.jsonl:3.*{said}") as caught:
        prepare(replace(options, sources=(str(source),)))
    assert "from 1e-30 to 1e+30" in caught.value.allowed
    assert "--weight-key" in caught.value.remedy


def test_plain_text_has_no_weights(options, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(ConfigError, match=r"--weight-key quality: .*a\.txt is plain text"):
        prepare(replace(options, sources=(str(tmp_path / "a.txt"),)))
    with pytest.raises(ConfigError, match="--weight-key text is the key of the text"):
        prepare(replace(options, weight_key="text"))
