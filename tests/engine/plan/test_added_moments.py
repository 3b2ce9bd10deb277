"""What run stages keep and do against forgetting, in the plan: memory, checkpoints, operations, traffic and time.

What ranks really hold is compared with the plan in tests/distributed/test_regularization.py.
"""

import pytest

from engine.config.resolve import examine
from engine.config.schema.parallel import ParallelConfig
from engine.plan.cost import checkpoint_bytes, run_cost
from engine.plan.hardware import cluster
from engine.plan.plan import RunStagePlan, make_plan, run_stage_plans
from tests.engine.config.run_config import config

KEPT = {
    "regularization": "{l2_sp: {strength: 1.0}}",
    "ema": "{decay: 0.9}",
    "reptile": "{every_steps: 2, step_size: 0.5}",
}
FRONT = "[embed*, layers.0.*, layers.1.*]"


def run(*kept: str, freeze: str = "[]", **parallel):
    """A run of one stage that keeps these."""
    overrides = [f"stages.0.{name}={KEPT[name]}" for name in kept]
    made = config(*overrides, f"stages.0.freeze={freeze}", "model.tie_embeddings=false")
    return made.model_copy(update={"parallel": ParallelConfig(**parallel)})


def plan_of(made) -> RunStagePlan:
    layout, problems = examine(made, 4)
    assert layout is not None
    assert problems == []
    return run_stage_plans(made, layout)[0]


@pytest.mark.parametrize(("zero_stage", "shards"), [(1, 4), (3, 4)])
@pytest.mark.parametrize("freeze", ["[]", FRONT])
def test_each_value_takes_four_bytes_of_each_trained_element_that_a_rank_updates(zero_stage, shards, freeze):
    plain = plan_of(run(freeze=freeze, zero_stage=zero_stage)).stages[0]
    for number, kept in enumerate((("ema",), ("ema", "regularization"), tuple(KEPT)), start=1):
        found = plan_of(run(*kept, freeze=freeze, zero_stage=zero_stage)).stages[0]
        assert found.memory.added_moments == pytest.approx(4 * number * plain.updated, abs=4 * number)
        assert found.memory.total - plain.memory.total == found.memory.added_moments
        assert found.stored_bytes - plain.stored_bytes == 4 * number * (found.stored - found.stored_frozen)
        assert shards * found.updated == pytest.approx(
            found.parameters_per_rank * (1 if freeze == "[]" else 0.5), rel=0.35
        )


def test_offload_keeps_them_on_the_host():
    plain, found = (plan_of(run(*kept, zero_stage=1, offload="optimizer")).stages[0] for kept in ((), ("ema",)))
    assert found.memory.added_moments == 0
    assert found.memory.total == plain.memory.total
    assert found.memory.host - plain.memory.host == pytest.approx(4 * plain.updated, abs=4)


def second(more: str):
    rows = "data: {train: d, validation: v}, sequence_length: 64, global_batch_size: 24"
    first = f"name: first, {rows}, duration: {{steps: 10}}"
    return config(
        f"stages=[{{{first}}}, {{name: second, {rows}, duration: {{steps: 5}}, {more}}}]",
        "precision.dtype=fp32",
        "evaluation={max_samples: 24}",
    )


def cost_of(made):
    layout, problems = examine(made, 8)
    assert layout is not None
    assert problems == []
    return run_cost(made, layout, cluster("h100-80gb", 8, 8))


def test_the_fisher_information_costs_steps_of_the_stage_before_and_the_average_another_evaluation():
    plain = cost_of(second("freeze: []"))
    fisher = cost_of(second("regularization: {ewc: {strength: 1.0, batches: 7}}")).run_stages[1]
    step = plain.run_stages[0].step.total
    assert fisher.training_seconds == pytest.approx(plain.run_stages[1].training_seconds + 7 * step)
    averaged, once = cost_of(second("ema: {decay: 0.9}")).run_stages[1], plain.run_stages[1].evaluation_seconds
    assert once is not None
    assert averaged.evaluation_seconds == pytest.approx(2 * once)


def test_the_largest_checkpoint_is_that_of_the_stage_that_keeps_most():
    plain, kept = second("freeze: []"), second("regularization: {ewc: {strength: 1.0, batches: 5}}")  # two values
    assert checkpoint_bytes(kept) * 12 == checkpoint_bytes(plain) * (12 + 2 * 4)
    assert make_plan(kept, 8).node_memory_bytes(8) > make_plan(plain, 8).node_memory_bytes(8)
    assert cost_of(kept).checkpoint_seconds > cost_of(plain).checkpoint_seconds


@pytest.mark.parametrize(
    "parallel", [{"zero_stage": 3, "reduce": "step"}, {"zero_stage": 1}, {"zero_stage": 3, "gather": "step"}]
)
def test_distillation_costs_a_forward_pass_its_gathers_and_the_likeliest_tokens(parallel):
    made = [config(f"stages.0.regularization={text}") for text in ("{}", "{distillation: {strength: 1.0, top_k: 10}}")]
    made = [one.model_copy(update={"parallel": ParallelConfig(tensor=2, **parallel)}) for one in made]
    plain, found = (plan_of(one).stages[0] for one in made)
    assert 3 * found.operations == 4 * plain.operations
    # two data ranks: 12 rows each of 64 predictions; int32 and fp32 of each likely token
    assert found.memory.logits - plain.memory.logits == 12 * 64 * 10 * 8
    assert found.memory.added_moments == pytest.approx(4 * plain.updated, abs=4)
    # ZeRO-3 gathers for forward, backward and the teacher, or for step and teacher; ZeRO-1 after each change of weights
    factor = {1: 3, 3: 2 if "gather" in parallel else 1.5}[parallel["zero_stage"]]
    assert found.traffic.weights == pytest.approx(factor * plain.traffic.weights, rel=1e-3)
    assert found.traffic.gradients == plain.traffic.gradients
    # half of the activations' sums again, an all-reduced number and the gathered tokens of each prediction
    gathered = 12 * 64 * (2 * 4 + 10 * 12 * 2) // 2
    losses = 12 * 64 * 3 * 4 * 2 // 2
    assert found.traffic.tensor - plain.traffic.tensor == (plain.traffic.tensor - losses) // 2 + gathered
