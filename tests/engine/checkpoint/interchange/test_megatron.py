"""Megatron-LM's GPT and BERT: its folder layout for any tensor and pipeline ranks, and `torch_dist` of stacked layers.

The files are made here from weights of ours as Megatron's layers hold them, by reshapes of whole tensors and not by the
mapping under test. What is read is held to these weights.
"""

from __future__ import annotations

import json

import pytest
import torch

from engine.checkpoint.interchange.initial import open_source
from engine.checkpoint.manifest import WEIGHT
from engine.cli import main
from engine.errors import CheckpointError, ConfigError
from tests.engine.checkpoint.interchange.formats import check_equal, states_of
from tests.engine.checkpoint.interchange.megatron import (
    BERT_CORE,
    BERT_OLD,
    CORE,
    FIRST,
    LAST,
    LEGACY,
    MODELS,
    Tensors,
    arguments,
    check_read,
    layer_of,
    outside,
    save_legacy,
)
from tests.engine.models.tiny import random_weights, tiny
from tests.engine.serve.runs import run_config

BERT, GPT = MODELS["bert"], MODELS["gpt2"]
TANH = BERT.model_copy(update={"activation": "gelu_tanh"})
SIZES = {"hidden_size": BERT.hidden_size, "feed_forward_size": BERT.feed_forward_size, "norm_epsilon": 1e-5}


@pytest.mark.parametrize(
    ("form", "tensor", "pipe", "names"),
    [
        ("gpt2", 1, 1, LEGACY),
        ("gpt2", 2, 1, LEGACY),
        ("llama", 2, 2, LEGACY),
        ("llama-tied", 1, 1, LEGACY),
        ("bert", 1, 1, BERT_OLD),
        ("bert", 2, 2, LEGACY),
        ("bert", 2, 2, BERT_CORE),
        ("bert-without-pairs", 2, 1, LEGACY),
        ("bert-untied", 1, 4, BERT_CORE),
    ],
)
def test_megatrons_own_format_is_read_whatever_the_ranks(tmp_path, form, tensor, pipe, names):
    model = MODELS[form]
    weights = random_weights(model, seed=4)
    save_legacy(tmp_path, model, weights, tensor, pipe, names=names)
    check_read(tmp_path, model, weights)
    check_read(tmp_path / "iter_0000007", model, weights)


@pytest.mark.parametrize(
    ("form", "spelling"),
    [("gpt2", "core"), ("llama", "transformer engine"), ("bert", "core"), ("bert", "transformer engine")],
)
def test_torch_dist_with_stacked_layers_is_read(tmp_path, form, spelling):
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class KeepingPlans(DefaultSavePlanner):
        """Leaves the ranks' plans in the metadata, as Megatron Core's saver does."""

        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            metadata.all_local_plans = all_plans  # pyright: ignore[reportAttributeAccessIssue]
            return plans, metadata

    model = MODELS[form]
    weights = random_weights(model, seed=4)
    names = BERT_CORE if form == "bert" else CORE
    if spelling != "core":
        names = names | {"norm1": "self_attention.linear_qkv.layer_norm", "norm2": "mlp.linear_fc1.layer_norm"}
    layers = [layer_of(model, weights, layer) for layer in range(model.num_layers)]
    state: Tensors = dict(outside(weights, names, (*FIRST, *LAST)))
    for key in layers[0]:
        name, kind = key.split(".")
        joint = "_" if names[name].endswith("layer_norm") else "."
        state[f"{names['layers']}.{names[name]}{joint}{kind}"] = torch.stack([layer[key] for layer in layers])
    folder = tmp_path / "iter_0000007"
    save(dict(state), storage_writer=FileSystemWriter(folder), planner=KeepingPlans(), no_dist=True)
    torch.save({"args": arguments(model), "iteration": 7}, folder / "common.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    check_read(tmp_path, model, weights)


def test_convert_takes_the_model_from_a_run_file(tmp_path, capsys):
    config = run_config(tmp_path / "run", "gpt2", tmp_path)
    weights = random_weights(config.model, seed=4)
    save_legacy(tmp_path / "theirs", config.model, weights, 2, 1)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    command = [
        "convert",
        str(tmp_path / "theirs"),
        "--run",
        str(tmp_path / "run.yaml"),
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(command) == 0, capsys.readouterr().err
    check_equal(states_of(tmp_path / "o" / "checkpoints" / "step-00000000"), {WEIGHT: weights})


def test_what_does_not_fit_is_told_by_name(tmp_path):
    model = MODELS["gpt2"]
    weights = random_weights(model)
    save_legacy(tmp_path / "old", model, weights, 1, 1, {"checkpoint_version": 1.0})
    with pytest.raises(CheckpointError, match="checkpoint_version is below 2"):
        open_source(str(tmp_path / "old"), model=model)
    other = arguments(model, rotary_percent=0.25, ffn_hidden_size=9)
    save_legacy(tmp_path / "other", model, weights, 1, 1, {"args": other})
    with pytest.raises(ConfigError, match=r"ffn_hidden_size = 9 \(model.*; rotary_percent = 0\.25"):
        open_source(str(tmp_path / "other"), model=model)
    save_legacy(tmp_path / "torn", model, weights, 2, 1)
    (tmp_path / "torn" / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match="the file of pipeline rank 0 and tensor rank 0 is missing"):
        open_source(str(tmp_path / "torn"), model=model)
    with pytest.raises(ConfigError, match="which does not say which model it is of"):
        open_source(str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("saved", "model", "given", "message"),
    [
        (BERT, GPT, {}, r"it holds a BERT \(model.family = gpt\)"),
        (GPT, BERT, {}, r"it holds a GPT \(model.family = bert\)"),
        (GPT, tiny("t5"), {}, r"it holds a GPT \(model.family = t5\)"),
        (
            BERT,
            tiny("bert", **SIZES),
            {},
            r"has norm_position = pre \(model.norm_position = post\); a BERT of Megatron's has embedding_norm = False",
        ),
        (BERT, BERT, {"apply_layernorm_1p": True}, "apply_layernorm_1p = True"),
        (BERT, BERT, {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm ="),
        (BERT, TANH, {"openai_gelu": True}, "openai_gelu = True"),
        (BERT, BERT, {"squared_relu": True}, "squared_relu = True"),
        (GPT, GPT, {"quick_geglu": True}, "quick_geglu = True"),
        (BERT, BERT, {"bias_gelu_fusion": True}, r"fusion = True, which is gelu_tanh here \(model.activation = gelu\)"),
        (BERT, TANH, {"bias_gelu_fusion": False}, "bias_gelu_fusion = False, which is gelu here"),
        (GPT, GPT, {"bias_gelu_fusion": False}, "bias_gelu_fusion = False, which is gelu here"),
        (GPT, GPT, {"swiglu": True, "bias_gelu_fusion": True}, "swiglu = True, which is swiglu here"),
    ],
)
def test_files_of_another_model_are_refused_by_argument_and_key(tmp_path, saved, model, given, message):
    arguments_of = {"args": arguments(saved, **given)}
    save_legacy(tmp_path, saved, random_weights(saved), 1, 1, arguments_of)
    with pytest.raises(ConfigError, match=message):
        open_source(str(tmp_path), model=model)


@pytest.mark.parametrize("model", [BERT, GPT])
def test_a_t5_is_refused_by_its_cross_attention(tmp_path, model):
    weight = torch.zeros(8, 8)
    layers = {
        "encoder": {"layers.0.self_attention.query_key_value.weight": weight},
        "decoder": {"layers.0.inter_attention.query.weight": weight},
    }
    save_legacy(tmp_path, model, random_weights(model), 1, 1, {"model": {"language_model": layers}})
    with pytest.raises(ConfigError, match=rf"it holds a T5 \(model.family = {model.family}\)"):
        open_source(str(tmp_path), model=model).check()


@pytest.mark.parametrize(("model", "fused"), [(TANH, True), (BERT, False), (GPT, True)])
def test_the_activation_that_the_arguments_ask_for_is_read(tmp_path, model, fused):
    weights = random_weights(model)
    given = {"args": arguments(model, bias_gelu_fusion=fused, swiglu=False, openai_gelu=False, onnx_safe=None)}
    save_legacy(tmp_path, model, weights, 1, 1, given)
    check_read(tmp_path, model, weights)


def test_a_head_that_one_side_lacks_is_told_by_name(tmp_path):
    without = BERT.model_copy(update={"pair_head": False})
    save_legacy(tmp_path / "with", BERT, random_weights(BERT), 1, 1)
    with pytest.raises(ConfigError, match=r"the model has no place for .*binary_head\.weight"):
        open_source(str(tmp_path / "with"), model=without).check()
    save_legacy(tmp_path / "without", without, random_weights(without), 1, 1)
    with pytest.raises(ConfigError, match=r"no file holds .*binary_head\.weight"):
        open_source(str(tmp_path / "without"), model=BERT).check()
