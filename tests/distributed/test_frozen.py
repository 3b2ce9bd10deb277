"""Steps with frozen parameters against one plain torch process in fp64: these stay, and the rest moves as it does.

The bounds are those of `parity.py`; runs of several stages that freeze are in `test_freeze.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.config.parameter_patterns import matches
from engine.models.families import family
from engine.models.initial import initial_value
from tests.distributed.cases import Case, config_of
from tests.distributed.parity import check

FRONT = ("embed*", "layers.0.*")
BACK = ("layers.2.*", "final_norm.*", "lm_head.*")
FROZEN = (
    Case(zero_stage=3, tensor=2, freeze=FRONT),  # the tied head is frozen with the embedding
    Case("bert", zero_stage=1, pipe=3, freeze=FRONT),  # the first stage trains nothing
    Case("llama", zero_stage=3, pipe=3, recompute="full", freeze=BACK),  # the last one only passes gradients on
)
"""Parameters without gradients: in front, behind, in a whole pipeline stage."""
MORE_FROZEN = (
    Case("llama", zero_stage=1, pipe=3, schedule="zb-h1", freeze=BACK),
    Case("llama-deep", zero_stage=3, pipe=2, data=2, chunks_per_stage=2, freeze=FRONT),
    Case("bert", zero_stage=3, pipe=3, tensor=2, sequence_parallel=True, recompute="selective", freeze=FRONT),
    Case("llama", zero_stage=3, tensor=2, data=2, optimizer="muon", freeze=("layers.1.*", "embed*")),
    Case("t5", zero_stage=3, pipe=3, data=2, freeze=("layers.0.*", "layers.1.*", "encoder*", "embed*")),
    Case("llama", zero_stage=1, pipe=3, dtype="bf16", freeze=FRONT),
)


@pytest.mark.parametrize(
    "case", [*FROZEN, *(pytest.param(case, marks=pytest.mark.matrix) for case in MORE_FROZEN)], ids=str
)
def test_what_is_frozen_stays_and_the_rest_is_that_of_plain_torch(case: Case):
    begun, found = start_of(case), check(case).weights
    frozen = [name for name in found if matches(name, case.freeze)]
    assert frozen
    assert all(np.array_equal(found[name], begun[name]) for name in frozen)
    moved = [name for name in found if name not in frozen and not np.array_equal(found[name], begun[name])]
    assert moved
    assert {*frozen, *moved} == {*found}


def start_of(case: Case) -> dict[str, np.ndarray]:
    """The weights before the first step, rounded to the working dtype."""
    config = config_of(case)
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    return {
        spec.name: initial_value(spec, config.model, config.seed).to(dtype).float().numpy()
        for spec in family(config.model).specs(config.model)
    }
