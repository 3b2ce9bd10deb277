"""Answers to prompts under several layouts against transformers' classes, trained by torch in fp64 on -100 labels.

The labels are made here from the files of examples by `AutoTokenizer`, and found by the tokens of an example alone.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from engine.config.schema.run import RunConfig
from engine.data.batch import Batch
from tests.distributed.answer_training import STEPS, answer_run, records_of, write_start
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import stop_after, train_rank
from tests.distributed.task_training import trained_by_torch, validation_batch

TOLERANCE = 3e-6
"""Losses of about 6 in fp32 against fp64, over six updates."""
UNSCALED = 8e-6
"""The same of T5 v1.1, whose logits are larger for want of a scale: torch's own losses in fp32 are 4e-6 from those in
fp64, and ours may lie as far on the other side."""
SMOOTHED, SMOOTHING = ("t5-pairs-zero1-tensor2", "llama-pairs-sequence"), 0.2
"""Cases with label smoothing; validation losses are without it."""
Case = tuple[str, str, int, dict[str, Any]]
"""Form of the model, `pairs` or `dialogues` with their packing, ranks, layout."""
CASES: dict[str, Case] = {
    "gpt2-pairs-zero3-pipe2": ("gpt2", "pairs", 2, {"zero_stage": 3, "pipe": 2}),
    "llama-packed-dialogues": ("llama", "dialogues best_fit", 1, {"zero_stage": 1}),
    "t5-pairs-zero1-tensor2": ("t5", "pairs", 2, {"zero_stage": 1, "tensor": 2}),
}
MORE: dict[str, Case] = {
    "gpt2-dialogues-one": ("gpt2", "dialogues concatenate", 1, {"zero_stage": 0}),
    "qwen2-packed-ulysses": ("qwen2", "dialogues best_fit", 2, {"zero_stage": 2, "sequence": 2}),
    "llama-pairs-sequence": ("llama", "pairs", 4, {"zero_stage": 3, "tensor": 2, "sequence_parallel": True}),
    "llama-dialogues-zb": ("llama", "dialogues concatenate", 2, {"zero_stage": 1, "pipe": 2, "schedule": "zb-h1"}),
    "t5-pairs-pipe2": ("t5", "pairs", 2, {"zero_stage": 1, "pipe": 2}),
    "t5-dialogues-ulysses": ("t5", "dialogues concatenate", 2, {"zero_stage": 3, "sequence": 2}),
    "t5-v1.1-sequence": ("t5-v1.1", "pairs", 2, {"zero_stage": 2, "tensor": 2, "sequence_parallel": True}),
}
Labels = dict[tuple[int, ...], list[int]]
"""Labels by the tokens of an example (in T5 those of its prompt and of its answer)."""


def labels_of(config: RunConfig, folder: Path, part: str) -> Labels:
    """Return the labels of a file's examples, -100 for what is not learned."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.tokenizer)
    end, is_t5, found = [tokenizer.eos_token_id], config.model.family == "t5", {}

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def add(rounds: list[tuple[list[int], list[int]]]) -> None:
        labels = [label for asked, said in rounds for label in [-100] * len(asked) + said]
        found[tuple(token for asked, said in rounds for token in asked + said)] = labels

    for line in (folder / f"{part}.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "prompt" in record:
            add([(ids(record["prompt"]) + (end if is_t5 else []), ids(record["answer"]) + end)])
            continue
        text, rounds = "", []
        for asked, said in zip(record["messages"][::2], record["messages"][1::2], strict=True):
            prompt = f"User: {asked['content']}\nAssistant:"
            if is_t5:
                add([(ids(text + prompt) + end, ids(said["content"]) + end)])
            else:  # the end of a line behind an answer stands before the next prompt
                rounds.append((ids(("\n" if rounds else "") + prompt), ids(f" {said['content']}") + end))
            text += f"{prompt} {said['content']}{tokenizer.eos_token}\n"
        if rounds:
            add(rounds)
    return found


def rows_of(batch: Batch, is_t5: bool) -> list[tuple[list[int], list[int]]]:
    """Return the examples of a batch: the tokens of the prompt and of the answer in T5, else all, and none."""
    given = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
    found: list[tuple[list[int], list[int]]] = []
    if is_t5:
        for row in np.flatnonzero(given["weights_BT"].any(1)):
            prompt = given["tokens_BS"][row][given["segments_BS"][row] == 0].tolist()
            found.append((prompt, given["targets_BT"][row][given["weights_BT"][row] > 0].tolist()))
        return found
    for row in np.flatnonzero(given["weights_BT"].any(1)):
        for segment in np.unique(given["segments_BT"][row]):
            at = np.flatnonzero(given["segments_BT"][row] == segment)
            if given["weights_BT"][row, at].any():  # padding is a segment, too
                found.append(([*given["tokens_BT"][row, at].tolist(), int(given["targets_BT"][row, at[-1]])], []))
    return found


def their_loss(model: Any, batch: Batch, labels: Labels, smoothing: float = 0.0) -> torch.Tensor:
    """Return the mean loss of all learned tokens of a batch, as their class computes it from labels; with label
    smoothing torch does, from their logits."""
    is_t5 = model.config.is_encoder_decoder
    inputs, targets = [], []
    for prompt, answer in rows_of(batch, is_t5):
        known = labels[tuple(prompt + answer)]
        inputs.append(torch.tensor(prompt))
        targets.append(torch.tensor(known[len(prompt) :] if is_t5 else known))
    padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = padded([torch.ones_like(row) for row in inputs])
    learned = padded(targets, padding_value=-100)
    output = model(input_ids=padded(inputs), attention_mask=mask, labels=learned)
    if smoothing == 0:
        return output.loss
    logits_BTV, labels_BT = (output.logits, learned) if is_t5 else (output.logits[:, :-1], learned[:, 1:])
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), label_smoothing=smoothing)


def their_losses(config: RunConfig, folder: Path) -> tuple[list[float], float]:
    """Losses of the steps, and the validation loss after them, of their class in fp64."""
    kind = transformers.AutoModelForSeq2SeqLM if config.model.family == "t5" else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder / "theirs", attn_implementation="eager").double().eval()
    labels = labels_of(config, folder, "train")

    def gradients(step: int, batch: Batch) -> torch.Tensor:
        del step
        loss = their_loss(model, batch, labels, config.stages[0].objective.label_smoothing)
        loss.backward()
        return loss

    losses = trained_by_torch(config, model, gradients)
    with torch.no_grad():
        held_out = their_loss(model, validation_batch(config), labels_of(config, folder, "validation"))
    return losses, held_out.item()


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.matrix) for name in MORE)])
def test_losses_are_those_of_transformers_and_torch(tmp_path, case):
    form, data, world_size, parallel = (CASES | MORE)[case]
    write_start(tmp_path, form, data)
    config = answer_run(tmp_path, "run", data, parallel, smoothing=SMOOTHING if case in SMOOTHED else 0.0)
    found = run_ranks(world_size, train_rank, config.model_dump(mode="json", exclude_none=True))
    assert {one["code"] for one in found} == {0}
    records = records_of(config.folder)
    steps = [record for record in records if "loss" in record]
    losses, validation_loss = their_losses(config, tmp_path)
    tolerance = UNSCALED if form == "t5-v1.1" else TOLERANCE
    assert [record["loss"] for record in steps] == pytest.approx(losses, abs=tolerance)
    (last,) = [
        record["validation_loss"] for record in records if record["step"] == STEPS and "validation_loss" in record
    ]
    assert last == pytest.approx(validation_loss, abs=tolerance)


def test_a_run_that_was_stopped_and_goes_on_in_another_layout_is_the_undisturbed_one(tmp_path):
    """Rows, masks and packing of dialogues are functions of the seed and the position alone."""
    write_start(tmp_path, "gpt2", "dialogues")
    whole, cut = (answer_run(tmp_path, name, "dialogues best_fit", {"zero_stage": 1}) for name in ("whole", "cut"))
    trees = [one.model_dump(mode="json", exclude_none=True) for one in (whole, cut)]
    run_ranks(1, train_rank, trees[0])
    (stopped,) = run_ranks(1, train_rank, trees[1], partial(stop_after, step=3))
    assert stopped["state"].step == 3
    run_ranks(2, train_rank, trees[1] | {"parallel": trees[1]["parallel"] | {"zero_stage": 3, "data": 2}})
    expected, found = ({r["step"]: r for r in records_of(one.folder) if "loss" in r} for one in (whole, cut))
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    assert [found[step]["loss"] for step in found] == pytest.approx(
        [expected[step]["loss"] for step in found], abs=TOLERANCE
    )
    assert [found[step].get("sample_hash") for step in found] == [expected[step].get("sample_hash") for step in found]
