"""Fine-tuning under several layouts against transformers' class for sequences, trained by torch in one process."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.huggingface import to_huggingface
from engine.config.schema.objective import ObjectiveName
from engine.config.schema.run import RunConfig
from engine.data.batch import Batch
from engine.data.shards.dataset import TokenDataset
from engine.data.tokenizer.folder import load_tokenizer
from engine.data.validation import ValidationSamples
from engine.tasks.kinds import KINDS
from engine.tasks.resolve import resolve_task
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import train_rank, write_sentences
from tests.distributed.task_training import (
    BATCH,
    STEPS,
    TOLERANCE,
    starting_weights,
    their_model,
    trained_by_torch,
    validation_batch,
)
from tests.engine.models.tiny import random_weights, tiny

SMOOTHING = 0.2
"""Share of label smoothing, in the cases of words and of answers; validation losses are without it."""
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "bert-zero3-tensor2": ("bert", "classification", 4, {"zero_stage": 3, "tensor": 2}),
    "roberta-pipe2": ("roberta", "classification", 2, {"zero_stage": 1, "pipe": 2}),
    "llama-sequence2": ("llama", "regression", 4, {"zero_stage": 2, "tensor": 2, "sequence_parallel": True}),
    "bert-tokens": ("bert", "token_classification", 4, {"zero_stage": 1, "pipe": 2, "tensor": 2}),
    "bert-answers-ulysses2": ("bert", "question_answering", 2, {"zero_stage": 1, "sequence": 2}),
    "modernbert-mean-ulysses2": ("modernbert", "classification", 4, {"zero_stage": 1, "sequence": 2, "tensor": 2}),
}
MORE: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "modernbert-mean-zero3-pipe2": ("modernbert", "classification", 4, {"zero_stage": 3, "pipe": 2}),
    "gpt2-zb-h1": ("gpt2", "classification", 2, {"zero_stage": 1, "pipe": 2, "schedule": "zb-h1"}),
    "bert-ulysses2": ("bert", "regression", 2, {"zero_stage": 0, "sequence": 2}),
    "llama-chunks": ("llama", "classification", 2, {"zero_stage": 1, "pipe": 2, "chunks_per_stage": 2}),
    "gpt2-ulysses2": ("gpt2", "classification", 2, {"zero_stage": 1, "sequence": 2}),
    "llama-tokens-sequence2": (
        "llama",
        "token_classification",
        4,
        {"zero_stage": 3, "tensor": 2, "sequence_parallel": True},
    ),
    "roberta-tokens-ulysses2": ("roberta", "token_classification", 2, {"zero_stage": 2, "sequence": 2}),
    "gpt2-tokens-zb-h1": ("gpt2", "token_classification", 2, {"zero_stage": 1, "pipe": 2, "schedule": "zb-h1"}),
    "modernbert-tokens": ("modernbert", "token_classification", 2, {"zero_stage": 0, "pipe": 2}),
    "llama-answers-zero3-tensor2": ("llama", "question_answering", 4, {"zero_stage": 3, "tensor": 2}),
    "modernbert-answers-pipe2": ("modernbert", "question_answering", 2, {"zero_stage": 1, "pipe": 2}),
    "gpt2-answers": (
        "gpt2",
        "question_answering",
        4,
        {"zero_stage": 1, "sequence": 2, "tensor": 2, "sequence_parallel": True},
    ),
}


def pretrained(folder: Path, form: str, tokenizer: Path) -> None:
    """A folder of theirs with random weights, and its tokenizer."""
    loaded = load_tokenizer(tokenizer)
    sizes = {"vocab_size": loaded.vocab_size, "vocab_multiple": 8, "max_positions": 48, "num_layers": 4}
    roberta = {"pair_head": False, "token_types": 1} if form == "roberta" else {}
    model = tiny("bert" if form == "roberta" else form, **sizes, **roberta)
    config, state = to_huggingface(model, random_weights(model, seed=2), loaded.vocabulary.padding)
    kind = getattr(transformers, form_of(model).architecture)
    kind.from_pretrained(None, config=config, state_dict=state).save_pretrained(folder)
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def token_record(number: int) -> dict[str, Any]:
    words = ["the", "ink", "fades", "in", "the", "old", "codex"][: number % 4 + 3] * (number % 3 + 1)
    tags = [("B-thing" if word in ("ink", "codex") else "I-thing" if word == "fades" else "O") for word in words]
    return {"tokens": words, "tags": tags}


def answer_record(number: int) -> dict[str, Any]:
    text = "one thrifty monk hides older lines. the ink fades. " * (number % 3 + 1)
    answer = ("thrifty monk", "lines", "ink fades")[number % 3]
    return {"context": text, "question": "who hides?", "answers": [{"text": answer, "start": text.rindex(answer)}]}


def write_examples(folder: Path, task: str, has_pairs: bool) -> None:
    records = {"token_classification": token_record, "question_answering": answer_record}
    if make := records.get(task):
        for part, count in (("train", 23), ("validation", 9)):
            lines = (json.dumps(make(number)) + "\n" for number in range(count))
            (folder / f"{part}.jsonl").write_text("".join(lines))
        return
    for part, count in (("train", 23), ("validation", 9)):
        with (folder / f"{part}.jsonl").open("w") as file:
            for number in range(count):
                record: dict[str, Any] = {"sentence": "the ink fades " * (number % 5 + 1)}
                if has_pairs:
                    record["other"] = "one thrifty monk hides " * (number % 3 + 1)
                record["kind"] = ["old", "new", "scraped"][number % 3] if task == "classification" else number / 7 - 1
                file.write(json.dumps(record) + "\n")


def task_run(folder: Path, form: str, task: str, parallel: dict[str, Any], reads_mean: bool) -> RunConfig:
    columns: dict[str, Any] = {"text": "sentence", "label": "kind"}
    if form == "bert" and task in ("classification", "regression"):
        columns["pair"] = "other"
    data = {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl"), "columns": columns}
    objective: dict[str, Any] = {"name": task} | ({"stride": 12} if task == "question_answering" else {})
    if task in ("token_classification", "question_answering"):
        objective["label_smoothing"] = SMOOTHING
    stage = {"objective": objective, "data": data, "global_batch_size": BATCH, "duration": {"steps": STEPS}}
    tree: dict[str, Any] = {
        "folder": str(folder / "run"),
        "init_from": str(folder / "theirs"),
        "stages": [stage],
        "model": {"dropout": 0.0} | ({"task_head": {"pooling": "mean"}} if reads_mean else {}),
        "seed": 3,
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0, "clip_norm": 0.7},
        "precision": {"dtype": "fp32"},
        "parallel": {"micro_batch_size": 2} | parallel,
        "logging": {"tensorboard": False, "wandb": "off", "plot": False},
        "checks": True,
    }
    return resolve_task(tree, "test task")


def of_words(
    given: dict[str, torch.Tensor], rows: list[int], logits: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the tokens that have a label."""
    counted_BT = given["label_weights_BT"][rows] > 0
    found = [each[0][counted_T[: each.size(1)]] for each, counted_T in zip(logits, counted_BT, strict=True)]
    return torch.cat(found), given["labels_BT"][rows][counted_BT]


class Theirs:
    """Their class with the weights that a run begins with, in fp64, and its losses of our batches."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.task: ObjectiveName = config.stages[0].objective.name
        self.model = their_model(config, starting_weights(config))

    def logits_of(self, given: dict[str, torch.Tensor], row: int) -> torch.Tensor:
        """Each row by itself: theirs then sees no padding."""
        length, config = int((given["segments_BT"][row] == 0).sum()), self.config.model
        inputs = {"input_ids": given["tokens_BT"][row : row + 1, :length]}
        if config.tells_segments_apart:
            inputs["token_type_ids"] = given["token_types_BT"][row : row + 1, :length]
        if self.task == "question_answering":
            output = self.model(**inputs)
            return torch.stack([output.start_logits, output.end_logits], dim=-1)
        if config.family != "gpt" or self.task == "token_classification":
            return self.model(**inputs).logits
        return self.model.score(self.model.base_model(**inputs).last_hidden_state[:, -1])  # whichever token pads

    def loss_of(self, batch: Batch, smoothing: float = 0.0) -> torch.Tensor:
        given, rows = batch.inputs, examples_of(batch)
        cross_entropy = partial(F.cross_entropy, label_smoothing=smoothing)
        logits = [self.logits_of(given, row) for row in rows]
        if self.task == "token_classification":
            return cross_entropy(*of_words(given, rows, logits))
        if self.task == "question_answering":
            spans = [given["label_spans_B2"][row] for row in rows]
            both = [cross_entropy(each[0].T, span_2) for each, span_2 in zip(logits, spans, strict=True)]
            return torch.stack(both).mean()
        if self.task == "regression":
            return F.mse_loss(torch.cat(logits), given["labels_BC"][rows].double())
        return F.cross_entropy(torch.cat(logits), given["labels_B"][rows])

    def gradients(self, step: int, batch: Batch) -> torch.Tensor:
        del step
        loss = self.loss_of(batch, self.config.stages[0].objective.label_smoothing)
        loss.backward()
        return loss

    @torch.no_grad()
    def main_measure(self, batch: Batch) -> float:
        """The main measure on a batch of all validation rows: of words and of answers as their kind decodes logits."""
        given, rows = batch.inputs, examples_of(batch)
        if self.task == "regression":
            return self.loss_of(batch).item()
        if self.task == "classification":
            logits_BC = torch.cat([self.logits_of(given, row) for row in rows])
            return (logits_BC.argmax(1) == given["labels_B"][rows]).double().mean().item()
        stage = self.config.stages[0]
        assert isinstance(stage.data.validation, str)
        validation = TokenDataset(stage.data.validation)
        samples = ValidationSamples(validation, stage.sequence_length, stage.data.attention, objective=stage.objective)
        in_order = [(one.inputs, row) for one in samples.batches(0, 1, 1) for row in range(one.num_rows)]
        logits = [self.logits_of(*row)[0].float().numpy() for row in in_order]
        kind = KINDS[self.task]
        return kind.decode(logits, validation, stage.objective).measures()[kind.main_measure.name]


def examples_of(batch: Batch) -> list[int]:
    """The rows of a batch that are no padding."""
    return (batch.samples_B3[:, 0] >= 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.matrix) for name in MORE)])
def test_losses_are_those_of_transformers_and_torch(tmp_path, case):
    form, task, world_size, parallel = (CASES | MORE)[case]
    write_sentences(tmp_path, "wordpiece", 260, "masked")
    pretrained(tmp_path / "theirs", form, tmp_path / "tokenizer")
    write_examples(tmp_path, task, has_pairs=form == "bert")
    config = task_run(tmp_path, form, task, parallel, reads_mean="mean" in case)
    assert config.stages[0].data.row_lengths, "steps have rows of several lengths"
    found = run_ranks(world_size, train_rank, config.model_dump(mode="json", exclude_none=True))
    assert {one["code"] for one in found} == {0}
    records = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    theirs = Theirs(config)
    losses, validation = trained_by_torch(config, theirs.model, theirs.gradients), validation_batch(config)
    with torch.no_grad():
        validation_loss = theirs.loss_of(validation).item()
    measured = theirs.main_measure(validation)
    assert [record["loss"] for record in steps] == pytest.approx(losses, abs=TOLERANCE)
    (last,) = [record for record in records if record["step"] == STEPS and "validation_loss" in record]
    assert last["validation_loss"] == pytest.approx(validation_loss, abs=TOLERANCE)
    assert last[config.checkpoint.best_metric] == pytest.approx(measured, abs=TOLERANCE)
