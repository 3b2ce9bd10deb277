import pytest

from engine.config.schema.model import GPTConfig
from engine.config.schema.optimizer import OptimizerConfig
from engine.models import gpt
from engine.optim.groups import parameter_groups, weight_decay
from tests.engine.config.run_config import config

MODEL = GPTConfig(vocab_size=50, num_layers=2, hidden_size=8, num_heads=2)
CONFIG = OptimizerConfig(weight_decay=0.1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.attention.qkv_proj.weight", 0.1),
        ("embed_tokens.weight", 0.1),
        ("layers.0.attention.qkv_proj.bias", 0.0),
        ("layers.1.ffn_norm.weight", 0.0),
        ("final_norm.weight", 0.0),
    ],
)
def test_decay_by_name(name, expected):
    assert weight_decay(name, CONFIG) == expected


def test_groups_hold_every_parameter_once_and_mix_nothing():
    specs = gpt.specs(MODEL)
    groups = parameter_groups(specs, CONFIG, {"embed_tokens.weight": (0, 3)})
    names = [spec.name for group in groups for spec in group.specs]
    assert sorted(names) == sorted(spec.name for spec in specs)
    for group in groups:
        assert group.specs
        assert {spec.sharding.dim is None for spec in group.specs} == {group.replicated}
        assert {weight_decay(spec.name, CONFIG) for spec in group.specs} == {group.weight_decay}
    assert [spec.name for group in groups if group.tied for spec in group.specs] == ["embed_tokens.weight"]


def test_groups_do_not_depend_on_which_other_parameters_a_stage_holds():
    """The tied weight's group is alike on both stages, so its optimizer state is cut alike."""
    specs = {spec.name: spec for spec in gpt.specs(MODEL)}
    tied = {"embed_tokens.weight": (0, 3)}
    first = parameter_groups([specs["embed_tokens.weight"], specs["embed_positions.weight"]], CONFIG, tied)
    last = parameter_groups([specs["final_norm.weight"], specs["embed_tokens.weight"]], CONFIG, tied)
    assert [group for group in first if group.tied] == [group for group in last if group.tied]


def stages(*factors):
    [stage] = config().stages
    return [stage.model_copy(update={"learning_rate_factors": held}) for held in factors]


def test_learning_rate_factors_split_groups_alike_in_all_run_stages():
    """Groups do not change from one run stage to the next, only their factors do."""
    run_stages = stages({}, {"layers.0.*": 0.5, "*.bias": 0.1})
    groups = parameter_groups(gpt.specs(MODEL), CONFIG, run_stages=run_stages)
    factors = {spec.name: group.rate_factors for group in groups for spec in group.specs}
    assert factors["final_norm.weight"] == (1, 1)
    assert factors["layers.0.attention.qkv_proj.weight"] == (1, 0.5)
    assert factors["layers.1.attention.qkv_proj.bias"] == (1, 0.1)
    assert factors["layers.0.attention.qkv_proj.bias"] == (1, pytest.approx(0.05)), "the product of both patterns"
    assert len(factors) == len(list(gpt.specs(MODEL)))


def test_without_factors_groups_are_as_they_were():
    assert [group.specs for group in parameter_groups(gpt.specs(MODEL), CONFIG)] == [
        group.specs for group in parameter_groups(gpt.specs(MODEL), CONFIG, run_stages=stages({}, {}))
    ]


def test_frozen_parameters_and_those_trained_again_are_groups_of_their_own():
    """A tie is frozen as one: it has one logical name. Moments that begin later have seen fewer updates."""
    [stage] = config().stages
    freezes = ((), ("embed_tokens.weight", "layers.0.*"), ("embed_tokens.weight",))
    run_stages = [stage.model_copy(update={"freeze": freeze}) for freeze in freezes]
    tied = {"embed_tokens.weight": (0, 1)}
    specs = list(gpt.specs(MODEL))

    def since(number: int) -> dict[str, int | None]:
        groups = parameter_groups(specs, CONFIG, tied, run_stages=run_stages, number=number)
        return {spec.name: group.trained_since for group in groups for spec in group.specs}

    assert set(since(0).values()) == {0}
    assert since(1)["embed_tokens.weight"] is None
    assert {since(1)[spec.name] for spec in specs if spec.name.startswith("layers.0.")} == {None}
    assert since(2)["embed_tokens.weight"] is None
    assert {since(2)[spec.name] for spec in specs if spec.name.startswith("layers.0.")} == {2}
    assert since(2)["final_norm.weight"] == 0
    frozen = [group for group in parameter_groups(specs, CONFIG, tied, (), run_stages, 1) if group.moments == ()]
    assert {spec.name for group in frozen for spec in group.specs} == {
        n for n, first in since(1).items() if first is None
    }
