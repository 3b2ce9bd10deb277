"""The command trains, says what it made, and ends with the right exit code when it cannot."""

import io
import resource
import threading

import pytest
from rich.console import Console
from rich.progress import Progress

from engine.cli import main
from engine.corpus.tokenizer_folder import UNFINISHED
from engine.corpus.tokenizer_training import SENTENCEPIECE_FILE
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE
from tests.engine.data.corpus import made_up_texts, write_json_lines
from tools import tokenizer as tool


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
    assert "fewer than the 30,000 tokens asked for: the text has no more" in capsys.readouterr().out
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


def test_a_folder_that_cannot_be_written_is_told_before_the_text_is_read(source, tmp_path, capsys, monkeypatch):
    def read(*arguments):
        yield "text"
        raise AssertionError("the text was read")

    monkeypatch.setattr(tool, "read_texts", read)
    (tmp_path / "file").write_text("no folder")
    for output in (tmp_path / "file", tmp_path / "file" / "inside"):
        assert main(["tokenizer", source, "--output", str(output), "--vocab-size", "300"]) == EXIT_FAILURE
        assert "cannot write the tokenizer to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece-bpe"])
def test_a_full_disk_leaves_no_half_folder(source, tmp_path, capsys, kind):
    output = tmp_path / "tokenizer"
    arguments = ["tokenizer", source, "--output", str(output), "--vocab-size", "460", "--kind", kind]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # as a disk that is full after so many bytes
    try:
        assert main(arguments) == EXIT_FAILURE
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write the tokenizer to" in capsys.readouterr().err
    assert not output.exists()
    (output / UNFINISHED).mkdir(parents=True)  # as a kill leaves it
    assert main(arguments) == EXIT_DONE
    assert UNFINISHED not in [path.name for path in output.iterdir()]


def test_overwriting_leaves_nothing_of_another_kind(source, tmp_path):
    arguments = ["tokenizer", source, "--output", str(tmp_path / "out"), "--vocab-size", "460"]
    assert main([*arguments, "--kind", "sentencepiece-bpe"]) == EXIT_DONE
    assert (tmp_path / "out" / SENTENCEPIECE_FILE).exists()
    assert main([*arguments, "--overwrite"]) == EXIT_DONE
    assert not (tmp_path / "out" / SENTENCEPIECE_FILE).exists()


def test_where_nobody_watches_lines_tell_what_goes_on(source, tmp_path, capsys, monkeypatch):
    assert main(["tokenizer", source, "--output", str(tmp_path / "out"), "--vocab-size", "300"]) == EXIT_DONE
    assert "training on 100 documents" in capsys.readouterr().err
    monkeypatch.setattr(tool, "_TOLD_EVERY_SECONDS", 0.01)
    told = threading.Event()
    progress = Progress(console=Console(file=Noting(told)))
    progress.add_task("training on 5 documents")
    with tool._told(progress):
        assert told.wait(60)


class Noting(io.StringIO):
    """A file that tells when a line of progress was written."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def write(self, text):
        if "training on 5 documents, " in text:
            self.told.set()
        return super().write(text)


def test_one_is_extended_by_text_and_by_a_list(source, tmp_path, capsys):
    old, new, tokens = tmp_path / "old", tmp_path / "new", tmp_path / "tokens.txt"
    assert main(["tokenizer", source, "--output", str(old), "--vocab-size", "300"]) == EXIT_DONE
    tokens.write_text(" cardiology\n the\n\n")
    extend = ["tokenizer", "--extend", str(old), "--output", str(new)]
    for wrong, said in (
        ([], "neither sources nor --tokens"),
        (["--import", str(old), "--tokens", str(tokens)], "both --import and --extend"),
        (["--tokens", str(tokens), "--add", "3"], "--add without sources"),
        (["--tokens", str(tmp_path / "no.txt")], "cannot be read"),
    ):
        assert main([*extend, *wrong]) != EXIT_DONE
        assert said in capsys.readouterr().err
        assert not new.exists()
    assert main(["tokenizer", source, "--add", "3", "--output", str(new)]) == EXIT_USAGE
    assert "--add without --extend" in capsys.readouterr().err

    assert main([*extend, source, "--tokens", str(tokens), "--add", "5"]) == EXIT_DONE
    said = capsys.readouterr().out
    assert "ids up to 299 are as before" in said
    assert "of 2 tokens in" in said
    assert "learnt 5\n" in said
    assert "tokens per byte of the text: " in said
    made = load_tokenizer(new)
    assert made.encode([" cardiology"])[0].size == 1
    assert main([*extend, source]) == EXIT_USAGE
    assert "holds something already" in capsys.readouterr().err
    # measured alone
    assert main([*extend[:-1], str(tmp_path / "third"), source, "--tokens", str(tokens)]) == EXIT_DONE
    said = capsys.readouterr().out
    assert "tokens per byte" in said
    assert "learnt" not in said


def test_files_that_know_no_new_token_are_left_out_and_told(source, tmp_path, capsys):
    for name in ("old", "new"):  # an older tokenizer is where the new one goes
        command = ["tokenizer", source, "--output", str(tmp_path / name), "--vocab-size", "400"]
        assert main([*command, "--kind", "sentencepiece-bpe"]) == EXIT_DONE
        assert (tmp_path / name / "tokenizer.model").is_file()
    (tmp_path / "tokens.txt").write_text("cardiology\n")
    extend = ["tokenizer", "--extend", str(tmp_path / "old"), "--tokens", str(tmp_path / "tokens.txt"), "--overwrite"]
    capsys.readouterr()
    assert main([*extend, "--output", str(tmp_path / "new")]) == EXIT_DONE
    assert "left out, as it knows no new token: tokenizer.model; readers take tokenizer.json" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert load_tokenizer(tmp_path / "new").encode(["cardiology"])[0].size == 1
