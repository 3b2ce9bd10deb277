"""lm-evaluation-harness on a run against the package's own class on the exported folder."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import pytest
import torch

from engine.errors import ConfigError, EnvironmentProblem
from engine.evaluate import harness
from engine.evaluate.likelihood import Window, log_likelihoods, text_likelihoods
from engine.serve.export import export
from engine.serve.source import open_trained
from tests.engine.evaluate.conftest import SENTENCES
from tests.engine.evaluate.harness_task import CHOICE_TASK

pytest.importorskip("lm_eval")

CHOICES = [
    {"context": "The ink", "choices": [" fades", " sings", " is older than the page"], "gold": 0},
    {"context": "A palimpsest is a", "choices": [" page", " river"], "gold": 0},
    {"context": "刮去", "choices": ["旧文", "新文写上"], "gold": 1},
]


def requests(kind: Any, arguments: list[tuple]):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def test_a_run_answers_as_the_packages_own_class_on_the_exported_folder(run, causal, tmp_path):
    theirs_kind: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    folder = export(open_trained(run), tmp_path / "out").folder
    theirs = theirs_kind(pretrained=str(folder), device="cpu", batch_size=2, dtype="float32")
    ours = harness.harness_model(causal)
    pairs = [(row["context"], choice) for row in CHOICES for choice in row["choices"]] + [("", " page")]
    asked = requests("loglikelihood", pairs)
    for found, expected in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert found == (pytest.approx(expected[0], abs=1e-4), expected[1])
    rolling = requests("loglikelihood_rolling", [(text,) for text in SENTENCES])
    expected = theirs.loglikelihood_rolling(rolling)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(expected, abs=1e-3)
    # and our own likelihood of the same texts, which `--text` reports
    ids = [each.tolist() for each in causal.text.encode(SENTENCES)]
    assert text_likelihoods(causal, ids) == pytest.approx(expected, abs=1e-3)
    settings = {"until": ["."], "max_gen_toks": 8, "do_sample": False}
    until = requests("generate_until", [("The ink", settings), ("A palimpsest", settings)])
    assert ours.generate_until(until) == theirs.generate_until(until)


def test_a_task_of_local_files_is_ranked_by_likelihood(causal, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    (tmp_path / "task.yaml").write_text(CHOICE_TASK.format(name="tiny_choice", path=tmp_path / "rows.jsonl"))
    state = torch.random.get_rng_state()
    (found,) = harness.run_harness(causal, [str(tmp_path / "task.yaml")])
    assert torch.equal(torch.random.get_rng_state(), state)
    right = right_by_length = 0
    for row in CHOICES:
        context = causal.text.encode([row["context"]])[0].tolist()
        scores = []
        for choice in row["choices"]:
            whole = causal.text.encode([row["context"] + choice])[0].tolist()
            scores.append(log_likelihoods(causal, [Window(whole, len(whole) - len(context))])[0])
        right += scores.index(max(scores)) == row["gold"]
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right_by_length += by_length.index(max(by_length)) == row["gold"]
    assert (found["task"], found["examples"]) == ("tiny_choice", len(CHOICES))
    assert found["measures"]["acc"] == pytest.approx(right / len(CHOICES))
    assert found["measures"]["acc_norm"] == pytest.approx(right_by_length / len(CHOICES))


def test_what_cannot_be_loaded_is_told_by_name(causal, tmp_path):
    (tmp_path / "task.yaml").write_text(CHOICE_TASK.format(name="tiny_choice", path=tmp_path / "gone.jsonl"))
    with pytest.raises(ConfigError, match=r"--harness .*task\.yaml"):
        harness.run_harness(causal, [str(tmp_path / "task.yaml")])
    with pytest.raises(ConfigError, match=r"none\.yaml is not there"):
        harness.run_harness(causal, [str(tmp_path / "none.yaml")])


def test_the_missing_package_is_told_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EnvironmentProblem, match=r"palimpsest\[evaluate\]"):
        harness.require_harness()
