"""Training of adapters under several layouts against peft's modules around transformers' class, trained by torch."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch.nn import functional as F

from engine.checkpoint.folder import step_path
from engine.checkpoint.interchange.peft_format import adapter_config, adapter_tensors
from engine.checkpoint.load import open_checkpoint, read_state, read_weights
from engine.config.schema.adapter import AdaLoRAConfig
from engine.config.schema.run import RunConfig
from engine.data.batch import Batch
from engine.plan.frozen import is_base
from engine.serve.adapter import THEIR_CONFIGS
from engine.train.rank_allocation import schedule
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import stop_after, train_rank
from tests.distributed.task_training import (
    STEPS,
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

RANKS = {
    "method": "adalora",
    "rank": 2,
    "initial_rank": 4,
    "targets": ["*"],
    "every_steps": 1,
    "warmup_share": 0.2,
    "final_share": 0.34,
}
ALL = {"method": "lora", "rank": 3, "targets": ["*"]}
Case = tuple[str, dict[str, Any], int, dict[str, Any]]
CASES: dict[str, Case] = {
    "bert-lora-zero3-tensor2": ("bert", ALL, 4, {"zero_stage": 3, "tensor": 2}),
    "gpt2-lora-pipe2": ("gpt2", ALL, 2, {"zero_stage": 1, "pipe": 2}),
    "bert-bottleneck": (
        "bert",
        {"method": "bottleneck", "size": 6},
        2,
        {"zero_stage": 3, "tensor": 2, "sequence_parallel": True},
    ),
    "gpt2-prompt-pipe2": ("gpt2", {"method": "prompt", "virtual_tokens": 3}, 2, {"zero_stage": 1, "pipe": 2}),
    "bert-adalora-tensor2": ("bert", RANKS, 2, {"zero_stage": 1, "tensor": 2}),
    "bert-prompt": ("bert", {"method": "prompt", "virtual_tokens": 3}, 1, {"zero_stage": 0}),
    "bert-prefix": ("bert", {"method": "prefix", "virtual_tokens": 2}, 1, {"zero_stage": 0}),
    "llama-ia3-sequence2": ("llama", {"method": "ia3"}, 2, {"zero_stage": 2, "tensor": 2, "sequence_parallel": True}),
}
MORE: dict[str, Case] = {
    "llama-lora-sequence2": ("llama", ALL, 4, {"zero_stage": 3, "tensor": 2, "sequence_parallel": True}),
    "bert-lora-zb-h1": ("bert", ALL, 2, {"zero_stage": 1, "pipe": 2, "schedule": "zb-h1"}),
    "bert-ia3-ulysses2": ("bert", {"method": "ia3"}, 2, {"zero_stage": 0, "sequence": 2}),
    "gpt2-ia3-chunks": ("gpt2", {"method": "ia3"}, 2, {"zero_stage": 1, "pipe": 2, "chunks_per_stage": 2}),
    "bert-prompt-zero3-tensor2": (
        "bert",
        {"method": "prompt", "virtual_tokens": 3},
        4,
        {"zero_stage": 3, "tensor": 2},
    ),
    "llama-prefix-zero3-tensor2": (
        "llama",
        {"method": "prefix", "virtual_tokens": 4},
        4,
        {"zero_stage": 3, "tensor": 2, "sequence_parallel": True},
    ),
    "gpt2-adalora-pipe2": ("gpt2", RANKS, 2, {"zero_stage": 1, "pipe": 2}),
    "llama-adalora-zero3-tensor2": (
        "llama",
        RANKS,
        4,
        {"zero_stage": 3, "tensor": 2, "sequence_parallel": True},
    ),
    "pythia-lora-zero3": ("pythia", ALL, 2, {"zero_stage": 3}),
}


def adapted_by_peft(config: RunConfig, weights: dict[str, torch.Tensor]) -> Any:
    """Their class with these weights, in fp64, and peft's modules in it."""
    settings = adapter_config(config.model, None) | {"inference_mode": False}
    if isinstance(config.model.adapter, AdaLoRAConfig):
        plan = schedule(config.model.adapter, STEPS)
        settings |= {"total_step": STEPS, "tinit": plan.first, "tfinal": STEPS - plan.last}
    assert config.model.adapter is not None
    made: Any = getattr(peft, THEIR_CONFIGS[config.model.adapter.method])
    model: Any = peft.get_peft_model(their_model(config, weights), made(**settings))
    missing = peft.set_peft_model_state_dict(model, adapter_tensors(config.model, weights.__getitem__))
    assert not set(missing.unexpected_keys) - {"prompt_embeddings"}  # which peft loads by itself
    return model.double()


class Houlsby(torch.nn.Module):
    """Houlsby et al. 2019, figure 2: down, nonlinearity, up, and a residual connection."""

    def __init__(self, weights: dict[str, torch.Tensor], name: str) -> None:
        super().__init__()
        values = {
            kind: weights[f"{name}.{kind}"].double() for kind in ("down.weight", "down.bias", "up.weight", "up.bias")
        }
        self.values = torch.nn.ParameterDict({kind.replace(".", "_"): value.clone() for kind, value in values.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.gelu(F.linear(x, self.values["down_weight"], self.values["down_bias"]))
        return x + F.linear(inner, self.values["up_weight"], self.values["up_bias"])


def adapted_by_hand(config: RunConfig, weights: dict[str, torch.Tensor]) -> Any:
    """Their BERT with an adapter behind the projection of each part of a layer; norms and head are trained."""
    model = their_model(config, weights)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            ("encoder" in name and "LayerNorm" in name) or name.startswith(("classifier", "bert.pooler"))
        )
    for number, layer in enumerate(model.bert.encoder.layer):
        for part, dense in (("attention", layer.attention.output.dense), ("ffn", layer.output.dense)):
            adapter = Houlsby(weights, f"layers.{number}.adapters.{part}")
            layer.add_module(f"adapter_{part}", adapter)
            dense.register_forward_hook(lambda module, inputs, made, adapter=adapter: adapter(made))
    return model


def with_penalty(config: RunConfig, model: Any) -> Gradients:
    """Gradients with AdaLoRA's penalty, which peft's model adds to the loss of the model inside of it."""

    def compute(step: int, batch: Batch) -> torch.Tensor:
        del step
        loss, inside = (
            F.cross_entropy(logits_of(config, model, batch.inputs), batch.inputs["labels_B"]),
            model.base_model,
        )
        whole, inside.model = inside.model, Lossless(inside.model)
        penalty = inside().loss
        inside.model = whole
        (loss + penalty).backward()
        return loss

    return compute


class Lossless(torch.nn.Module):
    """The parameters of a model, and a loss of zero in place of its own."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Any:
        return SimpleNamespace(loss=torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.matrix) for name in MORE)])
def test_losses_are_those_of_peft_and_torch(tmp_path, case):
    form, adapter, world_size, parallel = (CASES | MORE)[case]
    write_start(tmp_path, form, num_layers=4)
    config = task_run(tmp_path, parallel, adapter=adapter)
    found = run_ranks(world_size, train_rank, config.model_dump(mode="json", exclude_none=True))
    assert {one["code"] for one in found} == {0}
    begun = starting_weights(config)
    make = adapted_by_hand if adapter["method"] == "bottleneck" else adapted_by_peft
    theirs = make(config, begun)
    if adapter["method"] == "adalora":
        losses = trained_by_torch(
            config, theirs, with_penalty(config, theirs), after=theirs.base_model.update_and_allocate
        )
    else:
        losses = trained_by_torch(config, theirs)
    assert [record["loss"] for record in steps_of(config)] == pytest.approx(losses, abs=TOLERANCE)
    checkpoint = step_path(config.folder / "checkpoints", STEPS)
    trained = read_weights(checkpoint)
    for name, placement in open_checkpoint(checkpoint).placements.items():
        is_frozen = is_base(config.model, name)
        assert bool(placement.moments) != is_frozen, name
        if not name.endswith("lora_E"):  # all of its elements may be zero, as at the beginning
            assert torch.equal(trained[name], begun[name]) == is_frozen, name
    if adapter["method"] == "adalora":
        kept = {name: (value != 0).view(-1).tolist() for name, value in trained.items() if name.endswith("lora_E")}
        assert sum(map(sum, kept.values())) == adapter["rank"] * len(kept)
        pattern = theirs.peft_config["default"].rank_pattern
        assert sorted(map(tuple, pattern.values())) == sorted(map(tuple, kept.values()))


def test_ranks_of_a_run_that_was_stopped_are_those_of_an_undisturbed_one(tmp_path):
    """Stopped between two choices, whose scores go on from the importance of all steps before, and after the last."""
    write_start(tmp_path, "gpt2")
    whole = task_run(tmp_path, {"zero_stage": 1}, adapter=RANKS)
    cut = whole.model_copy(update={"folder": tmp_path / "cut"})
    trees = [one.model_dump(mode="json", exclude_none=True) for one in (whole, cut)]
    run_ranks(1, train_rank, trees[0])
    for step in (3, 5, None):
        run_ranks(1, train_rank, trees[1], partial(stop_after, step=step))
    paths = [step_path(one.folder / "checkpoints", STEPS) for one in (whole, cut)]
    expected, found = (read_weights(path) for path in paths)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    kept = [read_state(path).sections["rank_allocation"] for path in paths]
    assert kept[0] == kept[1]
    assert not all(map(all, kept[0]["kept"].values()))


def test_masks_of_an_adapter_do_not_depend_on_the_layout(tmp_path):
    write_start(tmp_path, "llama")
    losses = []
    for world_size, parallel in ((1, {}), (2, {"zero_stage": 1, "tensor": 2, "sequence_parallel": True})):
        config = task_run(tmp_path, parallel, adapter=ALL | {"dropout": 0.4})
        config = config.model_copy(update={"folder": tmp_path / f"run-{world_size}"})
        run_ranks(world_size, train_rank, config.model_dump(mode="json", exclude_none=True))
        losses.append([record["loss"] for record in steps_of(config)])
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
