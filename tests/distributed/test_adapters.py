"""Training of adapters under several layouts against peft's modules around transformers' class, trained by torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.nn import functional as F

from engine.checkpoint.folder import step_path
from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.huggingface import from_huggingface, to_huggingface
from engine.checkpoint.interchange.peft_format import adapter_config, adapter_tensors
from engine.checkpoint.load import open_checkpoint, read_weights
from engine.config.adapter_targets import MARK
from engine.config.schema.run import RunConfig
from engine.data.loader import Loader
from engine.data.shards.dataset import TokenDataset
from engine.data.source import WeightedDataset
from engine.data.stage import run_stage_seed, stage_stream
from engine.data.tokenizer.folder import load_tokenizer
from engine.models.families import family
from engine.models.initial import initial_value
from engine.plan.frozen import is_base
from engine.tasks.resolve import resolve_task
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import train_rank
from tests.engine.tasks.starts import tree_of, write_examples, write_start

TOLERANCE = 2e-6
"""Losses of about 1 in fp32 against fp64, over six updates."""
STEPS, BATCH = 6, 5
ALL = {"method": "lora", "rank": 3, "targets": ["*"]}
Case = tuple[str, dict[str, Any], int, dict[str, Any]]
CASES: dict[str, Case] = {
    "bert-lora-zero3-tensor2": ("bert", ALL, 4, {"zero_stage": 3, "tensor": 2}),
    "gpt2-lora-pipe2": ("gpt2", ALL, 2, {"zero_stage": 1, "pipe": 2}),
    "llama-ia3-sequence2": ("llama", {"method": "ia3"}, 2, {"zero_stage": 2, "tensor": 2, "sequence_parallel": True}),
}
MORE: dict[str, Case] = {
    "llama-lora-sequence2": ("llama", ALL, 4, {"zero_stage": 3, "tensor": 2, "sequence_parallel": True}),
    "bert-lora-zb-h1": ("bert", ALL, 2, {"zero_stage": 1, "pipe": 2, "schedule": "zb-h1"}),
    "bert-ia3-ulysses2": ("bert", {"method": "ia3"}, 2, {"zero_stage": 0, "sequence": 2}),
    "gpt2-ia3-chunks": ("gpt2", {"method": "ia3"}, 2, {"zero_stage": 1, "pipe": 2, "chunks_per_stage": 2}),
    "pythia-lora-zero3": ("pythia", ALL, 2, {"zero_stage": 3}),
}


def adapted_run(folder: Path, form: str, adapter: dict[str, Any], parallel: dict[str, Any]) -> RunConfig:
    write_examples(folder, count=23, labels=("old", "new", "scraped"))
    tree = tree_of(folder, folder, global_batch_size=BATCH, duration={"steps": STEPS})
    tree |= {
        "adapter": adapter,
        "model": {"dropout": 0.0},
        "seed": 3,
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0, "clip_norm": 0.7},
        "parallel": {"micro_batch_size": 2} | parallel,
        "logging": {"tensorboard": False, "wandb": "off", "plot": False},
        "checks": True,
    }
    return resolve_task(tree, "test task")


def starting_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """The weights that a run begins with: those of the start, and initial ones of what it lacks."""
    _, weights = from_huggingface(Path(str(config.init_from and config.init_from.path)))
    specs = family(config.model).specs(config.model)
    found = {spec.name: weights.get(spec.name) for spec in specs}
    return {
        spec.name: initial_value(spec, config.model, config.seed) if (value := found[spec.name]) is None else value
        for spec in specs
    }


def adapted_by_peft(config: RunConfig, weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """Their class with these weights, in fp64, and peft's modules in it."""
    plain = config.model.model_copy(update={"adapter": None})
    held = {name: value for name, value in weights.items() if MARK not in name}
    their_config, state = to_huggingface(plain, held, load_tokenizer(config.tokenizer).vocabulary.padding)
    kind = getattr(transformers, form_of(plain).architecture)
    base = kind.from_pretrained(None, config=their_config, state_dict=state, attn_implementation="eager")
    settings = adapter_config(config.model, None) | {"inference_mode": False}
    made: Any = peft.LoraConfig if "r" in settings else peft.IA3Config
    model: Any = peft.get_peft_model(base.double(), made(**settings))
    missing = peft.set_peft_model_state_dict(model, adapter_tensors(config.model, weights.__getitem__))
    assert not missing.unexpected_keys
    return model.double()


def trained_by_torch(config: RunConfig, records: list[dict[str, Any]], folder: Path) -> list[float]:
    model, stage = adapted_by_peft(config, starting_weights(config), folder), config.stages[0]
    assert stage.data.train is not None
    parts = [WeightedDataset(TokenDataset(stage.data.train))]
    loader, adam = Loader(stage_stream(stage, parts, run_stage_seed(config.seed, 0))), config.optimizer
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(adam.beta1, adam.beta2), eps=adam.epsilon, weight_decay=0.0)
    losses = []
    for record in records:
        (batch,) = loader.step(0, 1, BATCH)
        given = batch.inputs
        inputs = {"input_ids": given["tokens_BT"], "attention_mask": (given["segments_BT"] == 0).long()}
        if config.model.family == "gpt":  # padding stands behind the last token here, whichever token pads
            hidden_BTD = model.base_model.model.base_model(**inputs).last_hidden_state
            logits_BC = model.base_model.model.score(hidden_BTD[torch.arange(BATCH), given["last_B"]])
        else:
            logits_BC = model(**inputs).logits
        loss = F.cross_entropy(logits_BC, given["labels_B"])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, adam.clip_norm)
        optimizer.param_groups[0]["lr"] = record["learning_rate"]
        optimizer.step()
    return losses


def steps_of(config: RunConfig) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.matrix) for name in MORE)])
def test_losses_are_those_of_peft_and_torch(tmp_path, case):
    form, adapter, world_size, parallel = (CASES | MORE)[case]
    write_start(tmp_path, form, num_layers=4)
    config = adapted_run(tmp_path, form, adapter, parallel)
    found = run_ranks(world_size, train_rank, config.model_dump(mode="json", exclude_none=True))
    assert {one["code"] for one in found} == {0}
    steps = steps_of(config)
    assert [record["loss"] for record in steps] == pytest.approx(
        trained_by_torch(config, steps, tmp_path), abs=TOLERANCE
    )
    checkpoint = step_path(config.folder / "checkpoints", STEPS)
    begun, trained = starting_weights(config), read_weights(checkpoint)
    for name, placement in open_checkpoint(checkpoint).placements.items():
        is_frozen = is_base(config.model, name)
        assert bool(placement.moments) != is_frozen, name
        assert torch.equal(trained[name], begun[name]) == is_frozen, name


def test_masks_of_an_adapter_do_not_depend_on_the_layout(tmp_path):
    write_start(tmp_path, "llama")
    adapter = ALL | {"dropout": 0.4}
    losses = []
    for world_size, parallel in ((1, {}), (2, {"zero_stage": 1, "tensor": 2, "sequence_parallel": True})):
        config = adapted_run(tmp_path, "llama", adapter, parallel)
        config = config.model_copy(update={"folder": tmp_path / f"run-{world_size}"})
        run_ranks(world_size, train_rank, config.model_dump(mode="json", exclude_none=True))
        losses.append([record["loss"] for record in steps_of(config)])
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
