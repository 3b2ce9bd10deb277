"""`palimpsest convert` between token shards and Megatron's files."""

import pytest

from engine.cli import main
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.shards.dataset import TokenDataset
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE
from tests.engine.data.corpus import made_up_texts, write_json_lines


@pytest.fixture
def shards(tmp_path):
    train_tokenizer(made_up_texts(100), tmp_path / "tokenizer", "bpe", 300)
    source = write_json_lines(tmp_path / "texts.jsonl", made_up_texts(60))
    prepare(PrepareOptions((str(source),), tmp_path / "tokenizer", tmp_path / "out", 0.2))
    return tmp_path / "out"


def test_shards_go_to_megatron_and_back_without_a_copy(shards, tmp_path, capsys):
    assert main(["convert", str(shards / "train"), "--to", "megatron", "--output", str(tmp_path / "set")]) == EXIT_DONE
    before = TokenDataset(shards / "train")
    assert f"{before.index.num_tokens:,} tokens (uint16)" in capsys.readouterr().out
    taken = ["--to", "shards", "--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "taken")]
    assert main(["convert", str(tmp_path / "set.bin"), *taken]) == EXIT_DONE
    assert "stays where it is" in capsys.readouterr().out
    after = TokenDataset(tmp_path / "taken")
    after.verify()
    assert after.shard(0).tokens.tolist() == before.shard(0).tokens.tolist()
    assert main(["inspect-data", str(tmp_path / "taken"), "--samples", "1"]) == EXIT_DONE


def test_what_cannot_be_converted_is_told(shards, tmp_path, capsys):
    prefix = ["--output", str(tmp_path / "set")]
    assert main(["convert", str(shards), "--to", "megatron", *prefix]) == EXIT_FAILURE
    assert "name one of its folders: train, validation" in capsys.readouterr().err
    (tmp_path / "set.bin").write_text("")
    assert main(["convert", str(shards / "train"), "--to", "megatron", *prefix]) == EXIT_FAILURE
    assert "holds set.bin already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "set"), "--to", "shards", "--output", str(tmp_path / "t")]) == EXIT_USAGE
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer")]
    assert main(["convert", str(tmp_path / "set"), "--to", "shards", *tokenizer, "--output", str(shards)]) == EXIT_USAGE
    assert "holds something already" in capsys.readouterr().err
    nowhere = ["--to", "shards", *tokenizer, "--output", str(tmp_path / "t")]
    assert main(["convert", str(tmp_path / "nowhere"), *nowhere]) == EXIT_FAILURE
    assert "nowhere.idx cannot be read" in capsys.readouterr().err
