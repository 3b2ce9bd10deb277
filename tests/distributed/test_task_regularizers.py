"""Label smoothing, adversarial training, mixout and distillation of labels under several layouts, each written out as
its paper has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from engine.checkpoint.interchange.huggingface import to_huggingface
from engine.config.schema.run import RunConfig
from engine.data.batch import Batch
from engine.data.stage import run_stage_seed
from engine.data.tokenizer.folder import load_tokenizer
from engine.models.families import family
from engine.train.mixout import mask
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import train_rank
from tests.distributed.task_training import (
    TOLERANCE,
    Gradients,
    logits_of,
    starting_weights,
    steps_of,
    task_run,
    their_model,
    trained_by_torch,
)
from tests.engine.tasks.starts import write_start

SMOOTHED = {"name": "classification", "label_smoothing": 0.3}
EPSILON, SHARE, STRENGTH, DISTILLATION = 0.7, 0.4, 0.05, 5.0
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "bert-zero3-tensor2": ("bert", 2, {"zero_stage": 3, "tensor": 2, "sequence_parallel": True}),
    "gpt2-zero1-pipe2": ("gpt2", 2, {"zero_stage": 1, "pipe": 2}),
}
MORE: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama-zero2-data2": ("llama", 2, {"zero_stage": 2}),
    "bert-ulysses2": ("bert", 2, {"zero_stage": 0, "sequence": 2}),
    "gpt2-zb-h1": ("gpt2", 2, {"zero_stage": 1, "pipe": 2, "schedule": "zb-h1"}),
}


def cases(more: str) -> list[Any]:
    """The cases of every guard, and a long one of its own."""
    return [*CASES, pytest.param(more, marks=pytest.mark.matrix)]


def run_of(folder: Any, case: str, regularization: dict[str, Any], **start: Any) -> RunConfig:
    form, world_size, parallel = (CASES | MORE)[case]
    write_start(folder, form, num_layers=4, **start)
    config = task_run(folder, parallel, SMOOTHED, stage={"regularization": regularization})
    found = run_ranks(world_size, train_rank, config.model_dump(mode="json", exclude_none=True))
    assert {one["code"] for one in found} == {0}
    return config


def smoothed(config: RunConfig, model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(logits_of(config, model, given), given["labels_B"], label_smoothing=0.3)


@pytest.mark.parametrize("case", cases("gpt2-zb-h1"))
def test_smoothed_labels_and_the_worst_embeddings(tmp_path, case):
    """torch's own smoothing; and Miyato et al. 2017, equations 5 and 6: the gradient at the embeddings of each row, by
    autograd of one row's loss, gives the step away from them."""
    config = run_of(tmp_path, case, {"adversarial": {"epsilon": EPSILON}})
    model = their_model(config, starting_weights(config))
    embedding = model.get_input_embeddings()
    added: list[torch.Tensor] = []
    embedding.register_forward_hook(lambda module, inputs, output: output + added[0] if added else output)

    def gradients(step: int, batch: Batch) -> torch.Tensor:
        del step
        given = batch.inputs
        loss = smoothed(config, model, given)
        loss.backward()
        shape = (*given["tokens_BT"].shape, embedding.embedding_dim)
        added[:] = [torch.zeros(shape, dtype=torch.float64, requires_grad=True)]
        (found,) = torch.autograd.grad(smoothed(config, model, given), added)
        # each row's own direction: of length epsilon over all of its tokens
        added[:] = [torch.stack([EPSILON * row / row.norm() for row in found])]
        smoothed(config, model, given).backward()
        added.clear()
        return loss

    losses = trained_by_torch(config, model, gradients)
    assert [record["loss"] for record in steps_of(config)] == pytest.approx(losses, abs=TOLERANCE)


class Logits(torch.nn.Module):
    """A model of theirs as a function of a batch of ours, whose parameters can be replaced."""

    def __init__(self, config: RunConfig, model: Any) -> None:
        super().__init__()
        self.config, self.model = config, model

    def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return smoothed(self.config, self.model, given)


def mixed(config: RunConfig, model: Any) -> Gradients:
    first = {name: value.detach().clone() for name, value in model.named_parameters()}
    specs, seed = family(config.model).specs(config.model), run_stage_seed(config.seed, 0)

    def gradients(step: int, batch: Batch) -> torch.Tensor:
        kept = {
            spec.name: mask(spec, SHARE, seed, step, torch.device("cpu"))[: spec.stored_shape[0]].float()
            for spec in specs
        }
        _, masks = to_huggingface(config.model, kept, load_tokenizer(config.tokenizer).vocabulary.padding)
        mixture = {
            f"model.{name}": ((1 - masks[name]) * first[name] + masks[name] * value - SHARE * first[name]) / (1 - SHARE)
            for name, value in model.named_parameters()
        }
        loss = torch.func.functional_call(Logits(config, model), mixture, (batch.inputs,))
        loss.backward()
        for name, value in model.named_parameters():
            value.grad.add_(STRENGTH * (value.detach() - first[name]))
        return loss

    return gradients


@pytest.mark.parametrize("case", cases("llama-zero2-data2"))
def test_mixtures_with_the_first_weights(tmp_path, case):
    """Lee et al. 2020, definition of mixout: the loss and the gradient are those of the mixture, by autograd through
    its formula. L2-SP (Li et al. 2018) pulls the weights themselves, the head's among them."""
    config = run_of(tmp_path, case, {"mixout": {"share": SHARE}, "l2_sp": {"strength": STRENGTH}})
    first = starting_weights(config)
    model = their_model(config, first)
    losses = trained_by_torch(config, model, mixed(config, model))
    assert [record["loss"] for record in steps_of(config)] == pytest.approx(losses, abs=TOLERANCE)


@pytest.mark.parametrize("case", cases("bert-ulysses2"))
def test_labels_that_the_start_predicts_are_distilled(tmp_path, case):
    """Hinton et al. 2015: the mean divergence from the start's distribution over all labels, at temperature 1."""
    head = {"task": "classification", "num_labels": 3}
    config = run_of(tmp_path, case, {"distillation": {"strength": DISTILLATION}}, task_head=head)
    model, teacher = (their_model(config, starting_weights(config)) for _ in range(2))
    terms = []

    def gradients(step: int, batch: Batch) -> torch.Tensor:
        del step
        given, loss = batch.inputs, smoothed(config, model, batch.inputs)
        with torch.no_grad():
            taught_BC = logits_of(config, teacher, given).softmax(-1)
        logs_BC = logits_of(config, model, given).log_softmax(-1)
        term = DISTILLATION * F.kl_div(logs_BC, taught_BC, reduction="batchmean")
        terms.append(term.item())
        (loss + term).backward()
        return loss

    losses, steps = trained_by_torch(config, model, gradients), steps_of(config)
    assert [record["loss"] for record in steps] == pytest.approx(losses, abs=TOLERANCE)
    told = [record["regularization/distillation"] for record in steps]
    assert told == pytest.approx(terms, rel=1e-3, abs=DISTILLATION * TOLERANCE)
    assert max(terms) > 1e-2, "too small to show in a loss"
