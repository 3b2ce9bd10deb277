"""`palimpsest finetune` as a user calls it: train, measure, export; and again, where it was interrupted."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from engine import outcome
from engine.checkpoint.folder import step_of
from engine.cli import main
from engine.config.load import load_run
from engine.config.schema.run import InitFrom
from engine.tasks.in_training import numbers
from engine.tasks.resolve import resolve_task
from engine.train.records import read_metrics
from tests.engine.serve.runs import save
from tests.engine.tasks.starts import tree_of, write_examples, write_start
from tests.tools.finetuning import finetune, write_task
from tests.tools.folder_in_use import contents, held
from tools.finetune import finish

pytestmark = pytest.mark.usefixtures("bare_node")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


def test_a_classifier_is_trained_measured_and_exported(tmp_path, start):
    write_examples(tmp_path, count=24)
    shutil.copytree(start / "hf", tmp_path / "hf")
    task = write_task(tmp_path, tree_of(tmp_path, tmp_path, duration={"steps": 2}, global_batch_size=24))
    done = finetune(task)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    measures = json.loads((run / "measures.json").read_text())
    assert measures["examples"] == 4
    # recorded while it was trained, in the same numbers: those of the best checkpoint
    recorded = {record["step"]: record for record in read_metrics(run) if "validation_accuracy" in record}
    accuracies = {step: record["validation_accuracy"] for step, record in recorded.items()}
    assert measures["step"] == max(accuracies, key=lambda step: (accuracies[step], -step))
    assert step_of((run / "best").resolve()) == measures["step"]
    assert numbers(measures) == {
        name.removeprefix("validation_"): value
        for name, value in recorded[measures["step"]].items()
        if name.startswith("validation_") and name not in ("validation_loss", "validation_seconds")
    }
    assert f"validation loss {recorded[1]['validation_loss']:.4f}  accuracy {accuracies[1]:.4f}" in done.stdout
    assert {"learning.png", "confusion.png"} < {path.name for path in run.iterdir()}
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    classify = pipeline("text-classification", str(run / "huggingface"), top_k=None)
    answers: list[Any] = [*classify(texts)]
    for found, ours in zip(answers, predictions, strict=True):
        theirs = {one["label"]: one["score"] for one in found}
        assert ours["predicted"] == max(theirs, key=theirs.__getitem__)
        assert ours["probabilities"] == pytest.approx(theirs, abs=1e-5)
    shutil.rmtree(tmp_path / "hf")
    again = finetune(task, "stages.0.duration.steps=3")
    assert again.returncode == 0, again.stderr
    assert "step 2" in again.stdout + again.stderr, "it goes on from the checkpoint, also without its start"
    assert "the run goes on from its own checkpoints" in again.stdout + again.stderr
    refused = finetune(task, "seed=5")
    assert refused.returncode == 2
    assert "belongs to another run:\n  seed: 0 -> 5" in refused.stderr


def test_an_adapter_is_written_alone_and_merged(tmp_path, start):
    write_examples(tmp_path, count=24)
    tree = tree_of(tmp_path, start, duration={"steps": 3}, global_batch_size=6)
    done = finetune(write_task(tmp_path, tree | {"adapter": {"method": "lora", "rank": 2}}))
    assert done.returncode == 0, done.stderr
    assert re.search(r"[\d,]+ of [\d,]+ parameters are trained", done.stdout + done.stderr)
    run = tmp_path / "run"
    merged: Any = AutoModelForSequenceClassification.from_pretrained(run / "huggingface").eval()
    base: Any = AutoModelForSequenceClassification.from_pretrained(start / "hf")
    apart: Any = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["base_model_name_or_path"]) == (2, str(start / "hf"))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(apart(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=1e-5)
    # written again by a run whose start is gone since: it says all the same what it belongs to
    gone = str(tmp_path / "gone")
    finish(load_run(run / "config.yaml").model_copy(update={"init_from": InitFrom(path=gone)}))
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == gone


def test_in_a_folder_in_use_nothing_is_encoded(tmp_path, start):
    write_examples(tmp_path)
    task = write_task(tmp_path, tree_of(tmp_path, start))
    with held("127.0.0.1:4321") as holder:
        before = contents(tmp_path / "run")
        done = finetune(task)
        assert (done.returncode, f"is in use: process {holder} on " in done.stderr) == (1, True)
        assert contents(tmp_path / "run") == before


def test_what_is_wrong_with_the_examples_is_told_in_the_outcome(tmp_path, start, capsys):
    write_examples(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(b"\xff\x00")
    assert main(["finetune", write_task(tmp_path, tree_of(tmp_path, start))]) == 1
    assert "train.jsonl" in capsys.readouterr().err
    said = outcome.read(tmp_path / "run")
    assert said is not None
    assert (said.code, "train.jsonl" in said.error) == (1, True)


def finished(folder: Path, start: Path, objective: str, rows: list[dict[str, Any]]) -> Path:
    """The run folder of a task whose checkpoint holds random weights, with predictions, measures and export."""
    for part in ("train", "validation"):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = resolve_task(tree_of(folder, start, objective, duration={"steps": 2}), "test task")
    save(run, 2, seed=1)
    finish(run)
    return folder / "run"


def test_the_mean_rank_of_an_exported_checkpoint_is_told(tmp_path, start, capsys):
    write_examples(tmp_path)
    adapter = {"method": "adalora", "rank": 2, "initial_rank": 5, "targets": ["query", "value"]}
    tree = tree_of(tmp_path, start, duration={"steps": 2}) | {"adapter": adapter}
    run = resolve_task(tree, "test task")
    save(run, 2, seed=1)  # random weights: no element is zero, as before the first choice
    finish(run)
    told = "/adapter, mean rank 5 and not 2: step 2 lies before the last choice of ranks"
    assert told in capsys.readouterr().out
    assert run.model.adapter is not None
    model = run.model.model_copy(update={"adapter": run.model.adapter.model_copy(update={"rank": 5})})
    chosen = run.model_copy(update={"model": model})
    finish(chosen)
    assert "/adapter, mean rank 5\n" in capsys.readouterr().out


def test_entities_are_those_of_the_pipeline(tmp_path, start):
    words = ["the", "ink", "fades", "in", "the", "old", "codex"]
    tags = ["O", "B-thing", "I-thing", "O", "O", "O", "B-thing"]
    run = finished(tmp_path, start, "token_classification", [{"tokens": words[n:], "tags": tags[n:]} for n in range(3)])
    assert 0 <= json.loads((run / "measures.json").read_text())["f1"] <= 1
    classify: Any = pipeline("token-classification", str(run / "huggingface"), ignore_labels=[])
    for line in (run / "predictions.jsonl").read_text().splitlines():
        ours = json.loads(line)
        by_start = {one["start"]: one["entity"] for one in classify(ours["text"])}
        at, found = 0, []
        for word in ours["words"]:
            at = ours["text"].index(word, at)
            found.append(by_start[at])
            at += len(word)
        assert found == ours["predicted"]


def test_answers_are_those_of_the_exported_model(tmp_path, start):
    context = "one thrifty monk hides older lines. the ink fades."
    row = {"context": context, "question": "who?", "answers": [{"text": "monk", "start": context.index("monk")}]}
    run = finished(tmp_path, start, "question_answering", [row])
    assert 0 <= json.loads((run / "measures.json").read_text())["exact_match"] <= 1
    model = AutoModelForQuestionAnswering.from_pretrained(run / "huggingface").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "huggingface")
    given: Any = tokenizer("who?", context, return_tensors="pt", return_offsets_mapping=True)
    offsets, inside_T = given.pop("offset_mapping")[0], torch.tensor([part == 1 for part in given.sequence_ids(0)])
    with torch.inference_mode():
        output = model(**given)
    scores_TT = output.start_logits[0][:, None] + output.end_logits[0][None, :]
    allowed_TT = (inside_T[:, None] & inside_T[None, :]).triu().tril(29)  # answers of 30 tokens at the most
    best = int(scores_TT.masked_fill(~allowed_TT, -torch.inf).argmax())
    first, last = divmod(best, len(inside_T))
    (predicted,) = map(json.loads, (run / "predictions.jsonl").read_text().splitlines())
    assert (predicted["start"], predicted["end"]) == (int(offsets[first][0]), int(offsets[last][1]))
    assert predicted["best"][0]["score"] == pytest.approx(scores_TT.flatten()[best].item(), abs=1e-4)


def test_a_run_file_is_prepared_for_launch(tmp_path, start, capsys):
    write_examples(tmp_path)
    task = write_task(tmp_path, tree_of(tmp_path, start))
    assert main(["finetune", task, "--prepare", str(tmp_path / "run.yaml")]) == 0
    assert "3 steps of 20 examples" in capsys.readouterr().out
    assert main(["finetune", task, "--prepare", str(tmp_path / "run.yaml")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "run.yaml"), "--world", "2"]) == 0


def test_a_task_file_is_not_for_train(tmp_path, start, capsys):
    write_examples(tmp_path)
    task = write_task(tmp_path, tree_of(tmp_path, start, duration={"epochs": 1}))
    assert main(["plan", task, "--world", "1"]) == 2
