"""Rules of a model by itself."""

import pytest

from engine.config.rules.model import check_model
from engine.config.schema.model import make_model

GPT = {"vocab_size": 10, "num_layers": 1, "hidden_size": 8, "num_heads": 2}


def problems(**changes):
    found = []
    check_model(make_model(**(GPT | changes)), found)
    return [str(problem) for problem in found]


def test_rms_norms_have_no_shift_to_leave_out():
    [message] = problems(norm="rmsnorm", norm_bias=False)
    assert "model.norm_bias = False with model.norm = rmsnorm" in message
    assert not problems(norm_bias=False)


BERT = {"family": "bert"}
T5 = {"family": "t5", "vocab_size": 10, "num_layers": 4, "hidden_size": 8, "num_heads": 2}


@pytest.mark.parametrize("model", [T5, GPT, T5 | {"hidden_size": 9, "head_size": 5}])
def test_whole_models_break_no_rule(model):
    assert problems(**model) == []


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (BERT, {"global_every": 4}, "model.global_every = 4 without model.local_attention\n  allowed: local_attention"),
        (
            BERT,
            {"local_attention": 8, "local_rope_theta": 100.0},
            "model.local_rope_theta = 100.0 with model.position = learned\n  allowed: position rope",
        ),
        (T5, {"num_decoder_layers": 4}, "model.num_decoder_layers = 4 of model.num_layers = 4"),
        (T5, {"num_layers": 1}, "model.num_decoder_layers = 1 of model.num_layers = 1"),
        (T5, {"relative_distance": 16}, "model.relative_buckets = 32\n  allowed: 17 or more"),
        (T5, {"num_kv_heads": 1}, "model.num_kv_heads = 1 with model.family = t5\n  allowed: 2 (model.num_heads)"),
        (T5, {"hidden_size": 9}, "one of 1, 3, 9\n  to do: or give model.head_size"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model, changes, message):
    [found] = problems(**model | changes)
    assert message in found
