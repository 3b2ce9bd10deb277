"""What plan and train tell of a model that convert would refuse, and the defaults that lead to no such model."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import pytest

from engine.cli import main
from engine.config.huggingface_forms import TWINS, export_warning, nearest
from engine.config.load import parse_run, read_tree
from engine.config.resolve import check
from engine.config.resume import meaning_hash, refuse_new_meaning
from engine.config.schema.model import BERTConfig, make_model
from engine.errors import ConfigError
from tests.engine.models.tiny import BERT_FORMS, FORMS, MODELS, T5_FORMS

SIZES = {"vocab_size": 100, "num_layers": 2, "hidden_size": 8, "num_heads": 2}


def run_of(model: dict, **keys):
    stage = {"data": {"train": "t"}, "sequence_length": 8, "global_batch_size": 1, "duration": {"steps": 1}}
    if model.get("family") == "bert":
        stage["objective"] = {"name": "masked", "pairs": "next_sentence" if model.get("pair_head") else "none"}
    if model.get("family") == "t5":
        stage["objective"] = "span_corruption"
    return parse_run({"folder": "f", "tokenizer": "t", "model": SIZES | model, "stages": [stage], **keys}, "test")


@pytest.mark.parametrize(
    ("model", "form"),
    [
        ({}, "GPT-2"),
        ({"position": "rope"}, "GPT-NeoX"),
        ({"family": "bert"}, "BERT without pairs"),
        ({"family": "bert", "pair_head": True}, "BERT"),
        ({"family": "bert", "token_types": 1}, "RoBERTa"),
        ({"family": "bert", "norm_position": "pre", "embedding_norm": False}, "Megatron BERT without pairs"),
        ({"family": "bert", "norm_position": "pre", "embedding_norm": False, "pair_head": True}, "Megatron BERT"),
        ({"family": "bert", "position": "rope"}, "ModernBERT"),
        ({"family": "bert", "position": "rope", "local_attention": 4, "bias": False}, "ModernBERT"),
        ({"family": "t5"}, "T5"),
        ({"family": "t5", "tie_embeddings": False, "activation": "geglu_tanh"}, "T5"),
    ],
)
def test_the_defaults_of_a_family_have_a_twin_and_make_a_run(model, form):
    run = run_of(model)
    assert not check(run)
    twin, problems = nearest(run.model)
    assert (twin.name, problems) == (form, [])
    assert export_warning(run) is None


def test_given_keys_win_over_those_of_the_family():
    given: dict[str, Any] = {"norm_position": "pre", "activation": "gelu_tanh", "token_types": 0}
    assert make_model(**(SIZES | {"family": "bert"} | given)).model_dump().items() >= given.items()
    whole = make_model(**(SIZES | {"family": "bert"}))
    assert BERTConfig.model_validate_json(whole.model_dump_json(), strict=True) == whole


@pytest.mark.parametrize("form", FORMS | BERT_FORMS | T5_FORMS)
def test_every_form_of_the_tests_is_its_own_nearest(form):
    assert nearest((FORMS | BERT_FORMS | T5_FORMS)[form])[1] == []


@pytest.mark.parametrize(
    ("model", "form", "keys"),
    [
        # the schema's defaults of before, which trained and could not leave
        (
            {"family": "bert", "pair_head": True, "norm_position": "pre", "activation": "gelu_tanh", "token_types": 0},
            "BERT",
            ["norm_position", "activation", "token_types"],
        ),
        (
            {"family": "t5", "norm": "layernorm", "activation": "gelu_tanh", "bias": True},
            "T5",
            ["norm", "bias", "activation"],
        ),
        ({"position": "rope", "norm": "rmsnorm", "bias": False}, "Llama", ["activation"]),
        ({"position": "rope", "bias": False, "norm_bias": False}, "Llama", ["norm", "activation"]),
        ({"position": "rope", "activation": "swiglu"}, "GPT-NeoX", ["activation"]),
        (
            {"norm": "rmsnorm", "bias": False, "activation": "swiglu"},
            "GPT-2",
            ["norm", "activation", "bias", "qkv_bias"],
        ),
        ({"family": "bert", "position": "rope", "pair_head": True}, "ModernBERT", ["pair_head"]),
        ({"family": "bert", "tie_embeddings": False}, "BERT without pairs", ["tie_embeddings"]),
        ({"num_kv_heads": 1}, "GPT-2", ["num_kv_heads"]),
    ],
)
def test_a_mix_is_told_by_its_keys_and_its_right_neighbour(model, form, keys):
    warning = export_warning(run_of(model))
    assert warning is not None
    assert f"in {form} form, the nearest" in warning.allowed
    for text in (warning.wrong, warning.allowed):
        assert [word for word in text.replace(",", " ").split() if word.startswith("model.")] == [
            f"model.{key}" for key in keys
        ]
    assert export_warning(run_of(model, export="none")) is None
    assert export_warning(run_of(model | {key: right_value(form, key) for key in keys})) is None


def right_value(form: str, key: str):
    """A value that the form allows."""
    twin = next(twin for twin in TWINS if twin.name == form)
    others = {"token_types": 2, "activation": "relu", "num_kv_heads": 2}
    return twin.values.get(key, others.get(key))


def test_the_key_is_free_on_resume():
    before, after = run_of({}), run_of({}, export="none")
    assert meaning_hash(before) == meaning_hash(after)
    refuse_new_meaning(before, after, "f")


def test_a_run_that_had_other_defaults_is_refused_by_key_name():
    before = run_of({"family": "bert", "norm_position": "pre", "activation": "gelu_tanh", "token_types": 0})
    with pytest.raises(ConfigError, match=r"model.activation: 'gelu_tanh' -> 'gelu'(.|\n)*model.norm_position"):
        refuse_new_meaning(before, run_of({"family": "bert"}), "f")


@pytest.mark.parametrize("export", ["huggingface", "none"])
def test_plan_says_it(tmp_path, capsys, export):
    run = run_of(
        {"position": "rope", "norm": "rmsnorm", "bias": False},
        export=export,
        tokenizer=str(tmp_path),
        folder=str(tmp_path / "run"),
    )
    path = tmp_path / "run.yaml"
    path.write_text(run.model_dump_json(), encoding="utf-8")  # JSON is YAML
    main(["plan", str(path), "--json"])
    captured = capsys.readouterr()
    told = json.loads(captured.out).get("export_warning", "")
    if export == "none":
        assert "cannot be exported" not in captured.err + told
        return
    for text in (captured.err, told):
        assert "cannot be exported to Hugging Face" in text
        assert "model.activation = gelu_tanh" in text
        assert "to do: change these keys before you train, or set export=none" in text


def test_train_says_it_before_torch_is_imported(tmp_path, monkeypatch, capsys):
    run = run_of({"family": "bert", "tie_embeddings": False}, folder=str(tmp_path / "run"))
    path = tmp_path / "run.yaml"
    path.write_text(run.model_dump_json(), encoding="utf-8")
    said: list[str] = []
    trainer = types.ModuleType("engine.train.run")
    trainer.train = lambda *arguments: said.append(capsys.readouterr().err) or 0  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "engine.train.run", trainer)
    assert main(["train", str(path)]) == 0
    assert main(["train", str(path), "export=none"]) == 0
    assert "cannot be exported" in said[0]
    assert "model.tie_embeddings = False" in said[0]
    assert "cannot be exported" not in said[1]


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_shipped_model_is_a_mix(path):
    assert nearest(make_model(**read_tree(path)["model"]))[1] == []
