"""Fine-tuning of a tiny model on ranks, and the same training by torch around transformers' class, in fp64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.huggingface import from_huggingface, to_huggingface
from engine.config.adapter_targets import MARK
from engine.config.schema.run import RunConfig
from engine.data.batch import Batch
from engine.data.loader import Loader
from engine.data.shards.dataset import TokenDataset
from engine.data.source import WeightedDataset
from engine.data.stage import open_parts, run_stage_seed, stage_stream
from engine.data.tokenizer.folder import load_tokenizer
from engine.models.families import family
from engine.models.initial import initial_value
from engine.tasks.resolve import resolve_task
from tests.engine.tasks.starts import tree_of, write_examples

TOLERANCE = 2e-6
"""Losses of about 1 in fp32 against fp64, over six updates."""
STEPS, BATCH = 6, 5


def task_run(beside: Path, parallel: dict[str, Any], objective: Any = "classification", **keys: Any) -> RunConfig:
    """A run of a task from the start in the folder `beside` it; `keys` are of the task file, `stage` of its stage."""
    write_examples(beside, count=23, labels=("old", "new", "scraped"))
    tree = tree_of(
        beside, beside, objective, **{"global_batch_size": BATCH, "duration": {"steps": STEPS}} | keys.pop("stage", {})
    )
    tree |= {
        "model": {"dropout": 0.0},
        "seed": 3,
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0, "clip_norm": 0.7},
        "parallel": {"micro_batch_size": 2} | parallel,
        "logging": {"tensorboard": False, "wandb": "off", "plot": False},
        "checks": True,
    }
    return resolve_task(tree | keys, "test task")


def steps_of(config: RunConfig) -> list[dict[str, Any]]:
    """The records of the steps of a run."""
    records = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def starting_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """The weights that a run begins with: those of the start, and initial ones of what it lacks."""
    assert config.init_from is not None
    _, held = from_huggingface(Path(config.init_from.path))
    specs = family(config.model).specs(config.model)
    initial = {spec.name: initial_value(spec, config.model, config.seed) for spec in specs if spec.name not in held}
    return {spec.name: (initial | held)[spec.name] for spec in specs}


def their_model(config: RunConfig, weights: dict[str, torch.Tensor]) -> Any:
    """Their class with these weights, without an adapter, in fp64."""
    plain = config.model.model_copy(update={"adapter": None})
    held = {name: value for name, value in weights.items() if MARK not in name}
    their_config, state = to_huggingface(plain, held, load_tokenizer(config.tokenizer).vocabulary.padding)
    kind = getattr(transformers, form_of(plain).architecture)
    return kind.from_pretrained(None, config=their_config, state_dict=state, attn_implementation="eager").double()


def logits_of(config: RunConfig, model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What their class computes of a batch of ours, (B, C); peft's modules may be around it."""
    inputs = {"input_ids": given["tokens_BT"], "attention_mask": (given["segments_BT"] == 0).long()}
    if hasattr(model, "peft_config") and model.active_peft_config.is_prompt_learning:
        return virtual_logits(config, model, given.get("last_B"), **inputs)
    if config.model.family != "gpt":
        return model(**inputs).logits
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    hidden_BTD = inner.base_model(**inputs).last_hidden_state
    # padding stands behind the last token here, whichever token pads
    return inner.score(hidden_BTD[torch.arange(BATCH), given["last_B"]])


def virtual_logits(
    config: RunConfig, model: Any, last_B: torch.Tensor | None, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """What their class computes with peft's virtual tokens; last_B are the positions of a decoder's last tokens.

    peft looks for an argument `past_key_values`, which transformers 5.24 calls `cache`, so a prefix, which peft makes,
    is handed over here; and their decoders take the last embedding for the last token, whether it is padding or not.
    """
    if model.active_peft_config.peft_type == "PROMPT_TUNING" and config.model.family == "bert":
        return model(input_ids=input_ids, attention_mask=attention_mask).logits
    num_rows, virtual = len(input_ids), model.active_peft_config.num_virtual_tokens
    body, made = model.base_model.base_model, model.get_prompt(num_rows)
    mask = torch.cat((attention_mask.new_ones(num_rows, virtual), attention_mask), 1)
    if model.active_peft_config.peft_type == "PREFIX_TUNING":
        out = body(input_ids=input_ids, attention_mask=mask, cache=made)
        virtual = 0
    else:
        out = body(inputs_embeds=torch.cat((made, model.word_embeddings(input_ids)), 1), attention_mask=mask)
    if config.model.family == "bert":
        return model.base_model.classifier(out.pooler_output)
    assert last_B is not None
    return model.base_model.score(out.last_hidden_state[torch.arange(num_rows), last_B + virtual])


def batches_of(config: RunConfig) -> list[Batch]:
    """The steps of a run, each as one batch."""
    stage = config.stages[0]
    parts = open_parts(stage, None, config.model.vocab_size)
    loader = Loader(stage_stream(stage, parts, run_stage_seed(config.seed, 0)))
    return [loader.step(0, 1, stage.global_batch_size)[0] for _ in steps_of(config)]


Gradients = Callable[[int, Batch], torch.Tensor]
"""(step, batch) -> the loss that the run reports, after gradients were computed."""


def trained_by_torch(
    config: RunConfig,
    model: Any,
    gradients: Gradients | None = None,
    after: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """Losses of the steps of a run, by torch's AdamW over what is trained; the plain loss's where nothing else is.

    `after` is called behind each update, with the number of its step, while the gradients are still there.
    """

    def plain(step: int, batch: Batch) -> torch.Tensor:
        del step
        loss = F.cross_entropy(logits_of(config, model, batch.inputs), batch.inputs["labels_B"])
        loss.backward()
        return loss

    adam = config.optimizer
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(adam.beta1, adam.beta2), eps=adam.epsilon, weight_decay=0.0)
    losses = []
    for (step, record), batch in zip(enumerate(steps_of(config)), batches_of(config), strict=True):
        optimizer.zero_grad()
        losses.append((gradients or plain)(step, batch).item())
        torch.nn.utils.clip_grad_norm_(trained, adam.clip_norm)
        optimizer.param_groups[0]["lr"] = record["learning_rate"]
        optimizer.step()
        after(step)
    return losses


def validation_batch(config: RunConfig) -> Batch:
    """All rows of the validation examples as one batch, in the order of their data set."""
    (stage,) = config.stages
    assert isinstance(stage.data.validation, str)
    parts = [WeightedDataset(TokenDataset(stage.data.validation))]
    count = stage_stream(stage, parts, 0).samples_per_epoch()
    whole = Loader(stage_stream(stage.model_copy(update={"global_batch_size": count}), parts, 0))
    return whole.step(0, 1, count)[0]
