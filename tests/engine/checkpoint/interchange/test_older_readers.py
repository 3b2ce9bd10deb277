"""The fields that readers before transformers 5 look for, as their own classes name them; read by them in
`make test-readers`."""

from __future__ import annotations

import pytest

from engine.checkpoint.interchange.forms import older_spellings
from tests.engine.models.tiny import BERT_FORMS, FORMS, T5_FORMS, tiny

ALL = FORMS | BERT_FORMS | T5_FORMS


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("gpt2", {"n_ctx": 128}),
        ("llama", {"rope_theta": 10000.0}),
        ("llama-tied", {"rope_theta": 100.0}),
        (
            "llama3",
            {
                "rope_theta": 10000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
        ),
        ("llama-linear", {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
        ("mistral", {"rope_theta": 10000.0}),
        ("qwen2", {"rope_theta": 1000000.0}),
        ("pythia", {"rotary_emb_base": 10000.0, "rotary_pct": 0.25}),
        ("bert", {}),
        ("roberta", {}),
        ("megatron-bert", {}),
        (
            "modernbert",
            {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
        ),
        ("modernbert-wide", {"global_attn_every_n_layers": 2, "global_rope_theta": 160000.0, "local_rope_theta": 50.0}),
        ("modernbert-biased", {"global_attn_every_n_layers": 3, "global_rope_theta": 100.0, "local_rope_theta": 100.0}),
        (
            "modernbert-global",
            {"global_attn_every_n_layers": 1, "global_rope_theta": 160000.0, "local_rope_theta": 160000.0},
        ),
        ("t5", {"tie_word_embeddings": True}),
        ("t5-v1.1", {"tie_word_embeddings": False}),
    ],
)
def test_both_spellings_are_written(form, expected):
    assert older_spellings(ALL[form]) == {"torch_dtype": "float32"} | expected


def test_every_layer_is_of_the_kind_that_the_older_field_makes_it():
    """Theirs: a layer is local where its number is no multiple of global_attn_every_n_layers."""
    for model in (ALL["modernbert"], ALL["modernbert-global"], tiny("modernbert", global_every=4, num_layers=9)):
        every = older_spellings(model)["global_attn_every_n_layers"]
        assert [layer % every != 0 for layer in range(model.num_layers)] == [
            model.reach(layer) is not None for layer in range(model.num_layers)
        ]
