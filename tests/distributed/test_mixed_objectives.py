"""A task and replayed text under several layouts against transformers' classes with one body, by torch in fp64.

The reference takes the rows of a step whole and knows nothing of weights by row: the mean loss of the task's targets,
plus the loss weight times the mean loss of the text's; with distillation the same of their divergences from what the
first weights predict.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from engine.checkpoint.interchange.huggingface import to_huggingface
from engine.config.schema.model import ModelConfig, without_vocabulary
from engine.config.schema.run import RunConfig
from engine.data.batch import Batch
from engine.data.tokenizer.folder import load_tokenizer
from engine.models.families import family
from tests.distributed.answer_training import answer_run, records_of, write_start
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import stop_after, train_rank
from tests.distributed.task_training import (
    STEPS,
    starting_weights,
    steps_of,
    task_run,
    their_model,
    trained_by_torch,
)
from tests.engine.models.tiny import random_weights
from tests.engine.serve.runs import save
from tests.engine.tasks.starts import write_start as write_encoder

TOLERANCE = 3e-6
"""Losses of about 6 in fp32 against fp64, over six updates."""
LOSS_WEIGHT, RATIO = 0.5, 0.4
SMOOTHING = 0.2
"""Share of label smoothing of the answers, which the text beside them is without."""
DISTILLATION, TOP_K, SEED = 2.0, 7, 4
Case = tuple[str, str, int, dict[str, Any]]
"""Form of the model, objective, ranks, layout."""
CASES: dict[str, Case] = {"bert-zero3-tensor2": ("bert", "classification", 2, {"zero_stage": 3, "tensor": 2})}
MORE: dict[str, Case] = {
    "bert-pipe2-data2": ("bert", "classification", 4, {"zero_stage": 1, "pipe": 2, "data": 2}),
    "modernbert-zero3-data3": ("modernbert", "classification", 3, {"zero_stage": 3, "data": 3}),
    "bert-ulysses": ("bert", "classification", 2, {"zero_stage": 2, "sequence": 2}),
    "gpt2-zero3-pipe2": ("gpt2", "answer", 2, {"zero_stage": 3, "pipe": 2}),
    "llama-tensor2-sequence": ("llama", "answer", 2, {"zero_stage": 1, "tensor": 2, "sequence_parallel": True}),
    "t5-zero1-tensor2": ("t5", "answer", 2, {"zero_stage": 1, "tensor": 2}),
}


DISTILLED: dict[str, Case] = {
    "bert-kept-head": ("bert", "classification", 2, {"zero_stage": 3, "tensor": 2}),
}
MORE_DISTILLED: dict[str, Case] = {
    "bert-new-head": ("bert", "classification", 4, {"zero_stage": 1, "pipe": 2, "data": 2}),
    "bert-ulysses-kept-head": ("bert", "classification", 2, {"zero_stage": 2, "sequence": 2}),
    "llama": ("llama", "answer", 2, {"zero_stage": 1, "tensor": 2, "sequence_parallel": True}),
}


def replay_of(folder: Path) -> dict[str, Any]:
    return {
        "ratio": RATIO,
        "source": str(folder / "train"),
        "loss_weight": LOSS_WEIGHT,
        "validation": {"held out": str(folder / "validation")},
    }


def mixed_run(beside: Path, objective: str, parallel: dict[str, Any], distils: bool = False, **keys: Any) -> RunConfig:
    """A run of a task that replays the text of its start, which is in the folder `beside` it."""
    stage: dict[str, Any] = {"replay": replay_of(beside), "sequence_length": 24}
    if distils:
        stage["regularization"] = {"distillation": {"strength": DISTILLATION, "top_k": TOP_K}}
    if objective == "answer":
        return answer_run(beside, "run", "pairs", parallel, SMOOTHING, **stage)
    return task_run(beside, parallel, objective, stage=stage, **keys)


def write_task(folder: Path, form: str, objective: str) -> None:
    if objective == "answer":
        write_start(folder, form, "pairs")
    else:
        write_encoder(folder, form)


Predictions = tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Logits and targets of the task and of the text, one of each for each target."""


class TwoHeads(torch.nn.Module):
    """Their class for sequence classification and that for masked tokens around one body, in fp64."""

    def __init__(self, config: RunConfig, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        plain = config.model_copy(update={"model": without_vocabulary(config.model)})
        self.task = their_model(plain, _of(plain.model, weights))
        model = config.model.model_copy(update={"task_head": None, "pair_head": False})
        padding = load_tokenizer(config.tokenizer).vocabulary.padding
        their_config, state = to_huggingface(model, _of(model, weights), padding)
        kind = transformers.AutoModelForMaskedLM
        text = kind.from_config(their_config, attn_implementation="eager").double()
        text.load_state_dict(state, strict=False)
        setattr(text, text.base_model_prefix, self.task.base_model)
        if hasattr(text, "head"):  # ModernBERT's transformation is in front of either head
            text.head = self.task.head
        text.tie_weights()
        self.text = text

    def predictions(self, batch: Batch) -> Predictions:
        given, is_text = batch.inputs, batch.domains_B == 1
        rows = torch.nonzero(~is_text).flatten().tolist()
        # one by one: a padding token that sees none but others is NaN in their ModernBERT
        task = [self.task(given["tokens_BT"][row][given["segments_BT"][row] == 0][None]).logits for row in rows]
        text, targets = [], []
        for row in torch.nonzero(is_text).flatten().tolist():
            tokens, masked = given["tokens_BT"][row], given["replay_masked_BM"][row]
            counts = given["replay_weights_BM"][row] > 0
            segments = given["segments_BT"][row]
            for segment in segments.unique().tolist():
                at = torch.nonzero(segments == segment).flatten()
                inside = counts & (segments[masked] == segment)
                if inside.any():
                    text.append(self.text(input_ids=tokens[at][None]).logits[0][masked[inside] - at[0]])
                    targets.append(given["replay_targets_BM"][row][inside])
        return (torch.cat(task), given["labels_B"][rows]), (torch.cat(text), torch.cat(targets))


def _of(model: ModelConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {spec.name: weights[spec.name] for spec in family(model).specs(model)}


class OneHead(torch.nn.Module):
    """Their class that predicts tokens, in fp64."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        assert config.init_from is not None
        is_t5 = config.model.family == "t5"
        kind = transformers.AutoModelForSeq2SeqLM if is_t5 else transformers.AutoModelForCausalLM
        self.model = kind.from_pretrained(config.init_from.path, attn_implementation="eager").double().eval()
        self.is_t5 = is_t5

    def predictions(self, batch: Batch) -> Predictions:
        found: tuple[list[tuple[torch.Tensor, torch.Tensor]], ...] = ([], [])
        for row, domain in enumerate(batch.domains_B.tolist()):
            given = {name: tensor[row] for name, tensor in batch.inputs.items()}
            segments = given["decoder_segments_BT" if self.is_t5 else "segments_BT"]
            for segment in segments.unique().tolist():
                at, counts = segments == segment, given["weights_BT"] > 0
                if not (at & counts).any():
                    continue
                logits = self._logits(given, segment, at)
                found[domain].append((logits[counts[at]], given["targets_BT"][at & counts]))
        task, text = ((torch.cat([said for said, _ in one]), torch.cat([target for _, target in one])) for one in found)
        return task, text

    def _logits(self, given: dict[str, torch.Tensor], segment: int, at: torch.Tensor) -> torch.Tensor:
        if not self.is_t5:
            return self.model(input_ids=given["tokens_BT"][at][None]).logits[0]
        encoder = given["tokens_BS"][given["segments_BS"] == segment][None]
        return self.model(input_ids=encoder, decoder_input_ids=given["decoder_tokens_BT"][at][None]).logits[0]


def divergence(said_NV: torch.Tensor, taught_NV: torch.Tensor, top_k: int) -> torch.Tensor:
    """The mean divergence from the likeliest of what the first weights predict, whose sum is made 1."""
    best_NK, chosen_NK = taught_NV.topk(top_k, dim=-1)
    return F.kl_div(said_NV.log_softmax(-1).gather(1, chosen_NK), best_NK.softmax(-1), reduction="batchmean")


class ByTorch:
    """Losses of the steps of a run, those of the task and of the text apart, and the terms of distillation."""

    def __init__(self, config: RunConfig, weights: dict[str, torch.Tensor] | None = None) -> None:
        self.has_one_head = config.model.task_head is None
        self.model = OneHead(config) if self.has_one_head else TwoHeads(config, weights or starting_weights(config))
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.distils = config.stages[0].regularization.distillation is not None
        self.distils_task = self.has_one_head or config.distils_labels(0)
        self.apart: list[tuple[float, float]] = []
        self.distilled: list[float] = []
        self.losses = trained_by_torch(config, self.model, self.gradients)

    def gradients(self, step: int, batch: Batch) -> torch.Tensor:
        del step
        said_task, said_text = self.model.predictions(batch)
        task = F.cross_entropy(*said_task, label_smoothing=SMOOTHING if self.has_one_head else 0.0)
        text = F.cross_entropy(*said_text)
        self.apart.append((task.item(), text.item()))
        loss = task + LOSS_WEIGHT * text
        (loss + self.distillation(batch, said_task[0], said_text[0])).backward()
        return loss

    def distillation(self, batch: Batch, task: torch.Tensor, text: torch.Tensor) -> torch.Tensor | float:
        if not self.distils:
            return 0.0
        (taught_task, _), (taught_text, _) = self.teacher.predictions(batch)
        term = LOSS_WEIGHT * divergence(text, taught_text, TOP_K)
        if self.distils_task:
            term = term + divergence(task, taught_task, TOP_K if self.has_one_head else task.size(1))
        self.distilled.append(DISTILLATION * term.item())
        return DISTILLATION * term


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.matrix) for name in MORE)])
def test_losses_are_those_of_torch_on_the_same_rows(tmp_path, case):
    form, objective, world_size, parallel = (CASES | MORE)[case]
    write_task(tmp_path, form, objective)
    config = mixed_run(tmp_path, objective, parallel)
    found = run_ranks(world_size, train_rank, config.model_dump(mode="json", exclude_none=True))
    assert {one["code"] for one in found} == {0}
    steps = steps_of(config)
    expected = ByTorch(config)
    assert [record["loss"] for record in steps] == pytest.approx(expected.losses, abs=TOLERANCE)
    told = [(record["loss/new"], record["loss/replay"]) for record in steps]
    assert told == [pytest.approx(pair, abs=2 * TOLERANCE) for pair in expected.apart]
    # two of five rows in each step, to one row
    assert [record["replay_samples"] for record in steps] == [2 * step for step in range(1, STEPS + 1)]
    evaluated = [record for record in records_of(config.folder) if "validation_loss" in record]
    assert evaluated[-1]["validation_loss/held out"] > 0


@pytest.mark.parametrize(
    "case", [*DISTILLED, *(pytest.param(name, marks=pytest.mark.matrix) for name in MORE_DISTILLED)]
)
def test_what_the_first_weights_predict_is_distilled(tmp_path, case):
    """Of the text, and of a task's labels where the start has their head: then it is a run that has both heads."""
    form, objective, world_size, parallel = (DISTILLED | MORE_DISTILLED)[case]
    write_task(tmp_path, form, objective)
    keys, weights = {}, None
    if case.endswith("kept-head"):
        first = mixed_run(tmp_path, objective, {}, folder=str(tmp_path / "first"))
        save(first, 1, SEED)
        keys, weights = {"init_from": str(first.folder)}, random_weights(first.model, SEED)
    config = mixed_run(tmp_path, objective, parallel, distils=True, **keys)
    assert config.distils_labels(0) == case.endswith("kept-head")
    found = run_ranks(world_size, train_rank, config.model_dump(mode="json", exclude_none=True))
    assert {one["code"] for one in found} == {0}
    steps, expected = steps_of(config), ByTorch(config, weights)
    # gradients of 20 to 50, which are clipped: torch's own losses in fp32 and fp64 are as far apart
    assert [record["loss"] for record in steps] == pytest.approx(expected.losses, rel=1e-6)
    told = [record["regularization/distillation"] for record in steps]
    # sums of divergences in fp32, small beside the logits that they are of
    assert told == pytest.approx(expected.distilled, rel=1e-3, abs=DISTILLATION * TOLERANCE)
    assert max(expected.distilled) > 1e-2, "too small to show in a loss"


def test_a_run_that_was_stopped_and_goes_on_in_another_layout_is_the_undisturbed_one(tmp_path):
    write_task(tmp_path, "bert", "classification")
    whole = mixed_run(tmp_path, "classification", {"zero_stage": 1})
    cut = whole.model_copy(update={"folder": tmp_path / "cut"})
    trees = [one.model_dump(mode="json", exclude_none=True) for one in (whole, cut)]
    run_ranks(1, train_rank, trees[0])
    (stopped,) = run_ranks(1, train_rank, trees[1], partial(stop_after, step=3))
    assert stopped["state"].step == 3
    run_ranks(2, train_rank, trees[1] | {"parallel": trees[1]["parallel"] | {"zero_stage": 3, "pipe": 2}})
    expected, found = ({r["step"]: r for r in records_of(one.folder) if "loss" in r} for one in (whole, cut))
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for name in ("loss", "loss/new", "loss/replay"):
        assert [found[step][name] for step in found] == pytest.approx(
            [expected[step][name] for step in found], abs=TOLERANCE
        )
    assert [found[step].get("sample_hash") for step in found] == [expected[step].get("sample_hash") for step in found]
