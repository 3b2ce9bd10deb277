"""Megatron-LM's GPT: its folder layout for any tensor and pipeline ranks, and `torch_dist` with stacked layers.

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
    CORE,
    MODELS,
    Tensors,
    arguments,
    check_read,
    layer_of,
    padded,
    save_legacy,
)
from tests.engine.models.tiny import random_weights
from tests.engine.serve.runs import run_config


@pytest.mark.parametrize(
    ("form", "tensor", "pipe"), [("gpt2", 1, 1), ("gpt2", 2, 1), ("llama", 2, 2), ("llama-tied", 1, 1)]
)
def test_megatrons_own_format_is_read_whatever_the_ranks(tmp_path, form, tensor, pipe):
    model = MODELS[form]
    weights = random_weights(model, seed=4)
    save_legacy(tmp_path, model, weights, tensor, pipe)
    check_read(tmp_path, model, weights)
    check_read(tmp_path / "iter_0000007", model, weights)


@pytest.mark.parametrize(("form", "spelling"), [("gpt2", "core"), ("llama", "transformer engine")])
def test_torch_dist_with_stacked_layers_is_read(tmp_path, form, spelling):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    model = MODELS[form]
    weights = random_weights(model, seed=4)
    names = CORE
    if spelling != "core":
        names = CORE | {"norm1": "self_attention.linear_qkv.layer_norm", "norm2": "mlp.linear_fc1.layer_norm"}
    layers = [layer_of(model, weights, layer) for layer in range(model.num_layers)]
    state: Tensors = {"embedding.word_embeddings.weight": padded(weights["embed_tokens.weight"])}
    for key in layers[0]:
        name, kind = key.split(".")
        joint = "_" if names[name].endswith("layer_norm") else "."
        state[f"decoder.layers.{names[name]}{joint}{kind}"] = torch.stack([layer[key] for layer in layers])
    for name, theirs in (
        ("embed_positions", "embedding.position_embeddings"),
        ("final_norm", "decoder.final_layernorm"),
    ):
        state |= {f"{theirs}.{k}": weights[f"{name}.{k}"] for k in ("weight", "bias") if f"{name}.{k}" in weights}
    if "lm_head.weight" in weights:
        state["output_layer.weight"] = padded(weights["lm_head.weight"])
    folder = tmp_path / "iter_0000007"
    save(dict(state), storage_writer=FileSystemWriter(folder), no_dist=True)
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
    bert = {"language_model": {"embedding": {"tokentype_embeddings": {"weight": torch.ones(2, 2)}}}}
    save_legacy(tmp_path / "bert", model, weights, 1, 1, {"model": bert})
    with pytest.raises(ConfigError, match="a BERT, which normalises before each block"):
        open_source(str(tmp_path / "bert"), model=model)
    with pytest.raises(ConfigError, match="which does not say which model it is of"):
        open_source(str(tmp_path / "bert"))
