"""transformers' Trainer on the GPT-2 twin of our model: the same weights, batches, optimizer, clip and tied head.

The Trainer owns its loop; a callback at the start of each step hands the turns out. Logging, saving and progress
bars are off, and the batches come ready in memory, as ours do.
"""

from __future__ import annotations

import tempfile
from typing import Any, cast

import torch
from transformers import (
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from bench.contest import Turns
from bench.ours import DISTINCT_STEPS, OPTIMIZER, Precision, Shape, tokens_of_step
from bench.plain import initial_weights
from engine.checkpoint.interchange.huggingface import to_huggingface

FOREVER = 1_000_000
"""More steps than any contest asks for."""


class _Rows(torch.utils.data.Dataset):
    """The rows of all distinct steps, in order, over and over."""

    def __init__(self, shape: Shape) -> None:
        self.rows = torch.cat([tokens_of_step(shape, 0, step) for step in range(DISTINCT_STEPS)])
        self.labels = self.rows.clone()
        self.labels[:, 0] = -100  # never a target; the Trainer divides by the labels that are not -100

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


class _TakesTurns(TrainerCallback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.turns.begin_step()


class _Trainer(Trainer):
    """Trainer that also hands out each step's loss."""

    def __init__(self, turns: Turns, **settings: Any) -> None:
        super().__init__(**settings, callbacks=[_TakesTurns(turns)])
        self.turns = turns

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.turns.loss(loss)
        return loss


def contestant(turns: Turns, shape: Shape, precision: Precision, threads: int) -> None:
    """transformers' Trainer in a contest."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        _Trainer(turns, model=twin(shape), args=arguments(shape, precision, folder), train_dataset=_Rows(shape)).train()


def twin(shape: Shape) -> GPT2LMHeadModel:
    """Their model with our initial weights."""
    config, state = to_huggingface(shape.model, initial_weights(shape.model))
    config.loss_type = "ForCausalLM"  # what it falls back to, with a warning, where a model has no file
    model = cast(Any, GPT2LMHeadModel)._from_config(config, attn_implementation="sdpa")
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    return model


def arguments(shape: Shape, precision: Precision, folder: str) -> TrainingArguments:
    """Trainer's settings: ours where both have them, everything else that takes time off."""
    return TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        bf16=precision == "bf16",
        per_device_train_batch_size=shape.rows,
        max_steps=FOREVER,
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        learning_rate=OPTIMIZER.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=OPTIMIZER.weight_decay,
        adam_beta1=OPTIMIZER.beta1,
        adam_beta2=OPTIMIZER.beta2,
        adam_epsilon=OPTIMIZER.epsilon,
        max_grad_norm=OPTIMIZER.clip_norm,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
