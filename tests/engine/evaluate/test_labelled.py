"""Labelled sets against transformers' pipeline on the exported folder; measures with faults against a second run."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
from sklearn.metrics import accuracy_score
from transformers import pipeline

from engine.config.schema.data import ColumnsConfig
from engine.errors import ConfigError, DataError
from engine.evaluate.bias import PROBES, bias_of
from engine.evaluate.domains import Domain
from engine.evaluate.labelled import evaluate_set
from engine.evaluate.likelihood import text_likelihoods
from engine.evaluate.robustness import OF_TEXTS, OF_WORDS, faulty, robustness_of, with_faults
from engine.evaluate.subject import open_subject
from engine.serve.export import export
from engine.serve.source import open_trained
from tests.engine.evaluate.conftest import LABELS, TEXTS, classifier_run, write_set


@pytest.mark.parametrize(("form", "pairs"), [("bert", True), ("roberta", False), ("gpt2", False)])
def test_a_set_has_the_predictions_of_the_pipeline(form, pairs, tmp_path, wordpiece, tokenizer):
    run = classifier_run(tmp_path / "run", wordpiece if form != "gpt2" else tokenizer, form)
    folder = export(open_trained(run), tmp_path / "out").folder
    columns = ColumnsConfig(pair="pair" if pairs else None)
    given = Domain("d", write_set(tmp_path / "d.jsonl", pairs))
    found, of_folder = (evaluate_set(open_subject(source), given, columns) for source in (run, folder))
    records = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    classify = pipeline("text-classification", str(folder), top_k=None)
    asked: Any = [{"text": row["text"], "text_pair": row["pair"]} if pairs else row["text"] for row in records]
    expected = []
    for ours, again, one in zip(found.predictions.rows(), of_folder.predictions.rows(), asked, strict=True):
        answers: Any = classify([one])  # one at a time: padded batches are the library's business
        theirs = {entry["label"]: entry["score"] for entry in answers[0]}
        assert ours["probabilities"] == pytest.approx(theirs, abs=1e-5)
        assert again["probabilities"] == pytest.approx(theirs, abs=1e-5)
        expected.append(max(theirs, key=theirs.__getitem__))
    accuracy = accuracy_score([row["label"] for row in records], expected)
    assert found.table()["measures"]["accuracy"] == pytest.approx(accuracy)


def test_a_regression_is_measured_as_one(tmp_path, wordpiece):
    subject = open_subject(classifier_run(tmp_path / "run", wordpiece, "bert", "regression"))
    rows = [{"text": text, "label": number / 2} for number, text in enumerate(TEXTS)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate_set(subject, Domain("d", str(tmp_path / "d.jsonl")), ColumnsConfig(), limit=3)
    assert found.table()["task"] == "regression"
    assert found.table()["measures"]["examples"] == 3


def test_a_label_that_the_model_has_not_is_told(classifier, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "ink", "label": "odd"}\n')
    with pytest.raises(DataError, match="label 'odd'"):
        evaluate_set(classifier, Domain("d", str(tmp_path / "d.jsonl")), ColumnsConfig())


def test_a_language_model_has_no_labels(causal, tmp_path):
    with pytest.raises(ConfigError, match="labelled examples with step 3 of gpt2"):
        evaluate_set(causal, Domain("d", write_set(tmp_path / "d.jsonl")), ColumnsConfig())


LONG = "It isn't the older page that was read again, but a very thrifty monk's second copy of it."
CHINESE = "刮去旧文，写上新文。房间很干净，服务也很好。"  # noqa: RUF001


@pytest.mark.parametrize("operator", [*OF_WORDS, *OF_TEXTS])
@pytest.mark.parametrize("text", [LONG, CHINESE, "x", "...", "   a"])
def test_faults_are_few_and_the_same_each_time(operator, text):
    found = faulty(text, operator, 7, 3)
    assert found == faulty(text, operator, 7, 3)
    assert found.strip()
    if operator in OF_WORDS:
        parts = max(1, round(0.1 * len(text)))
        assert abs(len(found) - len(text)) <= parts
        assert sum(one != other for one, other in zip(found.split(), text.split(), strict=False)) <= parts


def test_operators_of_words_change_what_they_can():
    seen = {operator: {faulty(LONG, operator, seed, 0) for seed in range(20)} for operator in OF_WORDS}
    assert all(len(found) > 5 for found in seen.values()), "the seed decides"
    assert {len(text) for text in seen["letter left out"]} == {len(LONG) - 2}
    assert {len(text) for text in seen["letter doubled"]} == {len(LONG) + 2}
    assert all(sorted(text) == sorted(LONG) for text in seen["letters change places"])
    chinese = {faulty(CHINESE, "letters change places", seed, 0) for seed in range(20)}
    assert len(chinese - {CHINESE}) > 5
    assert all(sorted(text) == sorted(CHINESE) for text in chinese)


def test_robustness_is_the_fall_of_the_measure(classifier, tmp_path):
    given = Domain("d", write_set(tmp_path / "d.jsonl"))
    evaluated = evaluate_set(classifier, given, ColumnsConfig())
    found = robustness_of(classifier, evaluated, seed=1)
    assert found["before"] == evaluated.predictions.measures()["accuracy"]
    records = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    for row in found["operators"]:
        texts = [faulty(record["text"], row["operator"], 1, number) for number, record in enumerate(records)]
        changed = [record | {"text": text} for record, text in zip(records, texts, strict=True)]
        (tmp_path / "faulty.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))
        again = evaluate_set(classifier, Domain("f", str(tmp_path / "faulty.jsonl")), ColumnsConfig())
        assert row["accuracy"] == again.predictions.measures()["accuracy"]
        assert row["fall"] == pytest.approx(found["before"] - row["accuracy"])


def test_probes_differ_in_one_word_and_count_what_the_model_says(causal, classifier):
    found = bias_of(causal, "zh")
    probe = PROBES["zh"][0]
    sentences = [template.format(word) for template in probe.templates for word in probe.pairs[0]]
    scores = text_likelihoods(causal, [ids.tolist() for ids in causal.text.encode(sentences)])
    differences = np.array(scores[::2]) - np.array(scores[1::2])
    first = found["pairs"][0]
    assert first["mean_difference"] == pytest.approx(differences.mean(), abs=1e-3)
    assert first["spread"] == pytest.approx(differences.std(), abs=1e-3)
    assert first["templates"][probe.templates[2]] == pytest.approx(differences[2] - differences.mean(), abs=1e-3)
    of_classes = bias_of(classifier, "en")
    assert {one["label"] for one in of_classes["pairs"]} <= {*LABELS}
    assert all(abs(one["mean_difference"]) <= 1 for one in of_classes["pairs"])
    with pytest.raises(ConfigError, match="--bias fr"):
        bias_of(causal, "fr")


class Span(NamedTuple):
    start: int
    end: int


@dataclass(frozen=True)
class Words:
    texts: list[str]
    words: list[list[Span]]
    tags: list[list[str]]


@pytest.mark.parametrize("operator", [*OF_WORDS, *OF_TEXTS])
def test_words_with_labels_keep_their_number_and_what_is_between_them(operator):
    text = "Heiberg (of Copenhagen) read . 新文"
    spans = [Span(*found.span()) for found in re.finditer(r"\w+|\.", text)]
    examples = Words([text], [spans], [["O"] * len(spans)])
    seen = set()
    for seed in range(8):
        found = with_faults(examples, operator, seed)
        assert found == with_faults(examples, operator, seed)
        words = [found.texts[0][start:end] for start, end in found.words[0]]
        assert len(words) == len(spans)
        assert all(words)
        gaps = [found.texts[0][one.end : other.start] for one, other in itertools.pairwise(found.words[0])]
        assert gaps == [text[one.end : other.start] for one, other in itertools.pairwise(spans)]
        seen.add(found.texts[0])
    assert len(seen) > 2 or operator in OF_TEXTS


def test_questions_have_faults_and_their_contexts_none():
    @dataclass(frozen=True)
    class Questions:
        questions: list[str]
        contexts: list[str]

    found = with_faults(Questions([LONG], [LONG]), "letter doubled", 0)
    assert found.contexts == [LONG]
    assert found.questions != [LONG]
