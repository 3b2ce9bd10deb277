"""Frozen parameters in the plan: memory, traffic and checkpoints without them, and patterns that match nothing."""

import json

import pytest

from engine.config.objectives import RowLengths
from engine.config.parameter_patterns import matches
from engine.config.resolve import examine
from engine.config.rules.model import check_model
from engine.config.schema.adapter import AdaLoRAConfig, LoRAConfig
from engine.config.schema.model import BERTConfig, GPTConfig, T5Config, TaskHead
from engine.config.schema.parallel import ParallelConfig
from engine.errors import ConfigError, PalimpsestError
from engine.plan.cut import whole_model
from engine.plan.families import figures
from engine.plan.frozen import (
    base_patterns,
    check_patterns,
    first_trained_layer,
    num_trained,
    receives_gradients,
    spared_operations,
)
from engine.plan.parameters import model_entries
from engine.plan.plan import RunStagePlan, make_plan, run_stage_plans
from tests.engine.config.run_config import config

GPT = GPTConfig(vocab_size=500, num_layers=4, hidden_size=64, num_heads=4)
UNTIED = GPT.model_copy(update={"tie_embeddings": False})
BERT = BERTConfig(family="bert", vocab_size=500, num_layers=4, hidden_size=64, num_heads=4)
T5 = T5Config(family="t5", vocab_size=500, num_layers=4, num_decoder_layers=2, hidden_size=64, num_heads=4)
FRONT = ("embed*", "layers.0.*", "layers.1.*")


def run(model=UNTIED, freeze=(), **parallel):
    """A run of one stage that freezes what these patterns match."""
    made = config()
    stages = tuple(stage.model_copy(update={"freeze": freeze}) for stage in made.stages)
    return made.model_copy(update={"model": model, "stages": stages, "parallel": ParallelConfig(**parallel)})


def plans(freeze, world_size=4, model=UNTIED, **parallel) -> RunStagePlan:
    made = run(model, freeze, **parallel)
    layout, _ = examine(made, world_size)
    assert layout is not None
    return run_stage_plans(made, layout)[0]


@pytest.mark.parametrize(
    ("model", "patterns", "first"),
    [
        (GPT, (), 0),
        (GPT, ("layers.*",), 0),  # the tied embedding is in front of all layers
        (UNTIED, FRONT, 2),
        (UNTIED, ("embed*", "layers.0.*", "layers.1.ffn*"), 1),
        (UNTIED, ("embed*", "layers.*"), 4),
        (BERT, ("layers.0.*",), 0),
        (T5, ("embed*", "encoder*", "layers.0.*", "layers.1.*"), 2),
        (T5, ("embed*", "layers.*", "encoder*", "final_norm*"), 2),  # the decoder's relative positions are left
    ],
)
def test_gradients_flow_back_to_the_first_layer_that_is_trained_or_behind_what_is(model, patterns, first):
    assert first_trained_layer(model, patterns) == first
    assert [receives_gradients(model, layer, patterns) for layer in range(5)] == [first < layer for layer in range(5)]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_frozen_parameters_have_their_working_copy_alone(zero_stage):
    plain, frozen = (plans(freeze, zero_stage=zero_stage).stages[0] for freeze in ((), FRONT))
    share = 1 - (frozen.updated / plain.updated)
    assert 0.5 < share < 0.9
    for part in ("master", "moments", "gradients", "bucket"):
        before, after = getattr(plain.memory, part), getattr(frozen.memory, part)
        assert after == pytest.approx(before * (1 - share), abs=16), part
    assert frozen.memory.weights == plain.memory.weights
    assert frozen.memory.gathered == plain.memory.gathered
    assert frozen.memory.activations == pytest.approx(plain.memory.activations / 2)
    assert frozen.traffic.gradients == pytest.approx(plain.traffic.gradients * (1 - share), abs=16)
    # ZeRO-1 and 2 gather what was updated, ZeRO-3 for forward and backward, of which the front has none
    left = 1 - share / 2 if zero_stage == 3 else 1 - share
    assert frozen.traffic.weights == pytest.approx(left * plain.traffic.weights, rel=1e-2)
    assert plain.stored_bytes - frozen.stored_bytes == pytest.approx(8 * share * plain.stored, abs=16)


def test_a_stage_in_front_of_which_nothing_is_trained_receives_no_gradients():
    plain, frozen = (plans(freeze, world_size=2, pipe=2).stages for freeze in ((), FRONT))
    assert frozen[1].traffic.pipe == 0 < plain[1].traffic.pipe
    assert frozen[0].traffic.pipe == plain[0].traffic.pipe, "activations go down as before"
    memory = frozen[0].memory
    assert (memory.moments, memory.gradients, memory.master, memory.activations) == (0, 0, 0, 0)


def test_a_frozen_tie_is_not_summed_over_its_stages():
    plain, frozen = (plans(freeze, 2, GPT, pipe=2).stages for freeze in ((), ("embed_tokens.weight",)))
    assert plain[0].traffic.tie > 0 == frozen[0].traffic.tie


def test_a_pattern_that_matches_nothing_is_found_without_building_the_model():
    made = run(freeze=("layers.0.*",))
    assert check_patterns(made) == []
    [stage] = made.stages
    wrong = stage.model_copy(update={"freeze": ("layer.0.*",), "learning_rate_factors": {"*.biass": 2.0}})
    problems = [str(problem) for problem in check_patterns(made.model_copy(update={"stages": (stage, wrong)}))]
    assert [problem.splitlines()[0] for problem in problems] == [
        "stages.1.learning_rate_factors: the pattern '*.biass' matches no parameter",
        "stages.1.freeze: the pattern 'layer.0.*' matches no parameter",
    ]
    with pytest.raises(ConfigError, match=r"stages.1.freeze: the pattern 'layer.0.\*' matches no parameter"):
        make_plan(made.model_copy(update={"stages": (stage, wrong)}), 1)


def test_a_run_stage_that_trains_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"stages.0.freeze = \['\*'\]: every parameter is frozen"):
        make_plan(run(freeze=("*",)), 1)


ADAPTED = GPT.model_copy(update={"adapter": LoRAConfig(method="lora", rank=3)})


def test_an_adapter_wants_the_rest_of_the_model_frozen():
    (problem,) = check_patterns(run(ADAPTED))
    assert "stages.0.freeze = [] with model.adapter" in problem.wrong
    assert json.loads(problem.allowed.removeprefix("freeze: ")) == [*base_patterns(ADAPTED)]
    assert check_patterns(run(ADAPTED, base_patterns(ADAPTED))) == []
    with_head = ADAPTED.model_copy(update={"task_head": TaskHead(task="classification", num_labels=2)})
    trained = {e.name for e in model_entries(with_head) if not matches(e.name, base_patterns(with_head))}
    assert {name for name in trained if ".adapters." not in name} == {"classifier.weight"}
    # A (3, 64) and B (192, 3) in each of 4 layers, and the head (2, 64)
    assert num_trained(with_head, base_patterns(with_head)) == 4 * 3 * (64 + 192) + 2 * 64


RANKED = GPT.model_copy(update={"adapter": AdaLoRAConfig(method="adalora")})


@pytest.mark.parametrize(
    ("patterns", "wrong"),
    [
        (("layers.0.*",), None),
        (("layers.0.attention.adapters.output.*",), None),
        (("layers.1.*.lora_E",), "layers.1.attention.adapters.qkv would train only some of its A, B and E"),
        (("*lora_A*",), "layers.0.attention.adapters.qkv would train only some of its A, B and E"),
        (("*.adapters.*",), "every adapter is frozen"),
    ],
)
def test_ranks_are_chosen_among_adapters_whose_three_parts_are_trained(patterns, wrong):
    model = RANKED.model_copy(update={"task_head": TaskHead(task="classification", num_labels=2)})
    found = check_patterns(run(model, (*base_patterns(model), *patterns)))
    assert len(found) == (wrong is not None), found
    if wrong is not None:
        assert wrong in found[0].wrong


def test_a_backward_pass_of_an_adapter_computes_no_gradient_of_frozen_matrices():
    lengths = RowLengths(10, predicted=10)
    squares = 12 * 64**2  # elements of a layer's matrices
    chunks = (whole_model(ADAPTED),)
    assert spared_operations(ADAPTED, chunks, lengths, base_patterns(ADAPTED)) == 4 * 2 * 10 * squares
    # two layers in front of which nothing is trained have no backward pass: twice their forward pass
    forward = figures(UNTIED).layer_operations(UNTIED, 0, lengths)
    assert spared_operations(UNTIED, (whole_model(UNTIED),), lengths, FRONT) == 2 * 2 * forward


def test_a_target_that_no_layer_has_is_refused():
    model = GPT.model_copy(update={"adapter": LoRAConfig(method="lora", targets=("query",))})
    problems: list[PalimpsestError] = []
    check_model(model, problems)
    (problem,) = problems
    assert "'query' matches no matrix" in problem.wrong
    assert problem.allowed == "attention.qkv, attention.output, ffn.up, ffn.down"
