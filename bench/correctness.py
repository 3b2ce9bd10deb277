"""Whether a device computes what the CPU does: the same short training in several ways, compared with CPU fp32.

Every way starts from the same weights and sees the same batches (two micro-batches a step, clipping active); rows of
several documents are a case of their own, since a GPU has other kernels for them (`engine.parallel.packed`). After
the last step the state is saved, wiped, loaded and hashed again on the device.

The bounds: fp32 sides differ in the order of sums, 2**-24 a rounding, some thousands of roundings to a loss and
some steps of Adam to magnify them. bf16 rounds weights and activations by 2**-9 on average; a loss near
log(vocabulary) moves by no more than that share of it.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.ours import Offload, Ours, Precision, Shape
from engine.config.schema.model import GPTConfig

STEPS = 6
FP32_LOSS, FP32_NORM = 1e-4, 1e-3
"""Absolute, of the loss; relative, of the gradient norm."""
BF16_LOSS, BF16_NORM = 2.0**-8, 2.0**-4
"""Relative, both. The norm is a sum of squares of gradients that are themselves rounded at every layer."""
REFERENCE = "cpu fp32 ZeRO-1"
PACKED = ", packed"
"""How names of cases end whose rows hold several documents. Their reference is a case of its own, under a mask."""

Case = tuple[str, tuple[Shape, int, Precision, Offload]]
"""(name, arguments of `work`)"""


OFFLOADED: dict[Offload, str] = {"none": "", "optimizer": ", offload"}
"""What a case's name says of it."""


def shape(toy: bool) -> Shape:
    """GPT-2 in form, small enough for the CPU, with a padded vocabulary and head size 64."""
    if toy:
        model = GPTConfig(vocab_size=250, num_layers=2, hidden_size=32, num_heads=2, max_positions=32)
        return Shape(model, length=32, rows=4, micro_rows=2)
    model = GPTConfig(vocab_size=4000, num_layers=4, hidden_size=256, num_heads=4, max_positions=128)
    return Shape(model, length=128, rows=16, micro_rows=8)


def cases(device_type: str, toy: bool) -> list[Case]:
    """Every way to train; the reference first. Names that begin with `cpu` run there."""
    ways: list[tuple[int, Precision, Offload]] = [
        (1, "fp32", "none"),
        (1, "bf16", "none"),
        (3, "bf16", "none"),
        (3, "fp32", "none"),
        (0, "fp32", "none"),
        (1, "fp32", "optimizer"),
        (2, "bf16", "optimizer"),
        (3, "bf16", "optimizer"),
        (3, "fp32", "optimizer"),
    ]
    if toy:
        ways = ways[1:3]
    where = "device" if device_type == "cpu" else device_type
    packed = replace(shape(toy), packed=True)
    return [
        (REFERENCE, (shape(toy), 1, "fp32", "none")),
        *(
            (f"{where} {precision} ZeRO-{stage}{OFFLOADED[offload]}", (shape(toy), stage, precision, offload))
            for stage, precision, offload in ways
        ),
        (REFERENCE + PACKED, (packed, 1, "fp32", "none")),
        (f"{where} bf16 ZeRO-1{PACKED}", (packed, 1, "bf16", "none")),
    ]


def work(
    connection: Connection, end: float, shape: Shape, zero_stage: int, precision: Precision, offload: Offload
) -> None:
    """Trains a few steps, then saves, wipes and loads; sends the figures as it goes."""
    begin = time.monotonic()
    ours = Ours(shape, zero_stage, precision, offload=offload)
    losses, norms = [], []
    for step in range(STEPS):
        loss, norm = ours.step(ours.inputs(step), shape.num_targets)
        losses.append(loss)
        norms.append(norm)
    connection.send({"losses": losses, "gradient_norms": norms})
    if shape.packed:
        connection.send({"attention": packed_attention_kernel(ours)})
    connection.send(save_and_load(ours))
    connection.send({"seconds": round(time.monotonic() - begin, 1)})
    connection.send(None)


def packed_attention_kernel(ours: Ours) -> str:
    """What holds attention inside documents on the device."""
    from engine.parallel.packed import kernel

    return kernel(ours.device, ours.pipeline.engine.dtype, ours.shape.model.head_size)


def save_and_load(ours: Ours) -> dict[str, Any]:
    """Fingerprints before a save and after a wipe and a load, and the loss of one batch at both."""
    import torch

    from engine.checkpoint.fingerprint import fingerprint
    from engine.checkpoint.load import load
    from engine.checkpoint.manifest import CheckpointState
    from engine.checkpoint.saver import Saver

    engine, groups = ours.pipeline.engine, ours.groups

    def facts() -> tuple[str, float]:
        loss = ours.pipeline.evaluate(ours.inputs(STEPS)) / ours.shape.num_targets
        return fingerprint(engine.parameter_shards(), engine.placements(), groups), loss.item()

    saved = facts()
    with tempfile.TemporaryDirectory() as folder:
        state = CheckpointState(step=STEPS, tokens=0, zero_stage=engine.zero_stage, config_hash="bench")
        path = Saver(Path(folder) / "checkpoints", groups).save(
            engine.parameter_shards(), engine.placements(), state, "bench", 0
        )
        engine.fill(lambda spec, first, end: torch.zeros(end - first, *spec.shape[1:]))
        for shard in engine.parameter_shards():
            for moment in shard.moments.values():
                moment.zero_()
        wiped = facts()
        load(path, groups, engine.parameter_shards(), engine.placements())
        engine.refresh()
    return {"saved": saved, "wiped": wiped, "loaded": facts()}


def verdicts(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """`ok ...` or what is wrong, by case; without those whose reference was not run."""
    references = {name: found.get(REFERENCE + (PACKED if name.endswith(PACKED) else ""), {}) for name in found}
    return {
        name: verdict(case, references[name], "bf16" in name)
        for name, case in found.items()
        if "losses" in references[name]
    }


def verdict(case: dict[str, Any], reference: dict[str, Any], is_bf16: bool) -> str:
    """What is to be said of one case."""
    if "failed" in case or "loaded" not in case:
        return f"failed: {str(case.get('failed', 'ended early')).strip().splitlines()[-1]}"
    loss = max(abs(a - b) for a, b in zip(case["losses"], reference["losses"], strict=True))
    norm = max(abs(a / b - 1) for a, b in zip(case["gradient_norms"], reference["gradient_norms"], strict=True))
    loss_bound = BF16_LOSS * reference["losses"][0] if is_bf16 else FP32_LOSS
    wrong = []
    if not (math.isfinite(loss) and loss <= loss_bound):
        wrong.append(f"losses off by {loss:.1e} (allowed {loss_bound:.1e})")
    if not (math.isfinite(norm) and norm <= (BF16_NORM if is_bf16 else FP32_NORM)):
        wrong.append(f"gradient norms off by {norm:.1e} of themselves")
    if case["loaded"] != case["saved"]:
        wrong.append("the state after save and load is not the state before")
    if case["wiped"] == case["saved"]:
        wrong.append("the wipe changed nothing, so the load proves nothing")
    how = f", attention by {case['attention']}" if "attention" in case else ""
    return "; ".join(wrong) or f"ok (losses within {loss:.1e}, gradient norms within {norm:.1e} of themselves{how})"
