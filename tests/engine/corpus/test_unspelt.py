"""A corpus that the tokenizer cannot spell is refused above a share, and what is lost below it is told."""

import json

import pytest

from engine.cli import main
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.shards.dataset import TokenDataset
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE, ConfigError, DataError
from tests.engine.data.corpus import made_up_texts, write_json_lines
from tests.engine.data.tokenizer.foreign import letters

SPELT = ["ab ab a" * 9] * 7 + ["b a"]
"""7 * 63 + 3 = 444 bytes."""


@pytest.fixture
def tokenizer(tmp_path):
    return letters(tmp_path / "tokenizer").folder


def options(tmp_path, tokenizer, texts, **changes):
    source = write_json_lines(tmp_path / "texts.jsonl", texts)
    return PrepareOptions((str(source),), tokenizer, tmp_path / "out", validation_fraction=0, **changes)


def test_lost_text_is_counted_with_documents_of_which_nothing_is_left(tmp_path, tokenizer):
    prepared = prepare(options(tmp_path, tokenizer, [*SPELT, "a日", "本é"], max_unspelt=0.1))
    found = prepared.parts["train"]
    assert (found.documents, found.empty_documents) == (9, 1)
    assert (found.unspelt_bytes, found.left_out_bytes, found.text_bytes) == (3 + 5, 5, 444 + 4)
    report = json.loads((tmp_path / "out" / "prepare.json").read_text())["report"]["train"]
    assert (report["unspelt_bytes"], report["unspelt_rate"]) == (8, round(8 / (444 + 4 + 5), 8))


def test_more_than_the_share_is_refused_and_a_larger_share_goes_on_from_there(tmp_path, tokenizer):
    wanted = options(tmp_path, tokenizer, [*SPELT, "日" * 20])
    with pytest.raises(DataError) as caught:
        prepare(wanted)
    assert f"cannot spell {60 / 504:.2%} of the text (60 of 504 bytes): it is dropped" in str(caught.value)
    assert "allowed: at most 5.00% (--max-unspelt)" in str(caught.value)
    assert not (tmp_path / "out" / "train").exists()
    seen = []
    again = options(tmp_path, tokenizer, [*SPELT, "日" * 20], max_unspelt=0.12)
    assert prepare(again, seen.append).parts["train"].unspelt_bytes == 60
    assert seen[0].kept_tokens == seen[0].tokens > 0, "nothing was encoded again"
    with pytest.raises(DataError, match="cannot spell"):
        prepare(wanted)  # finished, but not under this share
    assert TokenDataset(tmp_path / "out" / "train").index.num_documents == 8


def test_a_domain_is_not_hidden_by_a_larger_one(tmp_path, tokenizer):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    write_json_lines(one, SPELT * 20)
    write_json_lines(other, ["a日a"])
    sources = (f"en={one}", f"zh={other}")
    with pytest.raises(DataError, match=r"cannot spell 60\.00% of the text of zh \(3 of 5 bytes\)"):
        prepare(PrepareOptions(sources, tokenizer, tmp_path / "out", validation_fraction=0))


def test_a_corpus_of_which_nothing_is_left_is_refused_for_that(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"cannot spell 100\.00% of the text"):
        prepare(options(tmp_path, tokenizer, ["日本"] * 3))


def test_long_runs_of_letters_are_refused_with_the_reason(tmp_path):
    train_tokenizer(made_up_texts(100), tmp_path / "wordpiece", "wordpiece", 400)
    texts = [*made_up_texts(20), "QUJD" * 500]
    with pytest.raises(DataError, match=r"it becomes \[UNK\], and so does any run of more than 100 letters"):
        prepare(options(tmp_path, tmp_path / "wordpiece", texts))


def test_the_share_is_a_share(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"--max-unspelt 1\.5"):
        prepare(options(tmp_path, tokenizer, SPELT, max_unspelt=1.5))


def test_the_command_tells_what_is_lost(tmp_path, tokenizer, capsys):
    source = write_json_lines(tmp_path / "texts.jsonl", [*SPELT, "日" * 20])
    arguments = ["prepare", str(source), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    arguments += ["--workers", "1", "--validation-fraction", "0"]
    assert main(arguments) == EXIT_FAILURE
    assert "cannot spell 11.90% of the text" in capsys.readouterr().err
    assert main([*arguments, "--max-unspelt", "0.2"]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "60 bytes of the text are lost" in printed
    assert "11.9048%" in printed
    assert main([*arguments, "--max-unspelt", "2"]) == EXIT_USAGE
