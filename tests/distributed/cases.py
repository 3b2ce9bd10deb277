"""The runs that every layout is held to (`plain` has what they must equal): tiny models, hard batches.

Clipping is active in every step.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config.load import parse_run, read_tree
from engine.config.rank_environment import RankEnvironment
from engine.config.resolve import resolve
from engine.config.schema.run import RunConfig
from engine.models.families import family
from engine.parallel.boundary import Tensors
from engine.parallel.collectives import all_reduce
from engine.parallel.groups import Groups
from tests.distributed.batches import CORRUPTED, GLOBAL_BATCH, LENGTH, MASKED, VOCAB, global_batch, weights

NUM_STEPS = 6
LEARNING_RATE = 1e-2
CLIP_NORM = 0.5
EPSILON = 1e-5
"""Of Adam: far above the rounding of a gradient, so that an element whose gradient is nothing else hardly moves."""
LAYOUTS = ((1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2))
"""(pipe, tensor, data)."""

GPT2 = {"num_layers": 3, "hidden_size": 16, "num_heads": 4, "max_positions": 16}
LLAMA = GPT2 | {
    "num_kv_heads": 2,
    "feed_forward_size": 32,
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "tie_embeddings": False,
}
PYTHIA = {
    "position": "rope",
    "partial_rotary_factor": 0.5,
    "activation": "gelu",
    "parallel_residual": True,
    "tie_embeddings": False,
}
BERT = GPT2 | {
    "family": "bert",
    "token_types": 2,
    "pair_head": True,
    "norm_position": "post",
    "activation": "gelu",
}
MODERN_BERT = GPT2 | {
    "family": "bert",
    "feed_forward_size": 24,
    "position": "rope",
    "norm_bias": False,
    "activation": "geglu",
    "bias": False,
    "local_attention": 4,  # in three layers: of the second
    "global_every": 2,
    "local_rope_theta": 100.0,
}
T5 = GPT2 | {
    "family": "t5",
    "num_layers": 5,
    "num_decoder_layers": 3,
    "head_size": 6,
    "feed_forward_size": 24,
    "relative_buckets": 8,
    "relative_distance": 9,
    "norm": "rmsnorm",
    "activation": "relu",
    "bias": False,
}
WIDE = {"num_heads": 8, "num_kv_heads": 4}
"""Enough heads of keys and values for tensor 2 x sequence 2."""
OPTIONS = {
    "head_size": 8,
    "qkv_bias": True,
    "qk_norm": True,
    "parallel_residual": True,
    "partial_rotary_factor": 0.5,
    "sliding_window": 5,
    "first_window_layer": 1,
    "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_positions": 8},
}
MODELS = {
    "gpt2": GPT2,
    "gpt2-deep": GPT2 | {"num_layers": 6},
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_embeddings": True},
    "llama3": LLAMA | {"rope_scaling": {"type": "llama3", "factor": 4.0, "original_max_positions": 8}},
    "llama-dynamic": LLAMA
    | WIDE
    | {"head_size": 4, "rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_positions": 8},
    "mistral": LLAMA | {"sliding_window": 5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen2": LLAMA | {"qkv_bias": True, "sliding_window": 4, "first_window_layer": 1, "tie_embeddings": True},
    "qwen3": LLAMA | {"qk_norm": True, "head_size": 8},
    "pythia": GPT2 | PYTHIA,
    # the options of decoders together, which no published form has
    "decoder-options": LLAMA | OPTIONS,
    "decoder-options-wide": LLAMA | OPTIONS | WIDE,
    "llama-deep": LLAMA | WIDE | {"num_layers": 4},
    "bert": BERT,
    "bert-deep": BERT | {"num_layers": 5},
    # as Megatron-LM has it
    "bert-pre-norm": BERT | {"norm_position": "pre", "embedding_norm": False, "activation": "gelu_tanh"},
    "modernbert": MODERN_BERT,
    "modernbert-deep": MODERN_BERT | {"num_layers": 4},
    "t5": T5,
    "t5-dropout": T5 | {"dropout": 0.2, "attention_dropout": 0.1},
    "t5-v1.1": T5 | {"activation": "geglu_tanh", "tie_embeddings": False},
}
DROPOUT = "-dropout"
"""Behind the name of a model: the same one with dropout."""
MODELS |= {name + DROPOUT: model | {"dropout": 0.1, "attention_dropout": 0.2} for name, model in MODELS.items()}
SHIPPED = Path(__file__).parents[2] / "configs" / "models"
SMALL = {
    "num_layers": 4,
    "hidden_size": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "feed_forward_size": 24,
    "max_positions": 16,
}
SMALL |= {"dropout": 0.0, "attention_dropout": 0.0, "local_attention": 4}
SMALL |= {"relative_buckets": 8, "relative_distance": 9, "num_decoder_layers": 2}


def twin(path: Path) -> dict[str, Any]:
    """A shipped model with all its choices, and sizes of a tiny one."""
    model = read_tree(path)["model"]
    return {key: SMALL.get(key, value) for key, value in model.items() if key != "vocab_size"}


# those with a run file have layouts; the others are there to start from (`init_from`)
TWINS = {path.stem: twin(SHIPPED / path.name) for path in sorted((SHIPPED.parent / "runs").glob("*.yaml"))}
MODELS |= TWINS
OBJECTIVES: dict[str, dict[str, Any]] = {
    "gpt": {"name": "causal"},
    "bert": {"name": "masked", "rate": MASKED / LENGTH},
    "t5": {"name": "span_corruption", "rate": CORRUPTED},
}


@dataclass(frozen=True)
class Case:
    """One run of the parity matrix."""

    model: str = "gpt2"
    zero_stage: int = 0
    pipe: int = 1
    tensor: int = 1
    data: int = 1
    schedule: str = "1f1b"
    decay: bool = True
    attention: str = "document"
    micro_batch_size: int = 1
    dtype: str = "fp32"
    reduce_dtype: str = "fp32"
    optimizer: str = "adamw"
    chunks_per_stage: int = 1
    recompute: str = "none"
    recompute_layers: int | None = None
    gather: str | None = None
    reduce: str | None = None
    sequence_parallel: bool = False
    sequence: int = 1
    offload: str = "none"
    gather_within: int | None = None
    vocab_multiple: int = 8
    freeze: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.pipe * self.tensor * self.sequence * self.data

    def __str__(self) -> str:
        return "-".join(str(value) for value in dataclasses.astuple(self))


def objective_of(case: Case) -> dict[str, Any]:
    """What the model of a case is trained on."""
    model = MODELS[case.model]
    pairs = {"pairs": "next_sentence"} if model.get("pair_head") else {}
    return OBJECTIVES[model.get("family", "gpt")] | pairs


def config_of(case: Case) -> RunConfig:
    """The run's configuration."""
    return parse_run(
        {
            "folder": "unused",
            "tokenizer": "unused",
            "seed": 3,
            "model": {"vocab_size": VOCAB, "vocab_multiple": case.vocab_multiple} | MODELS[case.model],
            "stages": [
                {
                    "data": {"train": "unused", "attention": case.attention},
                    "objective": objective_of(case),
                    "sequence_length": LENGTH,
                    "global_batch_size": GLOBAL_BATCH,
                    "duration": {"steps": NUM_STEPS},
                    "freeze": list(case.freeze),
                }
            ],
            "optimizer": {
                "name": case.optimizer,
                "learning_rate": LEARNING_RATE,
                "clip_norm": CLIP_NORM,
                "epsilon": EPSILON,
                "weight_decay": 0.1,
                "no_decay": ["*.bias", "*norm*"] if case.decay else [],
            },
            "precision": {"dtype": case.dtype, "reduce_dtype": case.reduce_dtype},
            "parallel": {
                "pipe": case.pipe,
                "tensor": case.tensor,
                "data": case.data,
                "zero_stage": case.zero_stage,
                "micro_batch_size": case.micro_batch_size,
                "schedule": case.schedule,
                "chunks_per_stage": case.chunks_per_stage,
                "recompute": case.recompute,
                "recompute_layers": case.recompute_layers,
                "gather": case.gather,
                "reduce": case.reduce,
                "sequence_parallel": case.sequence_parallel,
                "sequence": case.sequence,
                "offload": case.offload,
                "gather_within": case.gather_within,
            },
        },
        "case",
    )


@dataclass
class Result:
    """What a run is compared by."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]


def run_rank(
    environment: RankEnvironment, case: Case
) -> tuple[list[float], list[float], list[tuple[str, np.ndarray, np.ndarray]]]:
    """One rank of a run: losses, norms, and its shards as (name, indices in the whole parameter, values)."""
    from engine.parallel.pipeline import DomainSums
    from engine.train.build import build_pipeline, join_groups, stage_spec
    from engine.train.checks import check_invariants

    config = config_of(case)
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, torch.device("cpu"))
    losses, norms = [], []
    for step in range(NUM_STEPS):
        batch = global_batch(step, case.attention, case.model)
        weights_L = weights(batch)
        by_domain = DomainSums(3, len(weights_L), torch.device("cpu")) if step % 2 else None
        losses_L = pipeline.train(stage_inputs(batch, case, groups), groups.zero.size / weights_L, by_domain)
        if by_domain is not None:  # sums of the same fp32 terms in another order
            assert torch.allclose(by_domain.total_KL.sum(0).float(), losses_L, rtol=1e-5, atol=1e-5)
        norms.append(pipeline.engine.step(LEARNING_RATE).gradient_norm)
        check_invariants(pipeline.engine, groups)
        counted_L = losses_L.double() * (groups.tensor.position == 0)
        losses.append((all_reduce(counted_L, groups.world) / weights_L).sum().item())
    indices = {
        spec.name: spec.part(
            torch.arange(int(np.prod(spec.shape))).reshape(spec.shape), groups.tensor.position, groups.tensor.size
        ).flatten()
        for spec in family(config.model).specs(config.model)
    }
    shards = [
        (
            shard.spec.name,
            indices[shard.spec.name][shard.start : shard.start + shard.length].numpy(),
            shard.weight.float().numpy().copy(),
        )
        for shard in pipeline.engine.parameter_shards()
    ]
    return losses, norms, shards


def stage_inputs(batch: Tensors, case: Case, groups: Groups) -> list[Tensors]:
    """This rank's keywords per micro-batch: rows go to data ranks in turn, a micro-batch at a time."""
    from engine.train.build import stage_spec
    from engine.train.sequence_slices import own_part

    config, size = config_of(case), case.micro_batch_size
    inputs = stage_spec(config, config.stages[0], groups).inputs
    given = {name: tensor for name, tensor in batch.items() if name in inputs}
    own = own_part(given, LENGTH, config.parallel.sequence_ranks, groups.sequence)
    own["domains_B"] = torch.arange(GLOBAL_BATCH) % 3
    return [
        {name: tensor[first : first + size] for name, tensor in own.items()}
        for first in range(groups.coordinates.data_rank * size, GLOBAL_BATCH, size * case.data)
    ]


def join_results(case: Case, ranks: list[Any]) -> Result:
    """One result from every rank's; each rank must have seen the same losses, and the shards must cover everything."""
    for losses, norms, _ in ranks:
        assert (losses, norms) == (ranks[0][0], ranks[0][1]), "ranks disagree"
    model, weights = config_of(case).model, {}
    for spec in family(model).specs(model):
        flat = np.full(int(np.prod(spec.shape)), np.nan, np.float32)
        for _, _, shards in ranks:
            for name, indices, values in shards:
                if name == spec.name:
                    held = flat[indices]
                    copies = np.isnan(held) | (held == values)
                    assert copies.all(), f"{name}: copies on several ranks differ"
                    flat[indices] = values
        assert not np.isnan(flat).any(), f"{spec.name}: elements that no rank holds"
        weights[spec.name] = flat.reshape(spec.shape)
    return Result(ranks[0][0], ranks[0][1], weights)
