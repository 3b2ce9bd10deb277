"""DeepSpeed's ZeRO-1 and 2 under tensor parallelism, as Megatron-DeepSpeed saves it: joined, moments too, or refused.

The files are made here from weights of ours, rank by rank, by the layout that DeepSpeed's `zero_to_fp32` documents: a
tensor rank's parameters one after the other, cut flat into equal parts for its data ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.interchange.initial import open_source
from engine.checkpoint.manifest import WEIGHT
from engine.cli import main
from engine.config.schema.model import ModelConfig
from engine.errors import EXIT_DONE, CheckpointError
from tests.engine.checkpoint.interchange.formats import check_equal, states_of
from tests.engine.checkpoint.interchange.megatron import LEGACY, MODELS, Tensors, layer_of, padded, share
from tests.engine.models.tiny import random_weights
from tests.engine.serve.runs import run_config

STATES = (WEIGHT, "exp_avg", "exp_avg_sq")


def held_by(model: ModelConfig, whole: Tensors, rank: int, size: int) -> Tensors:
    """Return what a tensor rank holds of a state, by the names of Megatron-DeepSpeed's module."""
    torch.manual_seed(0)  # of the padding rows
    table = share(model, "vocab", padded(whole["embed_tokens.weight"]), rank, size)
    found = {"language_model.embedding.word_embeddings.weight": table}
    if "embed_positions.weight" in whole:
        found["language_model.embedding.position_embeddings.weight"] = whole["embed_positions.weight"]
    for layer in range(model.num_layers):
        for key, value in layer_of(model, whole, layer).items():
            name, kind = key.split(".")
            held = share(model, key, value, rank, size).contiguous()
            found[f"language_model.encoder.layers.{layer}.{LEGACY[name]}.{kind}"] = held
    for name in ("final_norm.weight", "final_norm.bias"):
        if name in whole:
            found[f"language_model.encoder.{name}"] = whole[name]
    if "lm_head.weight" in whole:
        head = share(model, "vocab", padded(whole["lm_head.weight"]), rank, size)
        found["language_model.output_layer.weight"] = head
    return found


def save(folder: Path, model: ModelConfig, states: dict[str, Tensors], tensor: int, data: int) -> None:
    """Write the files of every rank."""
    (folder / "global_step9").mkdir(parents=True)
    (folder / "latest").write_text("global_step9")
    for rank in range(tensor):
        held = {state: held_by(model, whole, rank, tensor) for state, whole in states.items()}
        shapes = {name: value.shape for name, value in held[WEIGHT].items()}
        content = {
            "module": {},
            "param_shapes": [shapes],
            "global_steps": 9,
            "shared_params": {},
            "mp_world_size": tensor,
        }
        torch.save(content, folder / "global_step9" / f"mp_rank_{rank:02d}_model_states.pt")
        flat = {state: torch.cat([value.reshape(-1) for value in tensors.values()]) for state, tensors in held.items()}
        length = -(-flat[WEIGHT].numel() // data)
        for data_rank in range(data):
            cut = {state: values[data_rank * length :][:length].clone() for state, values in flat.items()}
            inner = {"state": {0: {moment: cut[moment] for moment in STATES[1:]}}, "param_groups": [{"params": [0]}]}
            optimizer: dict[str, Any] = {"zero_stage": 1, "partition_count": [data], "base_optimizer_state": inner}
            optimizer["single_partition_of_fp32_groups"] = [cut[WEIGHT]]
            path = folder / "global_step9" / f"zero_pp_rank_{data_rank}_mp_rank_{rank:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": optimizer}, path)


@pytest.mark.parametrize(("form", "tensor", "data"), [("gpt2", 2, 3), ("llama", 2, 1), ("llama-tied", 1, 2)])
def test_tensor_ranks_are_joined_with_their_moments(tmp_path, form, tensor, data):
    model = MODELS[form]
    states = {state: random_weights(model, seed) for seed, state in enumerate(STATES)}
    save(tmp_path / "theirs", model, states, tensor, data)
    tree = run_config(tmp_path / "run", "gpt2", tmp_path / "tokenizer").model_dump(mode="json")
    tree["model"] = model.model_dump(mode="json")
    (tmp_path / "run.json").write_text(json.dumps(tree))
    command = ["convert", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours"), "--with-optimizer"]
    assert main([*command, "--run", str(tmp_path / "run.json")]) == EXIT_DONE
    check_equal(states_of(tmp_path / "ours" / "checkpoints" / "step-00000009"), states)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("*mp_rank_01*", r"model states of the model-parallel ranks \[0\], it was saved by 2"),
        ("zero_pp_rank_1_mp_rank_01*", r"optimizer states of ranks \[0\], it was saved by 2"),
        ("zero*_mp_rank_01*", r"optimizer states of ranks \[\], it was saved by 0"),
    ],
)
def test_a_rank_that_is_missing_is_told(tmp_path, lost, message):
    model = MODELS["gpt2"]
    save(tmp_path, model, {state: random_weights(model, 1) for state in STATES}, 2, 2)
    for path in list(tmp_path.glob(f"global_step9/{lost}")):
        path.unlink()
    with pytest.raises(CheckpointError, match=message):
        open_source(str(tmp_path), model=model).check()
