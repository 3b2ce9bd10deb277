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

from engine.checkpoint.interchange.deepspeed import ALLOWED, read_weights
from engine.checkpoint.load import read_weights as read_ours
from engine.cli import main
from engine.errors import CheckpointError
from tests.distributed.ranks import run_ranks
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state
from tests.engine.serve.runs import run_config

CASES = [(1, "fp32"), (2, "bf16"), (3, "bf16"), (3, "fp32"), (1, "bf16")]


def train_with_deepspeed(
    environment: Any, config: Any, zero_stage: int, dtype: str, folder: Path
) -> dict[str, np.ndarray]:
    """Two steps of plain DeepSpeed, data parallel, then `save_checkpoint`; its fp32 weights by name."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    from engine.models.families import family

    torch.manual_seed(1)
    kind = family(config)
    module = kind.build(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    decayed = [parameter for name, parameter in module.named_parameters() if "norm" not in name]
    rest = [parameter for name, parameter in module.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.01)
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
    held: dict[str, Any] = {name: safe_get_full_fp32_param(p) for name, p in module.named_parameters()}
    return {name: tensor.detach().numpy().copy() for name, tensor in held.items()}


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
        weights = read_weights(path)
        assert weights.keys() >= truth.keys()
        for name, expected in truth.items():
            assert np.array_equal(weights[name].numpy(), expected), name


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
    weights = read_ours(output / "checkpoints" / "step-00000000")
    assert weights.keys() == truth.keys()
    assert all(np.array_equal(weights[name].numpy(), truth[name]) for name in truth)
    assert main(["checkpoint", "verify", str(output)]) == 0
    assert main(command) == 2
    assert "holds something already" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: torch.save({"optimizer_state_dict": Evil()}, path), "not on the list of what may be built"),
        (lambda path: path.write_bytes(pickle.dumps(Evil())), "cannot be read as DeepSpeed's checkpoint"),
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
        read_weights(folder)
    assert caught.value.remedy
    assert "must not run" not in capsys.readouterr().out


def test_the_list_of_what_may_be_built_is_needed_and_names_no_function():
    for name in ALLOWED:
        module, _, attribute = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), attribute), type)


def test_a_latest_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match=r"names '\.\./elsewhere'"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match="no file of model states"):
        read_weights(tmp_path / "absent")


def test_torch_dcp_loads_ours_into_equal_tensors(tmp_path, capsys):
    from torch.distributed.checkpoint import state_dict_loader

    world = World(layout_of(2, 2, 2), 1, small_model())
    whole = random_state(world.specs, 3)
    world.fill(whole)
    path = world.save(tmp_path / "run" / "checkpoints", some_state(5))
    output = tmp_path / "dcp"
    assert main(["convert", str(path), "--to", "dcp", "--output", str(output)]) == 0, capsys.readouterr().err
    assert f"{len(whole)} tensors of step-00000005" in capsys.readouterr().out
    loaded = {key: torch.full(value.shape, torch.nan) for key, value in whole.items()}
    state_dict_loader.load(loaded, checkpoint_id=output, no_dist=True)
    assert all(np.array_equal(loaded[key].numpy(), value) for key, value in whole.items())
