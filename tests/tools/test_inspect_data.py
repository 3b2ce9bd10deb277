"""The command verifies before it shows, and shows what a run would read."""

import shutil
from collections import Counter
from dataclasses import replace

import pytest

from engine.cli import main
from engine.config.load import load_run
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.loader import Loader, first_samples
from engine.data.shards.dataset import TokenDataset
from engine.data.stage import open_parts, stage_stream
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE
from tests.engine.data.corpus import made_up_texts, write_json_lines
from tools.inspect_data import BOUNDARY


@pytest.fixture
def folder(tmp_path):
    train_tokenizer(made_up_texts(100), tmp_path / "tokenizer", "bpe", 300)
    source = write_json_lines(tmp_path / "texts.jsonl", made_up_texts(60))
    prepare(PrepareOptions((str(source),), tmp_path / "tokenizer", tmp_path / "out", 0.2, shard_bytes=2000))
    return tmp_path / "out"


def words(text):
    """The words of what is shown, without the frame."""
    return text.replace("│", " ").split()


def test_both_parts_with_counts_and_text(folder, capsys):
    assert main(["inspect-data", str(folder), "--sequence-length", "64", "--samples", "1"]) == EXIT_DONE
    printed = capsys.readouterr().out
    for part in ("train", "validation"):
        index = TokenDataset(folder / part).index
        assert f"{index.num_tokens:,} (uint16, vocabulary 300)" in printed
        assert f"{2 * len(index.shards)} files verified (xxh3)" in printed
        assert index.fingerprint in printed
    assert BOUNDARY in printed
    assert "<|endoftext|>" in printed


def test_one_part_alone_and_numbers_without_a_tokenizer(folder, tmp_path, capsys):
    shutil.rmtree(tmp_path / "tokenizer")
    arguments = ["--samples", "1", "--sequence-length", "16", "--seed", "3"]
    assert main(["inspect-data", str(folder / "train"), *arguments]) == EXIT_DONE
    batch = first_samples(TokenDataset(folder / "train"), 16, 3, 1)
    [place] = batch.sources
    printed = capsys.readouterr().out
    assert f"train {place}" in printed
    shown = words(printed[printed.index(place) :])
    assert [word for word in shown if word.isdigit()] == [str(token) for token in batch.inputs["tokens_BT"][0].tolist()]


def test_domains_compression_and_sources_are_shown(folder, tmp_path, capsys):
    source = tmp_path / "texts.jsonl"
    options = PrepareOptions((f"a={source}", f"b={source}"), tmp_path / "tokenizer", tmp_path / "two", 0.2)
    prepare(replace(options, compression="zstd"))
    assert main(["inspect-data", str(tmp_path / "two"), "--samples", "1"]) == EXIT_DONE
    printed = " ".join(words(capsys.readouterr().out))
    assert "source a =" in printed
    assert "on disk (zstd)" in printed
    for name in ("train/a", "train/b", "validation/a", "validation/b"):
        assert f"tokens per document, {name}:" in printed
        assert f"{name} shard-000000.tokens" in printed
    assert main(["inspect-data", str(tmp_path / "two" / "train" / "b"), "--samples", "0"]) == EXIT_DONE
    (tmp_path / "two" / "train" / "b" / "index.json").unlink()
    assert main(["inspect-data", str(tmp_path / "two")]) == EXIT_FAILURE


def test_no_samples_on_request(folder, capsys):
    assert main(["inspect-data", str(folder), "--samples", "0"]) == EXIT_DONE
    assert BOUNDARY not in capsys.readouterr().out


def test_another_tokenizer_is_refused(folder, tmp_path, capsys):
    train_tokenizer(made_up_texts(100, seed=9), tmp_path / "other", "bpe", 290)
    assert main(["inspect-data", str(folder), "--tokenizer", str(tmp_path / "other")]) == EXIT_FAILURE
    assert "but this run's tokenizer is" in capsys.readouterr().err


def test_a_flipped_bit_ends_it_with_the_shards_name(folder, capsys):
    path = folder / "validation" / "shard-000000.tokens"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    assert main(["inspect-data", str(folder)]) == EXIT_FAILURE
    assert f"shard {path} is damaged" in capsys.readouterr().err


def test_a_folder_that_is_none_is_refused(tmp_path, capsys):
    assert main(["inspect-data", str(tmp_path)]) == EXIT_FAILURE
    assert "holds no index.json" in capsys.readouterr().err


def test_a_part_that_is_gone_is_missed(folder, capsys):
    (folder / "train" / "index.json").unlink()
    assert main(["inspect-data", str(folder)]) == EXIT_FAILURE
    assert "says that it was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("purpose", "kind", "options", "expected"),
    [
        ("masked", "wordpiece", [], ["[CLS]", "[MASK]", "to predict: "]),
        ("masked", "wordpiece", ["--pairs", "next_sentence"], ["[SEP]", "second segment: random or swapped"]),
        ("span_corruption", "sentencepiece-bpe", [], ["<extra_id_0>", "to spell out: "]),
        ("fill_in_the_middle", "bpe", [], ["<|fim_middle|>"]),
    ],
)
def test_the_rows_of_each_objective_can_be_read(tmp_path, capsys, purpose, kind, options, expected):
    train_tokenizer(made_up_texts(100), tmp_path / "tokenizer", kind, 500, purpose)
    source = write_json_lines(tmp_path / "texts.jsonl", [". ".join(made_up_texts(3, seed)) for seed in range(60)])
    prepare(PrepareOptions((str(source),), tmp_path / "tokenizer", tmp_path / "out", 0, sentences="en"))
    arguments = ["--objective", purpose, "--sequence-length", "64", "--samples", "8", *options]
    assert main(["inspect-data", str(tmp_path / "out"), *arguments]) == EXIT_DONE
    printed = " ".join(words(capsys.readouterr().out))
    assert all(" ".join(text.split()) in printed for text in expected)


def test_the_mix_of_a_run_is_counted(folder, tmp_path, capsys):
    """Against the sources of the samples that the loader then draws."""
    source = tmp_path / "texts.jsonl"
    prepare(PrepareOptions((f"a={source}", f"b={source}"), tmp_path / "tokenizer", tmp_path / "two", 0.2))
    run = tmp_path / "run.yaml"
    run.write_text(
        f"""
folder: {tmp_path / "run"}
tokenizer: {tmp_path / "tokenizer"}
model: {{ vocab_size: 300, num_layers: 1, hidden_size: 16, num_heads: 2, max_positions: 32 }}
stages:
  - sequence_length: 32
    global_batch_size: 8
    duration: {{ steps: 25 }}
    data:
      sources:
        - {{ name: a, path: {tmp_path / "two" / "train" / "a"}, weight: 3 }}
        - {{ name: b, path: {tmp_path / "two" / "train" / "b"}, weight: 1, epochs: 0.5 }}
"""
    )
    assert main(["inspect-data", str(run)]) == EXIT_DONE
    config = load_run(run)
    stage = config.stages[0]
    stream = stage_stream(stage, open_parts(stage, None, 300), config.seed)
    epochs, loader = stream.samples_by_source(), Loader(stream)
    drawn = Counter(number for _ in range(25) for batch in loader.step(0, 1, 8) for number in batch.domains_B.tolist())
    assert 0 < drawn[1] < 50, "the limit of b shows"
    printed = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    shown = {name.strip(): [cell.strip() for cell in cells] for name, *cells in printed}
    for number, (name, weight) in enumerate((("a", 0.75), ("b", 0.25))):
        count = drawn[number]
        assert shown[name][:3] == [f"{count}", f"{count / 200:.4%}", f"{weight:.4%}"]
        assert shown[name][3] == f"{count / epochs[number]:.3f}"
    assert main(["inspect-data", str(run), "stages.0.duration.steps=1"]) == EXIT_DONE
    assert "8 samples of 32" in capsys.readouterr().out


def test_keys_belong_to_a_run_file(folder, capsys):
    assert main(["inspect-data", str(folder), "seed=3"]) == EXIT_USAGE
    assert f"{folder} is no run file, and 'seed=3' a key to change" in " ".join(capsys.readouterr().err.split())


def test_a_run_file_that_is_none_is_refused(folder, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("folder: x\nstages: 3\n")
    assert main(["inspect-data", str(tmp_path / "bad.yaml")]) == EXIT_USAGE
    assert "stages" in capsys.readouterr().err


def test_square_brackets_in_a_path_are_no_markup_and_documents_send_no_escape_sequences(tmp_path, capsys):
    train_tokenizer(made_up_texts(100), tmp_path / "tokenizer", "bpe", 300)
    folder = tmp_path / "[b]x[/b]" / "[/red]"
    folder.mkdir(parents=True)
    texts = ["red \x1b[31m title \x1b]0;owned\x07 c1 \x9b31m back \u202e end\r"] * 20
    source = write_json_lines(folder / "[bold]texts.jsonl", texts)
    prepare(PrepareOptions((f"d={source}",), tmp_path / "tokenizer", folder / "out", 0))
    assert main(["inspect-data", str(folder / "out"), "--samples", "1"]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert not set(printed) & set("\x1b\x07\x9b\u202e\r")
    joined = "".join(words(printed))
    assert all(shown in joined for shown in (r"\x1b[31m", r"\x07", r"\x9b31m", r"\u202e"))
    assert "".join(str(source).split()) in joined
    assert f"{folder / 'out' / 'train' / 'd'}" in joined


@pytest.mark.parametrize("weights", [("1e-320", "1"), ("1_000_000_007", "2"), ("1", ".nan"), ("0", "1"), ("1", "null")])
def test_weights_that_make_no_mixture_are_refused(folder, tmp_path, capsys, weights):
    run = tmp_path / "run.yaml"
    sources = [f"{{ name: n{n}, path: {folder}/train, weight: {weight} }}" for n, weight in enumerate(weights)]
    run.write_text(
        f"folder: {tmp_path}/run\ntokenizer: {tmp_path}/tokenizer\n"
        "model: { vocab_size: 300, num_layers: 1, hidden_size: 16, num_heads: 2, max_positions: 32 }\n"
        "stages:\n  - sequence_length: 32\n    global_batch_size: 8\n    duration: { steps: 1 }\n"
        f"    data: {{ sources: [{', '.join(sources)}] }}\n"
    )
    assert main(["inspect-data", str(run)]) == EXIT_USAGE
    told = capsys.readouterr().err
    assert "stages.0.data.sources" in told
    assert "weight" in told
    assert "to do: " in told


def test_a_url_is_inspected_as_the_folder_is_and_prepare_writes_to_none(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.inspect_data._CACHE_BYTES", 5000)  # shards have 2,000
    assert main(["inspect-data", f"file://{folder}", "--samples", "1", "--sequence-length", "64"]) == EXIT_DONE
    printed = capsys.readouterr().out
    for part in ("train", "validation"):
        index = TokenDataset(folder / part).index
        assert f"{index.num_tokens:,} (uint16, vocabulary 300)" in printed
        assert index.fingerprint in printed
    assert main(["inspect-data", "memory://nothing-there"]) == EXIT_FAILURE
    assert "no token shards lie at this URL" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    given = [str(tmp_path / "texts.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main(["prepare", *given, "--output", "s3://bucket/tokens"]) == EXIT_USAGE
    assert "is a URL" in capsys.readouterr().err
    assert not (tmp_path / "s3:").exists()
