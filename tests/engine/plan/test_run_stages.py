"""How many layers recompute, and what that leaves of the activations."""

from __future__ import annotations

from engine.config.resolve import resolve
from engine.plan.composition import example, problems_of
from engine.plan.hardware import GIB
from engine.plan.plan import make_plan
from engine.plan.run_stages import recomputed_layers

TOKEN = 64 * 4
"""Bytes of a token's hidden state in the example."""


def activations(**parallel: object) -> int:
    return make_plan(example({"parallel": {"data": 1, **parallel}}), 1).stages[0].memory.activations


def test_the_first_layers_of_each_stage_recompute() -> None:
    config = example({"parallel": {"pipe": 2, "recompute": "full", "recompute_layers": 1}})
    layout = resolve(config, 2)
    first, second = (list(recomputed_layers(config, layout, stage, "cuda")) for stage in range(2))
    assert first == [0]
    assert second == [4 - make_plan(config, 2).stages[1].num_layers]
    assert not recomputed_layers(example(), resolve(example(), 1), 0, "cuda")


def test_full_and_selective_keep_1_and_11_widths_and_the_rest_for_one_layer_at_a_time() -> None:
    """Rows are as long as the model is wide, so who sees whom (rows hold documents) takes one width more."""
    plain, selective, full = (activations(recompute=how) for how in ("none", "selective", "full"))
    assert plain == 4 * 18 * 64 * TOKEN
    assert selective == (4 * 11 + 7) * 64 * TOKEN
    assert full == (4 * 1 + 17) * 64 * TOKEN
    assert activations(recompute="full", recompute_layers=1) == (1 + 3 * 18 + 17) * 64 * TOKEN


def test_a_budget_is_kept_with_as_few_layers_as_can_be() -> None:
    for wanted in range(5):
        planned = activations(recompute="full", recompute_layers=wanted) if wanted else activations()
        config = example({"parallel": {"data": 1, "recompute": "full", "activation_gib": planned / GIB}})
        found = len(recomputed_layers(config, resolve(config, 1), 0, "cuda"))
        assert activations(recompute="full", activation_gib=planned / GIB) <= planned
        # one layer that recomputes saves nothing beside its own second run
        assert found == (0 if wanted == 1 else wanted)
    assert (
        len(
            recomputed_layers(
                example({"parallel": {"recompute": "full", "activation_gib": 1e-9}}), resolve(example(), 1), 0, "cuda"
            )
        )
        == 4
    )


def test_numbers_and_budgets_want_a_kind_and_exclude_each_other() -> None:
    (problem,) = problems_of({"parallel": {"recompute_layers": 2}})
    assert "parallel.recompute_layers = 2 with parallel.recompute = none" in str(problem)
    (problem,) = problems_of({"parallel": {"recompute": "full", "recompute_layers": 2, "activation_gib": 1.0}})
    assert "parallel.recompute_layers and parallel.activation_gib" in str(problem)
    assert not problems_of({"parallel": {"recompute": "selective", "activation_gib": 1.0}})


def test_full_recomputation_costs_a_forward_pass_of_its_layers() -> None:
    plain, full = (make_plan(example({"parallel": {"recompute": how}}), 1).stages[0] for how in ("none", "full"))
    assert plain.operations < full.operations < plain.operations * 4 / 3
    assert (plain.recomputed, full.recomputed) == (0, 4)
