"""A task and replayed text under several layouts against transformers' classes with one body, by torch in fp64.

The reference takes the rows of a step whole and knows nothing of weights by row: the mean loss of the task's targets,
plus the loss weight times the mean loss of the text's.
"""

from __future__ import annotations

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
from tests.engine.tasks.starts import write_start as write_encoder

TOLERANCE = 3e-6
"""Losses of about 6 in fp32 against fp64, over six updates."""
LOSS_WEIGHT, RATIO = 0.5, 0.4
SMOOTHING = 0.2
"""Share of label smoothing of the answers, which the text beside them is without."""
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


def replay_of(folder: Path) -> dict[str, Any]:
    return {
        "ratio": RATIO,
        "source": str(folder / "train"),
        "loss_weight": LOSS_WEIGHT,
        "validation": {"held out": str(folder / "validation")},
    }


def mixed_run(folder: Path, objective: str, parallel: dict[str, Any]) -> RunConfig:
    """A run of a task that replays the text of its start, which is in `folder` beside it."""
    stage = {"replay": replay_of(folder), "sequence_length": 24}
    if objective == "answer":
        return answer_run(folder, "run", "pairs", parallel, SMOOTHING, **stage)
    return task_run(folder, parallel, objective, stage=stage)


def write_task(folder: Path, form: str, objective: str) -> None:
    if objective == "answer":
        write_start(folder, form, "pairs")
    else:
        write_encoder(folder, form)


class TwoHeads(torch.nn.Module):
    """Their class for sequence classification and that for masked tokens around one body, in fp64."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        weights = starting_weights(config)
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

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        given, is_text = batch.inputs, batch.domains_B == 1
        rows = torch.nonzero(~is_text).flatten().tolist()
        # one by one: a padding token that sees none but others is NaN in their ModernBERT
        logits = [self.task(given["tokens_BT"][row][given["segments_BT"][row] == 0][None]).logits for row in rows]
        task = F.cross_entropy(torch.cat(logits), given["labels_B"][rows])
        losses = []
        for row in torch.nonzero(is_text).flatten().tolist():
            tokens, masked = given["tokens_BT"][row], given["replay_masked_BM"][row]
            counts = given["replay_weights_BM"][row] > 0
            segments = given["segments_BT"][row]
            for segment in segments.unique().tolist():
                at = torch.nonzero(segments == segment).flatten()
                inside = counts & (segments[masked] == segment)
                if inside.any():
                    logits = self.text(input_ids=tokens[at][None]).logits[0][masked[inside] - at[0]]
                    losses.append(F.cross_entropy(logits, given["replay_targets_BM"][row][inside], reduction="none"))
        return task, torch.cat(losses).mean()


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

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for row, domain in enumerate(batch.domains_B.tolist()):
            given = {name: tensor[row] for name, tensor in batch.inputs.items()}
            segments = given["decoder_segments_BT" if self.is_t5 else "segments_BT"]
            for segment in segments.unique().tolist():
                at, counts = segments == segment, given["weights_BT"] > 0
                if not (at & counts).any():
                    continue
                logits, smoothing = self._logits(given, segment, at), 0.0 if domain else SMOOTHING
                own = (logits[counts[at]], given["targets_BT"][at & counts])
                found[domain].append(F.cross_entropy(*own, reduction="none", label_smoothing=smoothing))
        task, text = (torch.cat(losses).mean() for losses in found)
        return task, text

    def _logits(self, given: dict[str, torch.Tensor], segment: int, at: torch.Tensor) -> torch.Tensor:
        if not self.is_t5:
            return self.model(input_ids=given["tokens_BT"][at][None]).logits[0]
        encoder = given["tokens_BS"][given["segments_BS"] == segment][None]
        return self.model(input_ids=encoder, decoder_input_ids=given["decoder_tokens_BT"][at][None]).logits[0]


def by_torch(config: RunConfig) -> tuple[list[float], list[tuple[float, float]]]:
    """Losses of the steps of a run, and those of the task and of the text apart."""
    model = OneHead(config) if config.model.task_head is None else TwoHeads(config)
    apart = []

    def gradients(step: int, batch: Batch) -> torch.Tensor:
        del step
        task, text = model.losses(batch)
        apart.append((task.item(), text.item()))
        loss = task + LOSS_WEIGHT * text
        loss.backward()
        return loss

    return trained_by_torch(config, model, gradients), apart


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.matrix) for name in MORE)])
def test_losses_are_those_of_torch_on_the_same_rows(tmp_path, case):
    form, objective, world_size, parallel = (CASES | MORE)[case]
    write_task(tmp_path, form, objective)
    config = mixed_run(tmp_path, objective, parallel)
    found = run_ranks(world_size, train_rank, config.model_dump(mode="json", exclude_none=True))
    assert {one["code"] for one in found} == {0}
    steps = steps_of(config)
    losses, apart = by_torch(config)
    assert [record["loss"] for record in steps] == pytest.approx(losses, abs=TOLERANCE)
    told = [(record["loss/new"], record["loss/replay"]) for record in steps]
    assert told == [pytest.approx(pair, abs=2 * TOLERANCE) for pair in apart]
    # two of five rows in each step, to one row
    assert [record["replay_samples"] for record in steps] == [2 * step for step in range(1, STEPS + 1)]
    evaluated = [record for record in records_of(config.folder) if "validation_loss" in record]
    assert evaluated[-1]["validation_loss/held out"] > 0


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
