import pytest

from engine.config.schema.model import ModelConfig
from engine.config.schema.optimizer import OptimizerConfig
from engine.models import gpt
from engine.optim.groups import parameter_groups, weight_decay

MODEL = ModelConfig(vocab_size=50, num_layers=2, hidden_size=8, num_heads=2)
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
