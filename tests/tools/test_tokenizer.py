"""The command trains, says what it made, and ends with the right exit code when it cannot."""

import pytest

from engine.cli import main
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE
from tests.engine.data.corpus import made_up_texts, write_json_lines


@pytest.fixture
def source(tmp_path):
    return str(write_json_lines(tmp_path / "texts.jsonl", made_up_texts(100)))


def test_it_trains_and_tells_what_it_made(source, tmp_path, capsys):
    output = tmp_path / "tokenizer"
    arguments = ["tokenizer", source, source, "--output", str(output), "--kind", "bpe", "--vocab-size", "300"]
    assert main([*arguments, "--max-megabytes", "1"]) == EXIT_DONE
    assert f"bpe tokenizer {load_tokenizer(output).hash} with 300 tokens in" in capsys.readouterr().out


def test_it_tells_when_the_text_carries_fewer_tokens_than_asked(source, tmp_path, capsys):
    output = tmp_path / "tokenizer"
    assert main(["tokenizer", source, "--output", str(output), "--vocab-size", "30000"]) == EXIT_DONE
    assert "30,000 tokens were asked for: the text carries no more" in capsys.readouterr().out
    assert load_tokenizer(output).vocab_size < 30000


def test_a_missing_source_is_told_and_nothing_is_written(tmp_path, capsys):
    output = tmp_path / "tokenizer"
    assert main(["tokenizer", str(tmp_path / "nowhere.jsonl"), "--output", str(output)]) == EXIT_FAILURE
    assert "there is no source" in capsys.readouterr().err
    assert not output.exists()


def test_a_wrong_kind_or_size_is_a_usage_error(source, tmp_path, capsys):
    arguments = ["tokenizer", source, "--output", str(tmp_path / "tokenizer")]
    assert main([*arguments, "--kind", "morphemes"]) == EXIT_USAGE
    assert main([*arguments, "--vocab-size", "10"]) == EXIT_USAGE
    assert "a bpe vocabulary of 10 tokens" in capsys.readouterr().err


def test_a_tokenizer_that_shards_may_depend_on_is_not_replaced_in_silence(source, tmp_path, capsys):
    output = tmp_path / "taken"
    arguments = ["tokenizer", str(source), "--output", str(output), "--vocab-size", "300"]
    assert main(arguments) == EXIT_DONE
    before = load_tokenizer(output).hash
    assert main(["tokenizer", str(source), "--output", str(output), "--vocab-size", "280"]) == EXIT_USAGE
    assert "holds something already" in capsys.readouterr().err
    assert load_tokenizer(output).hash == before
    assert main([*arguments, "--overwrite"]) == EXIT_DONE


def test_one_is_taken_over_or_one_is_trained(tmp_path, capsys):
    source = write_json_lines(tmp_path / "texts.jsonl", made_up_texts(100))
    ours, taken = str(tmp_path / "ours"), str(tmp_path / "taken")
    assert main(["tokenizer", str(source), "--output", ours, "--vocab-size", "300"]) == EXIT_DONE
    assert main(["tokenizer", "--import", ours, "--output", taken, "--purpose", "masked"]) == EXIT_DONE
    assert "added for masked: [CLS], [MASK], [SEP]" in capsys.readouterr().out
    assert main(["tokenizer", "--output", str(tmp_path / "none")]) == EXIT_USAGE
    assert "neither sources nor --import" in capsys.readouterr().err
    assert main(["tokenizer", str(source), "--import", ours, "--output", str(tmp_path / "both")]) == EXIT_USAGE
    assert main(["tokenizer", "--import", ours, "--output", taken]) == EXIT_USAGE
    assert "holds something already" in capsys.readouterr().err
