"""`palimpsest evaluate` as a user calls it: the parts of one report, in the terminal, as JSON and as a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from engine.cli import main
from engine.corpus.tokenizer_training import train_tokenizer
from engine.serve.sample_text import TEXT
from tests.engine.evaluate.conftest import TEXTS, classifier_run, write_set
from tests.engine.serve.runs import run_config, save

pytest.importorskip("captum")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    train_tokenizer([TEXT, *TEXTS], folder / "tokenizer", "wordpiece", 260, "masked")
    return classifier_run(folder / "run", folder / "tokenizer", "bert")


class Page(HTMLParser):
    """The words of a page, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed", "video", "audio"):
            self.fetched.append(tag)
        named = [str(value) for name, value in attrs if name.endswith(("href", "src"))]
        # pictures refer to their own parts, and hold what they show
        self.fetched += [value for value in named if not value.startswith(("#", "data:image/png;base64,"))]


def test_one_page_holds_everything_and_fetches_nothing(classifier, tmp_path, capsys):
    (tmp_path / "zh.jsonl").write_text(json.dumps({"text": "<b>房间</b> & \x1b[31m", "label": "bad"}) + "\n")
    given = [f"first={write_set(tmp_path / 'a.jsonl')}", f"zh={tmp_path / 'zh.jsonl'}"]
    command = ["evaluate", str(classifier), "--set", given[0], "--set", given[1], "--faults", "--bias", "zh"]
    command += ["--explain", "<i>ink</i> fades", "--explain-examples", "1", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    told = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["set"] for row in report["sets"]] == ["first", "zh"]
    assert {"calibration", "robustness", "bias", "explanations"} <= report.keys()
    assert f"{report['sets'][0]['measures']['accuracy']:.4f}" in told
    assert "\x1b" not in told, "colours are for terminals, and text of strangers is shown, not sent"
    text = (tmp_path / "out" / "evaluation.html").read_text()
    page = Page(text)
    assert page.fetched == []
    assert not re.search(r"url\((?!#)|@import|<b>|<i>", text)
    assert text.count("<svg") == 1 + 2 + 2 + 2 + 1, "by set, confusion, reliability, faults, templates"
    words = "".join(page.words)
    assert "<i>ink</i> fades" in words
    for table in ("Labelled sets (classification)", "Calibration", "Robustness on zh", "Bias probes (zh)"):
        assert table in words
        assert table in told


def language_model(folder, tokenizer, *, seed=3):
    config = run_config(folder, "gpt2", tokenizer)
    save(config, step=3, seed=seed)
    return config.folder


def test_several_models_stand_side_by_side(classifier, tmp_path, capsys):
    train_tokenizer([TEXT, *TEXTS], tmp_path / "tokenizer", "wordpiece", 260, "masked")
    other = classifier_run(tmp_path / "other", tmp_path / "tokenizer", "bert", seed=5)
    given = ["--set", f"first={write_set(tmp_path / 'a.jsonl')}", "--faults", "--bias", "en"]
    models = [str(classifier), str(other)]
    assert main(["evaluate", *models, *given, "--output", str(tmp_path / "both"), "--explain", "ink fades"]) == 0
    told = capsys.readouterr().out
    both = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    for model, found in zip(models, both["models"], strict=True):
        assert main(["evaluate", model, *given, "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)
        del found["explanations"]
        assert alone.items() <= found.items(), "a model's figures do not depend on the models beside it"
    first, second = (one["sets"][0]["measures"] for one in both["models"])
    row = next(line.split() for line in told.splitlines() if line.startswith("first") and " f1 macro " in line)
    assert row[-2:] == [f"{first['f1_macro']:.4f}", f"{second['f1_macro']:.4f}"]
    assert [one["label"] for one in both["models"]] == ["run", "other"]
    words = "".join(Page((tmp_path / "both" / "evaluation.html").read_text()).words)
    assert "Evaluation of run, other" in words
    assert words.count("Labelled sets (classification)") == 2


def test_a_figure_that_a_model_has_not_is_a_dash(tmp_path, capsys):
    train_tokenizer([TEXT], tmp_path / "bpe", "bpe", 400)
    train_tokenizer([TEXT], tmp_path / "wordpiece", "wordpiece", 260, "masked")
    masked = run_config(tmp_path / "masked", "bert", tmp_path / "wordpiece")
    save(masked, step=3, seed=3)
    (tmp_path / "a.txt").write_text(TEXT[:200])
    models = [str(language_model(tmp_path / "causal", tmp_path / "bpe")), str(masked.folder)]
    assert main(["evaluate", *models, "--text", f"en={tmp_path / 'a.txt'}"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("en ")]
    assert [row[1:-2] for row in rows] == [["bits", "per", "byte"], ["pseudo-bits", "per", "byte"]]
    assert [row[-1] == "-" for row in rows] == [True, False]
    assert [row[-2] == "-" for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("option", "code", "words"),
    [("--set", 2, "labelled examples with"), ("--explain", 2, "--explain with"), ("--text", 1, "missing.txt")],
)
def test_what_a_model_cannot_is_refused_before_anything_is_measured(
    classifier, tmp_path, capsys, monkeypatch, option, code, words
):
    train_tokenizer([TEXT], tmp_path / "tokenizer", "bpe", 400)
    causal = language_model(tmp_path / "run", tmp_path / "tokenizer")
    value = {"--set": f"a={write_set(tmp_path / 'a.jsonl')}", "--explain": "ink"}.get(
        option, f"a={tmp_path}/missing.txt"
    )
    measured = []
    for name in ("evaluate_set", "perplexity_of", "bias_of"):
        monkeypatch.setattr(f"engine.evaluate.report.{name}", lambda *given, **named: measured.append(given))
    assert main(["evaluate", str(classifier), str(causal), "--bias", "en", option, value]) == code
    assert words in capsys.readouterr().err
    assert measured == []


def test_json_goes_to_a_pipe(tmp_path, capsys):
    train_tokenizer([TEXT], tmp_path / "tokenizer", "bpe", 400)
    run = language_model(tmp_path / "run", tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text(TEXT)
    assert main(["evaluate", str(run), "--text", f"en={tmp_path / 'a.txt'}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["domains"][0]["bytes"] == len(TEXT.encode())
    assert report["class"] == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing is asked of"),
        (["--faults", "--bias", "en"], "--faults without --set"),
        (["--explain-examples", "2"], "--explain-examples without --set"),
        (["--bias", "fr"], "--bias fr"),
        (["--set", "a=x.jsonl", "--column", "text"], "--column text"),
        (["--set", "a=x.jsonl", "--column", "txt=sentence"], "txt"),
        (["--set", "a=x.jsonl", "--set", "a=y.jsonl"], "--set names a twice"),
        (["--bias", "en", "--output", "OUTPUT"], "is a file"),
        (["--bias", "en"], "is not there"),
    ],
)
def test_a_wrong_request_is_told_before_a_model_is_opened(given, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = [str(tmp_path / "file") if each == "OUTPUT" else each for each in given]
    assert main(["evaluate", str(tmp_path / "none"), *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "allowed:" in told
    assert "to do:" in told
