"""Combinations of layouts and options as a table; `engine.config.resolve` judges each case, and no rule is here.

Each cell is a small configuration that uses its row and its column together and is examined on a world that fits. A
cell that is refused shows a number, and the rule's own words stand below the table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config.resolve import examine
from engine.config.schema.data import DataConfig
from engine.config.schema.model import make_model
from engine.config.schema.objective import ObjectiveConfig
from engine.config.schema.optimizer import OptimizerConfig, PrecisionConfig
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import Duration, RunStage
from engine.errors import PalimpsestError

MARKERS = ("<!-- composition -->", "<!-- /composition -->")
"""Lines of docs/layouts.md that the table stands between."""

Change = dict[str, dict[str, Any]]
"""Section -> keys that differ from the example."""

ZERO_STAGES: dict[str, Change] = {f"ZeRO-{stage}": {"parallel": {"zero_stage": stage}} for stage in range(4)}
LLAMA: Change = {
    "model": {
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "num_kv_heads": 2,
        "bias": False,
        "tie_embeddings": False,
    }
}
BERT: Change = {
    "model": {
        "family": "bert",
        "token_types": 2,
        "pair_head": True,
        "norm_position": "post",
        "activation": "gelu",
    },
    "objective": {"name": "masked", "pairs": "next_sentence"},
}
MODERN: Change = {
    "model": {
        "family": "bert",
        "position": "rope",
        "local_attention": 16,
        "local_rope_theta": 1000.0,
        "norm_bias": False,
        "activation": "geglu",
        "bias": False,
    },
    "objective": {"name": "masked"},
}
"""ModernBERT's form: two layers of three see a window."""
T5: Change = {
    "model": {
        "family": "t5",
        "norm": "rmsnorm",
        "activation": "relu",
        "bias": False,
    },
    "objective": {"name": "span_corruption"},
}
DROPPING: dict[str, Change] = {
    name: form | {"model": form["model"] | {"dropout": 0.1, "attention_dropout": 0.1}}
    for name, form in (("BERT", BERT), ("T5", T5))
}
USES: dict[str, Change] = {
    "data 2": {"parallel": {"data": 2}},
    "tensor 2": {"parallel": {"tensor": 2}},
    "tensor 2, sequence parallel": {"parallel": {"tensor": 2, "sequence_parallel": True}},
    "sequence 2": {"parallel": {"sequence": 2}},
    "pipe 2": {"parallel": {"pipe": 2}},
    "pipe 2 x tensor 2 x data 2": {"parallel": {"pipe": 2, "tensor": 2, "data": 2}},
    "pipe 2, GPipe": {"parallel": {"pipe": 2, "schedule": "gpipe"}},
    "pipe 2, ZB-H1": {"parallel": {"pipe": 2, "schedule": "zb-h1"}},
    "pipe 2 x 2 chunks": {"parallel": {"pipe": 2, "chunks_per_stage": 2}},
    "fp32": {"precision": {"dtype": "fp32"}},
    "bf16": {"precision": {"dtype": "bf16"}},
    "bf16, reduced in bf16": {"precision": {"dtype": "bf16", "reduce_dtype": "bf16"}},
    "recompute": {"parallel": {"recompute": "full"}},
    "offload": {"parallel": {"offload": "optimizer"}},
    "gather: step": {"parallel": {"gather": "step"}},
    "data 4, gather_within 2": {"parallel": {"data": 4, "gather_within": 2}},
    "reduce: step": {"parallel": {"reduce": "step"}},
    "reduce: micro_batch": {"parallel": {"reduce": "micro_batch"}},
    "Muon": {"optimizer": {"name": "muon"}},
    "Llama form": LLAMA,
    "BERT, pairs, dropout": DROPPING["BERT"],
    "modern encoder, local layers": MODERN,
    "T5, dropout": DROPPING["T5"],
} | {
    f"{name}, {axes}": family | {"parallel": parallel}
    for name, family in DROPPING.items()
    for axes, parallel in (
        ("tensor 2, sequence parallel", {"tensor": 2, "sequence_parallel": True}),
        ("pipe 2 x sequence 2", {"pipe": 2, "sequence": 2}),
    )
}
REFUSED: dict[str, Change] = {
    "more pipeline stages than layers": {"parallel": {"pipe": 8}},
    "chunks per stage without a pipeline": {"parallel": {"chunks_per_stage": 2}},
    "chunks per stage under GPipe": {"parallel": {"pipe": 2, "chunks_per_stage": 2, "schedule": "gpipe"}},
    "more chunks than layers": {"parallel": {"pipe": 2, "chunks_per_stage": 3}},
    "tensor ranks that do not divide the heads": {"parallel": {"tensor": 3}},
    "Muon with its state on the host": {"parallel": {"offload": "optimizer"}, "optimizer": {"name": "muon"}},
    "a second copy of the weights among all ranks": {"parallel": {"zero_stage": 3, "data": 2, "gather_within": 2}},
    "bf16 reduction of fp32 gradients": {"precision": {"dtype": "fp32", "reduce_dtype": "bf16"}},
}


def composition_table() -> str:
    """Return the table in Markdown: axes, schedules, precisions and model forms by ZeRO stage, then the refusals."""
    reasons: list[PalimpsestError] = []
    lines = ["| | " + " | ".join(ZERO_STAGES) + " |", "| --- |" + " --- |" * len(ZERO_STAGES)]
    for name, change in USES.items():
        cells = [_cell(problems_of(stage, change), reasons) for stage in ZERO_STAGES.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Refused before anything starts:", ""]
    lines += [f"{number}. {_sentence(reason)}" for number, reason in enumerate(reasons, start=1)]
    for name, change in REFUSED.items():
        problems = problems_of(change, {})
        assert problems, f"{name} is not refused"
        lines.append(f"- {name}: {_sentence(problems[0])}")
    return "\n".join(lines)


def problems_of(*changes: Change) -> list[PalimpsestError]:
    """Return every rule that the example with these changes breaks on a world of its own size."""
    config = example(*changes)
    parallel = config.parallel
    world_size = parallel.pipe * parallel.tensor * parallel.sequence * (parallel.data or 1)
    return examine(config, world_size)[1]


def example(*changes: Change) -> RunConfig:
    """Return a small run in fp32 with four layers and four heads, with keys of its sections changed."""
    section: Callable[[str], dict[str, Any]] = lambda name: {  # noqa: E731
        key: value for change in changes for key, value in change.get(name, {}).items()
    }
    model: dict[str, Any] = {"vocab_size": 500, "num_layers": 4, "hidden_size": 64, "num_heads": 4}
    stage = RunStage(
        objective=ObjectiveConfig(**section("objective")),
        data=DataConfig(train="data/train"),
        sequence_length=64,
        global_batch_size=24,
        duration=Duration(steps=10),
    )
    return RunConfig(
        folder=Path("runs/example"),
        tokenizer=Path("data/tokenizer"),
        model=make_model(**{**model, **section("model")}),
        stages=(stage,),
        optimizer=OptimizerConfig(**section("optimizer")),
        precision=PrecisionConfig(**{"dtype": "fp32", **section("precision")}),
        parallel=ParallelConfig(**section("parallel")),
    )


def _cell(problems: list[PalimpsestError], reasons: list[PalimpsestError]) -> str:
    """Return `yes`, or the numbers of the reasons, which are added to `reasons` where they are new."""
    if not problems:
        return "yes"
    numbers = []
    for problem in problems:
        # Reasons are equal where their text is: the list is short, and errors have no equality of their own.
        known = [str(reason) for reason in reasons]
        if str(problem) not in known:
            reasons.append(problem)
        numbers.append([str(reason) for reason in reasons].index(str(problem)) + 1)
    return "no (" + ", ".join(map(str, numbers)) + ")"


def _sentence(problem: PalimpsestError) -> str:
    """Return a problem as one line of text."""
    parts = [problem.wrong, f"allowed: {problem.allowed}" if problem.allowed else "", problem.remedy]
    return "; ".join(part for part in parts if part) + "."
