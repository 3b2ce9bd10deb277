"""A layout's run compared with one plain torch process in fp64, and the bounds that rounding leaves.

Tolerances in fp32: the sums that a layout reorders have at most 12 x 8 tokens x 64 columns; fp32 rounds each to 6e-8,
which leaves the loss (about 4) within 2e-6 and the norm within 1e-5 of itself. Adam divides by the root of the second
moment, so a relative error of 1e-5 in a gradient moves a weight by at most 1e-5 x learning rate x steps. Where a
gradient is itself rounding (a sum of 96 terms of 1e-3 is off by 6e-10) it moves by 6e-10 / epsilon x learning rate x
steps = 4e-6: 2e-5 covers both. The true gradient of a key bias is zero (softmax does not
see a constant added to all scores), so Adam amplifies pure rounding there: its bound is 2 x learning rate x steps,
and the model's outputs, which do not depend on it, must agree.

They hold for models whose course rounding does not change, and not all are such. An element whose gradient is next to
nothing at its first appearance (an embedding of a token that comes once: -2.3e-6, rounded by 2e-8) moves by gradient /
(|gradient| + epsilon) x learning rate: 1.3e-5 wrong in a row of size 0.02, which an RMS norm magnifies fifty times. A
Llama form of five layers left the bound of the norm that way (1e-4): in one plain process in fp32, tied or not, with
grouped heads or without, on whole batches or single rows; and in fp64 one fp32 rounding of its initial weights moves
its norm by 3e-5, a hundred times as much as that of the models here. So a test holds these to fp64 without any layout,
and a layout that leaves the bounds is wrong.

In bf16, which keeps 8 bits, what a sublayer hands on is rounded about twice, each time by up to 2^-9 of itself: N
sublayers leave the first step's gradient off by about (2 N)^0.5 x 2^-9 of itself. How far that leads a loss depends on
the model: a T5 without a scale on its scores strays ten times as far as a GPT. So one plain process in bf16 says it, by
its largest distance from fp64 over the steps. A layout's is another draw of the same size, times 2^0.5 where tensor
ranks round their parts of a sum, too; the largest of six draws is above thrice that of six others once in 300 times,
hence 4 x. Norms of later steps are taken at weights that have drifted apart, since Adam turns a gradient that is mostly
rounding into a whole step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.models.families import family
from engine.models.materialize import fill
from tests.distributed.cases import (
    LEARNING_RATE,
    NUM_STEPS,
    Case,
    Result,
    config_of,
    global_batch,
    join_results,
    run_rank,
)
from tests.distributed.plain import reference
from tests.distributed.ranks import run_ranks
from tests.distributed.table import record

LOSS_BOUND, NORM_BOUND, WEIGHT_BOUND = 2e-6, 1e-5, 2e-5

KEY_BIAS_BOUND = 2 * LEARNING_RATE * NUM_STEPS

references: dict[tuple[Any, ...], Result] = {}


def run(case: Case) -> Result:
    return join_results(case, run_ranks(case.world_size, run_rank, case))


def check(case: Case) -> Result:
    """Hold a case to plain torch; return what its ranks computed."""
    expected, found = plain(case), run(case)
    record(case, found, expected, furthest_weight(found, expected, case))
    if case.dtype == "bf16":
        check_bf16(found, expected, case)
        return found
    check_fp32(found, expected, case)
    for name, values in expected.weights.items():
        keys = key_biases(name, case)
        assert np.abs(found.weights[name] - values)[keys].max(initial=0) <= KEY_BIAS_BOUND, name
    # 2e-5 per weight moves a logit by at most 2e-5 x width x layers x a few; in fact rounding is near 1e-5
    np.testing.assert_allclose(logits(found, case), logits(expected, case), atol=2e-4)
    return found


def plain(case: Case, dtype: torch.dtype = torch.float64) -> Result:
    """The run without a layout, taken once for all cases that share it."""
    key = (case.model, case.decay, case.attention, case.optimizer, case.vocab_multiple, case.freeze, dtype)
    if key not in references:
        references[key] = reference(case, dtype)
    return references[key]


def check_fp32(found: Result, expected: Result, case: Case) -> None:
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=LOSS_BOUND)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=NORM_BOUND)
    assert furthest_weight(found, expected, case) <= WEIGHT_BOUND


def check_bf16(found: Result, expected: Result, case: Case) -> None:
    model = config_of(case).model
    attending_twice = model.num_layers - model.num_encoder_layers if model.family == "t5" else 0
    sublayers = 2 * model.num_layers + attending_twice
    np.testing.assert_allclose(found.norms[0], expected.norms[0], rtol=(2 * sublayers) ** 0.5 * 2.0**-9)
    rounded = np.abs(np.subtract(plain(case, torch.bfloat16).losses, expected.losses)).max()
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=4 * rounded)
    masters = np.concatenate([values.ravel() for values in found.weights.values()])
    assert masters.dtype == np.float32
    assert (torch.from_numpy(masters).bfloat16().float().numpy() != masters).any(), "all of them are bf16 numbers"


def furthest_weight(found: Result, expected: Result, case: Case) -> float:
    """The largest difference of a final weight that is no key bias."""
    return max(
        float(np.abs(found.weights[name] - values)[~key_biases(name, case)].max(initial=0))
        for name, values in expected.weights.items()
    )


def key_biases(name: str, case: Case) -> np.ndarray:
    """Which elements of a parameter are key biases."""
    model = config_of(case).model
    shape = next(spec.shape for spec in family(model).specs(model) if spec.name == name)
    mask = np.zeros(shape, bool)
    if name.endswith("qkv_proj.bias"):
        first = model.num_heads * model.head_size
        mask[first : first + model.num_kv_heads * model.head_size] = True
    return mask


@torch.no_grad()
def logits(result: Result, case: Case) -> np.ndarray:
    """What the trained model says of one batch."""
    config = config_of(case).model
    model, ties = family(config).build(config), family(config).ties(config)
    fill(model, lambda name: torch.from_numpy(result.weights[ties.get(name, name)]).float())
    batch = global_batch(0, case.attention, case.model)
    seen = {
        name: tensor for name, tensor in batch.items() if not name.startswith(("targets", "weights", "masked", "pair"))
    }
    return model(**seen)["logits_BTV"].numpy()
