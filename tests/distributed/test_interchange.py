"""DeepSpeed's own checkpoints are read, made here by DeepSpeed on a plain module; ours is read by torch's DCP.

The truth is what DeepSpeed's live engine says of its fp32 weights when it saves.
"""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.checkpoint.interchange.initial import open_source
from engine.checkpoint.interchange.sources.deepspeed import ALLOWED, open_deepspeed
from engine.checkpoint.interchange.sources.stored import StoredSource
from engine.checkpoint.manifest import WEIGHT
from engine.cli import main
from engine.errors import CheckpointError
from tests.distributed.ranks import run_ranks
from tests.engine.checkpoint.interchange.formats import MOMENTS, check_equal, states_of
from tests.engine.checkpoint.interchange.megatron import LEGACY, layer_of
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state
from tests.engine.models.tiny import random_weights, tiny
from tests.engine.serve.runs import run_config

CASES = [(1, "fp32"), (2, "bf16"), (3, "bf16"), (3, "fp32"), (1, "bf16")]


def train_with_deepspeed(
    environment: Any, config: Any, zero_stage: int, dtype: str, folder: Path
) -> dict[str, dict[str, np.ndarray]]:
    """Two steps of plain DeepSpeed, data parallel, then `save_checkpoint`; its fp32 weights and moments by name."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from engine.models.families import family

    torch.manual_seed(1)
    kind = family(config)
    module = kind.build(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    decayed = [parameter for name, parameter in module.named_parameters() if "norm" not in name]
    rest = [parameter for name, parameter in module.named_parameters() if "norm" in name]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(list(module.parameters()) if zero_stage == 1 else groups, lr=0.01)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": zero_stage},
            "bf16": {"enabled": dtype == "bf16"},
            "zero_allow_untested_optimizer": True,
        },
    )
    for _ in range(2):
        tokens_BT = torch.randint(0, config.vocab_size, (1, 8))
        weights_BT = torch.ones(1, 8)
        engine.backward(engine(tokens_BT=tokens_BT, targets_BT=tokens_BT, weights_BT=weights_BT)["losses_L"].sum())
        engine.step()
    engine.save_checkpoint(str(folder))
    held: dict[str, Any] = {WEIGHT: {name: safe_get_full_fp32_param(p) for name, p in module.named_parameters()}}
    # Of several parameter groups of ZeRO-1 and 2 DeepSpeed's own functions know the moments of the first one alone.
    for moment in MOMENTS if zero_stage != 2 else ():
        held[moment] = {name: safe_get_full_optimizer_state(p, moment) for name, p in module.named_parameters()}
    return {
        state: {name: tensor.detach().numpy().copy() for name, tensor in values.items()}
        for state, values in held.items()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder and fp32 weights of a case, made once."""
    made: dict[tuple[int, str], Any] = {}

    def make(zero_stage: int, dtype: str) -> Any:
        if (zero_stage, dtype) not in made:
            folder = tmp_path_factory.mktemp("theirs")
            config = run_config(folder, "gpt2", folder).model
            config = config.model_copy(update={"vocab_multiple": 1})  # a plain module has no padded rows
            ranks = run_ranks(2, train_with_deepspeed, config, zero_stage, dtype, folder)
            made[zero_stage, dtype] = (folder, ranks[0])
        return made[zero_stage, dtype]

    return make


MORE = [pytest.param(*case, marks=pytest.mark.matrix) for case in CASES[3:]]


@pytest.mark.parametrize(("zero_stage", "dtype"), [*CASES[:3], *MORE])
def test_deepspeeds_own_checkpoints_are_read(saved, zero_stage, dtype):
    folder, truth = saved(zero_stage, dtype)
    for path in (folder, folder / (folder / "latest").read_text().strip()):
        found = open_deepspeed(path)
        assert found.step == 2
        assert found.states.keys() == {WEIGHT, *MOMENTS}
        for state, values in truth.items():
            assert found.states[state].keys() >= values.keys()
            source = StoredSource({name: parts[0] for name, parts in found.states[state].items()}, "")
            for name, expected in values.items():
                assert np.array_equal(source.read(name, 0, len(expected)).numpy(), expected), (state, name)
                before = source.bytes_read
                assert np.array_equal(source.read(name, 1, 3).numpy(), expected[1:3])
                assert source.bytes_read - before == expected[1:3].nbytes, "those rows and no others"


def test_convert_makes_a_run_of_it_that_others_read(saved, tmp_path, capsys):
    folder, truth = saved(3, "bf16")
    tree = run_config(tmp_path / "run", "gpt2", tmp_path).model_dump(mode="json")
    tree["model"]["vocab_multiple"] = 8
    (tmp_path / "run.yaml").write_text(json.dumps(tree))  # JSON is YAML
    output = tmp_path / "converted"
    command = [
        "convert",
        str(folder),
        "--to",
        "palimpsest",
        "--run",
        str(tmp_path / "run.yaml"),
        "--output",
        str(output),
    ]
    assert main(command) == 0, capsys.readouterr().err
    expected = {state: {n: torch.from_numpy(v) for n, v in values.items()} for state, values in truth.items()}
    check_equal(states_of(output / "checkpoints" / "step-00000000"), {WEIGHT: expected[WEIGHT]})
    assert main(["checkpoint", "verify", str(output)]) == 0
    more = [*command[:-1], str(tmp_path / "all"), "--with-optimizer"]
    assert main(more) == 0, capsys.readouterr().err
    check_equal(states_of(tmp_path / "all" / "checkpoints" / "step-00000002"), expected)
    assert main(command) == 2
    assert "holds something already" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: torch.save({"optimizer_state_dict": Evil()}, path), "not on the list of what may be built"),
        (lambda path: path.write_bytes(pickle.dumps(Evil())), "it is no plain pickle|cannot be used"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "it cannot be read"),
        (lambda path: path.unlink(), "optimizer states of ranks"),
        (lambda path: torch.save({"optimizer_state_dict": {}}, path), "KeyError"),
        (lambda path: torch.save([1], path), "it holds no dictionary"),
    ],
)
def test_what_must_not_run_does_not_and_damage_is_told(saved, tmp_path, capsys, spoil, what):
    folder = tmp_path / "copy"
    shutil.copytree(saved(2, "bf16")[0], folder)
    spoil(sorted(folder.glob("*/*_optim_states.pt"))[0])
    with pytest.raises(CheckpointError, match=what) as caught:
        open_deepspeed(folder)
    assert caught.value.remedy
    assert "must not run" not in capsys.readouterr().out


def test_the_list_of_what_may_be_built_is_needed_and_names_no_function():
    for name in ALLOWED:
        module, _, attribute = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), attribute), type)


def test_a_latest_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match=r"names '\.\./elsewhere'"):
        open_deepspeed(tmp_path)
    with pytest.raises(CheckpointError, match="no file of model states"):
        open_deepspeed(tmp_path / "absent")


def test_torch_dcp_loads_ours_into_equal_tensors(tmp_path, capsys):
    from torch.distributed.checkpoint import state_dict_loader

    world = World(layout_of(2, 2, 2), 1, small_model())
    whole = random_state(world.specs, 3)
    world.fill(whole)
    path = world.save(tmp_path / "run" / "checkpoints", some_state(5))
    output = tmp_path / "dcp"
    command = ["convert", str(path), "--to", "dcp", "--with-optimizer", "--output", str(output)]
    assert main(command) == 0, capsys.readouterr().err
    assert f"{len(whole)} tensors of {path}" in capsys.readouterr().out
    loaded = {key: torch.full(value.shape, torch.nan) for key, value in whole.items()}
    state_dict_loader.load(loaded, checkpoint_id=output, no_dist=True)
    assert all(np.array_equal(loaded[key].numpy(), value) for key, value in whole.items())


class Names(torch.nn.Module):
    """A module that holds parameters under dotted names and computes nothing."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            inner: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in dict(inner.named_children()):
                    inner.add_module(part, torch.nn.Module())
                inner = inner.get_submodule(part)
            inner.register_parameter(last, torch.nn.Parameter(value.clone()))


def save_pipeline(environment: Any, model: Any, weights: Any, folder: Path) -> None:
    """DeepSpeed's own pipeline over both ranks under ZeRO-1, with the modules and names of Megatron-DeepSpeed's GPT."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    embedding = {"word_embeddings.weight": weights["embed_tokens.weight"]}
    embedding["position_embeddings.weight"] = weights["embed_positions.weight"]
    specs: list[Any] = [TiedLayerSpec("embed", Names, embedding, tied_weight_attr=["word_embeddings.weight"])]
    for layer in range(model.num_layers):
        held = layer_of(model, weights, layer)
        specs.append(LayerSpec(Names, {f"{LEGACY[key.split('.')[0]]}.{key.split('.')[1]}": held[key] for key in held}))
    specs.append(LayerSpec(Names, {kind: weights[f"final_norm.{kind}"] for kind in ("weight", "bias")}))
    specs.append(TiedLayerSpec("embed", Names, embedding, tied_weight_attr=["word_embeddings.weight"]))
    pipeline = PipelineModule(specs, num_stages=2, loss_fn=lambda *_: 0, partition_method="uniform")
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=0.01)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "steps_per_print": 10**9}
    settings |= {"zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=pipeline, optimizer=optimizer, config=settings)
    engine.save_checkpoint(str(folder))


def test_a_pipeline_of_megatron_deepspeeds_gpt_is_read(tmp_path):
    model = tiny("gpt2", num_layers=3)
    weights = random_weights(model, seed=6)
    run_ranks(2, save_pipeline, model, weights, tmp_path)
    assert len(list(tmp_path.glob("*/mp_rank_*_model_states.pt"))) == 2
    opened = open_source(str(tmp_path), model=model).check()
    for name, value in weights.items():
        assert torch.equal(opened.read(name), value), name
