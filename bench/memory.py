"""`python -m bench.memory`: memory per rank as `palimpsest plan` says it, against what ranks really take on a CPU.

Every case is a few training steps of a small model on ranks of their own. What counts is the bytes of tensors at their
peak, told by a hook of the allocator (`bench.ranks_memory`); resident memory stands beside it. Nothing here decides
what is close enough: `BOUND` only marks what lies further off.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.command import run
from bench.contest import Worker
from bench.machine import machine
from engine.plan.composition import BERT, LLAMA, MODERN, T5

BOUND = 0.15
TIMEOUT_SECONDS = 900.0
MIB = 2**20

Tree = dict[str, Any]
CASES: dict[str, Tree] = {
    "GPT-2, ZeRO-0, fp32": {"parallel": {"zero_stage": 0}, "precision": "fp32"},
    "GPT-2, ZeRO-1, bf16": {"parallel": {"zero_stage": 1}},
    "GPT-2, ZeRO-1, bf16, data 2": {"parallel": {"zero_stage": 1, "data": 2}},
    "GPT-2, ZeRO-2, bf16, data 2": {"parallel": {"zero_stage": 2, "data": 2}},
    "GPT-2, ZeRO-3, bf16, data 2": {"parallel": {"zero_stage": 3, "data": 2}},
    "GPT-2, ZeRO-3, fp32, data 2": {"parallel": {"zero_stage": 3, "data": 2}, "precision": "fp32"},
    "GPT-2, ZeRO-1, bf16, pipe 2": {"parallel": {"zero_stage": 1, "pipe": 2}},
    "GPT-2, ZeRO-1, fp32, tensor 2": {"parallel": {"zero_stage": 1, "tensor": 2}, "precision": "fp32"},
    "GPT-2, ZeRO-1, bf16, recompute full": {"parallel": {"zero_stage": 1, "recompute": "full"}},
    "GPT-2, ZeRO-1, bf16, recompute selective": {"parallel": {"zero_stage": 1, "recompute": "selective"}},
    "GPT-2, ZeRO-1, bf16, documents": {"parallel": {"zero_stage": 1}, "attention": "document"},
    "GPT-2, ZeRO-1, bf16, vocabulary 65,536": {"parallel": {"zero_stage": 1}, "model": {"vocab_size": 65536}},
    "Llama form, ZeRO-1, bf16": LLAMA | {"parallel": {"zero_stage": 1}},
    "BERT, pairs, ZeRO-1, fp32": BERT | {"parallel": {"zero_stage": 1}, "precision": "fp32"},
    "modern encoder, local, ZeRO-1, fp32": MODERN | {"parallel": {"zero_stage": 1}, "precision": "fp32"},
    "T5, ZeRO-1, fp32": T5 | {"parallel": {"zero_stage": 1}, "precision": "fp32"},
    "GPT-2, ZeRO-1, fp32, offload": {"parallel": {"zero_stage": 1, "offload": "optimizer"}, "precision": "fp32"},
    "GPT-2, ZeRO-1, fp32, sequence 2": {"parallel": {"zero_stage": 1, "sequence": 2}, "precision": "fp32"},
    "GPT-2, ZeRO-1, fp32, tensor 2, sequence parallel": {
        "parallel": {"zero_stage": 1, "tensor": 2, "sequence_parallel": True},
        "precision": "fp32",
    },
    "GPT-2, ZeRO-1, fp32, pipe 2, ZB-H1": {
        "parallel": {"zero_stage": 1, "pipe": 2, "schedule": "zb-h1"},
        "precision": "fp32",
    },
    "GPT-2, ZeRO-3, fp32, data 4, gather_within 2": {
        "parallel": {"zero_stage": 3, "data": 4, "gather_within": 2},
        "precision": "fp32",
    },
}


def main(
    small: Annotated[bool, typer.Option("--small", help="A toy model: for tests, its ratios mean nothing.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Cases whose name has one of these in it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
) -> None:
    """Compare the plan's memory per rank with the tensors that training holds at its peak."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result: dict[str, Any] = {"machine": machine(1), "bound": BOUND, "cases": {}}
    print(f"{'MiB on each rank':<56} {'plan':>7} {'tensors':>8} {'plan / tensors':>15} {'resident':>9}")
    for name in (name for name in CASES if any(part in name for part in only or [""])):
        found = measure(tree_of(CASES[name], small))
        result["cases"][name] = found
        show(name, found["ranks"])
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    ratios = [rank["plan_over_tensors"] for case in result["cases"].values() for rank in case["ranks"]]
    print(f"{sum(abs(ratio - 1) > BOUND for ratio in ratios)} of {len(ratios)} ranks further off than {BOUND:.0%}")


def tree_of(case: Tree, small: bool) -> Tree:
    """The run behind a case: 6 layers, width 256, rows of 256 tokens, micro-batches of 4; a toy of it if `small`."""
    length, width, vocab_size = (32, 32, 250) if small else (256, 256, 8192)
    parallel = {"micro_batch_size": 4} | case["parallel"]
    attention = case.get("attention", "row")
    shape = {
        "vocab_size": vocab_size,
        "num_layers": 6,
        "hidden_size": width,
        "num_heads": 4,
        "max_positions": length,
    }
    return {
        "folder": "nowhere",
        "tokenizer": "nowhere",
        "model": shape | case.get("model", {}),
        "stages": [
            {
                "data": {"train": "nowhere", "attention": attention},
                "objective": case.get("objective", {"name": "causal"}),
                "sequence_length": length,
                "global_batch_size": 4 * 2 * parallel.get("data", 1) * parallel.get("pipe", 1),
                "duration": {"steps": 10},
            }
        ],
        "precision": {"dtype": case.get("precision", "bf16")},
        "parallel": parallel,
    }


def measure(tree: Tree) -> dict[str, Any]:
    """A case's plan and what its ranks took, as JSON values."""
    from bench import ranks_memory
    from engine.config.load import parse_run
    from engine.config.resolve import resolve
    from engine.parallel.axes import Grid
    from engine.plan.plan import run_stage_plans

    config = parse_run(tree, "bench.memory")
    parallel = config.parallel
    world_size = parallel.pipe * parallel.tensor * parallel.sequence * (parallel.data or 1)
    layout = resolve(config, world_size)
    grid = Grid(layout)
    (planned,) = run_stage_plans(config, layout, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            Worker(
                f"rank {number}",
                "forkserver",
                {},
                ranks_memory.rank,
                config,
                folder,
                number,
                world_size,
            )
            for number in range(world_size)
        ]
        try:
            measured = [worker.receive(TIMEOUT_SECONDS) for worker in workers]
        finally:
            for worker in workers:
                worker.end()
    ranks = []
    for number, found in enumerate(measured):
        memory = planned.stages[grid.coordinates(number).stage].memory
        total = memory.total + memory.host  # on a CPU the host is the device
        ranks.append(
            {
                "plan": asdict(memory) | {"states": memory.states, "total": total},
                "measured": asdict(found),
                "plan_over_tensors": total / found.peak,
            }
        )
    return {"config": {key: tree[key] for key in ("model", "stages", "precision", "parallel")}, "ranks": ranks}


def show(name: str, ranks: list[dict[str, Any]]) -> None:
    """Prints a case, a line for each rank."""
    for number, rank in enumerate(ranks):
        plan, measured, ratio = rank["plan"]["total"], rank["measured"], rank["plan_over_tensors"]
        mark = " *" if abs(ratio - 1) > BOUND else ""
        print(
            f"{name + f', rank {number}':<56} {plan / MIB:>7.1f} {measured['peak'] / MIB:>8.1f} {ratio:>15.3f}"
            f" {measured['resident'] / MIB:>9.0f}{mark}",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
