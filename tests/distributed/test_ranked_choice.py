"""Questions ranked while a run goes on: equal in every layout to one process, and that to lm-evaluation-harness on the
run's exported folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.evaluate.harness import harness_model, run_harness
from engine.evaluate.subject import open_subject
from engine.serve.export import export
from engine.serve.source import open_trained
from engine.train.metrics import read_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus
from tests.engine.evaluate.harness_task import CHOICE_TASK

STEPS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("choices")
    write_corpus(folder)
    with (folder / "questions.jsonl").open("w") as file:
        for number in range(23):
            choices = [f" {number * number}.", " abab and more", f" {number}"][: 2 + number % 2]
            record = {"context": f"document {number} says and", "choices": choices, "gold": number % len(choices)}
            file.write(json.dumps(record) + "\n")
    return folder


def measured(corpus: Path, folder: Path, world_size: int, **parallel: Any) -> dict[str, float]:
    tree = run_tree(corpus, folder, evaluation={"tasks": {"numbers": str(corpus / "questions.jsonl")}})
    tree["stages"][0]["duration"] = {"steps": STEPS}
    tree["parallel"] |= parallel
    run_ranks(world_size, train_rank, tree)
    (record,) = [one for one in read_metrics(folder) if "validation_loss" in one and one["step"] == STEPS]
    return {key: value for key, value in record.items() if key.endswith("/numbers")}


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, measured(corpus, folder, 1)


def test_one_process_has_the_numbers_of_the_harness_on_the_exported_folder(corpus, alone, tmp_path):
    pytest.importorskip("lm_eval")
    run, found = alone
    subject = open_subject(export(open_trained(run), tmp_path / "out").folder)
    (tmp_path / "task.yaml").write_text(CHOICE_TASK.format(name="numbers", path=corpus / "questions.jsonl"))
    (told,) = run_harness(subject, [str(tmp_path / "task.yaml")])
    assert found["validation_accuracy/numbers"] == pytest.approx(told["measures"]["acc"])
    assert found["validation_accuracy_by_length/numbers"] == pytest.approx(told["measures"]["acc_norm"])
    from lm_eval.api.instance import Instance

    records = [json.loads(line) for line in (corpus / "questions.jsonl").read_text().splitlines()]
    golds = [record["choices"][record["gold"]] for record in records]
    pairs = [(record["context"], gold) for record, gold in zip(records, golds, strict=True)]
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    nats = -sum(value for value, _ in harness_model(subject).loglikelihood(asked))
    expected = nats / math.log(2) / sum(len(gold.encode()) for gold in golds)
    assert found["validation_bits_per_byte/numbers"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (4, {"pipe": 2, "tensor": 2, "zero_stage": 1}),
        pytest.param(4, {"sequence": 2, "data": 2, "zero_stage": 3}, marks=pytest.mark.matrix),
        pytest.param(4, {"data": 4, "zero_stage": 2, "micro_batch_size": 1}, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_every_layout_ranks_as_one_process(corpus, alone, tmp_path, world_size, parallel):
    _, expected = alone
    assert len(expected) == 3
    # fp32 over some steps of another order of sums: the training itself is that far apart
    assert measured(corpus, tmp_path / "run", world_size, **parallel) == pytest.approx(expected, rel=1e-5)
