"""Rules of a model by itself."""

import pytest

from engine.config.rules.model import ONLY, check_model
from engine.config.schema.model import ModelConfig

GPT = {"vocab_size": 10, "num_layers": 1, "hidden_size": 8, "num_heads": 2}


def problems(**changes):
    found = []
    check_model(ModelConfig.model_validate(GPT | changes), found)
    return [str(problem) for problem in found]


@pytest.mark.parametrize(
    ("key", "value"), [("token_types", 2), ("pair_head", True), ("norm_position", "post")], ids=lambda value: str(value)
)
def test_keys_of_other_families_are_refused(key, value):
    [message] = problems(**{key: value})
    assert (
        f"model.{key} = {value} with model.family = gpt, which does not use it\n  allowed: model.family bert" in message
    )
    assert not problems(family="bert", **{key: value})


def test_every_such_key_is_one_of_the_model():
    assert ONLY.keys() <= ModelConfig.model_fields.keys()


def test_rms_norms_have_no_shift_to_leave_out():
    [message] = problems(norm="rmsnorm", norm_bias=False)
    assert "model.norm_bias = False with model.norm = rmsnorm" in message
    assert not problems(norm_bias=False)


BERT = {"family": "bert"}
T5 = {"family": "t5", "vocab_size": 10, "num_layers": 4, "hidden_size": 8, "num_heads": 2, "position": "relative"}


@pytest.mark.parametrize("model", [T5, GPT, T5 | {"hidden_size": 9, "head_width": 5}])
def test_whole_models_break_no_rule(model):
    assert problems(**model) == []


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (GPT, {"num_decoder_layers": 1}, "model.num_decoder_layers = 1 with model.family = gpt, which does not use it"),
        (GPT, {"relative_buckets": 8}, "allowed: model.family t5"),
        (
            GPT,
            {"position": "relative"},
            "model.position = relative with model.family = gpt\n  allowed: learned or rope",
        ),
        (GPT, {"local_attention": 8}, "model.local_attention = 8 with model.family = gpt, which does not use it"),
        (BERT, {"global_every": 4}, "model.global_every = 4 without model.local_attention\n  allowed: local_attention"),
        (
            BERT,
            {"local_attention": 8, "local_rope_theta": 100.0},
            "model.local_rope_theta = 100.0 with model.position = learned\n  allowed: position rope",
        ),
        (T5, {"position": "rope"}, "model.position = rope with model.family = t5\n  allowed: relative"),
        (T5, {"num_decoder_layers": 4}, "model.num_decoder_layers = 4 of model.num_layers = 4"),
        (T5, {"num_layers": 1}, "model.num_decoder_layers = 0 of model.num_layers = 1"),
        (T5, {"relative_distance": 16}, "model.relative_buckets = 32\n  allowed: 17 or more"),
        (T5, {"num_kv_heads": 1}, "model.num_kv_heads = 1 with model.family = t5\n  allowed: 2, or none"),
        (T5, {"init_std": 0.1}, "model.init_std = 0.1 with model.family = t5, which does not use it"),
        (T5, {"hidden_size": 9}, "one of 1, 3, 9\n  to do: or give model.head_width"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model, changes, message):
    [found] = problems(**model | changes)
    assert message in found
