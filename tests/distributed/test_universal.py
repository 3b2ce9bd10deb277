"""Ours as a universal checkpoint: DeepSpeed itself loads it, in another process and under each ZeRO stage.

What its live engine then says of weights, moments and step is held to what was saved; a step that it takes from there
is held to torch's AdamW in one process. Hugging Face's names are held to what transformers makes of the same values.
"""

from __future__ import annotations

import dataclasses
import resource
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from engine.checkpoint.interchange.initial import own_weights
from engine.checkpoint.interchange.sinks import universal
from engine.checkpoint.interchange.sinks.outgoing import Outgoing
from engine.checkpoint.interchange.sinks.universal import MOMENTS
from engine.checkpoint.interchange.sources.universal import LATEST
from engine.cli import main
from engine.config.schema.model import ModelConfig
from engine.errors import CheckpointError
from engine.models.families import family
from engine.parallel.sharding import ParameterSpec
from tests.distributed.ranks import run_ranks
from tests.engine.checkpoint.worlds import World, layout_of, muon, random_state, small_model, some_state
from tests.engine.models.tiny import random_weights, twin
from tests.engine.serve.runs import run_config, save

STEP = 5
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6}
CASES = [(1, "fp32", "gpt2", "ours"), (2, "bf16", "llama", "huggingface"), (3, "fp32", "gpt2", "huggingface")]
MORE = [
    (3, "bf16", "llama", "ours"),
    (2, "fp32", "gpt2", "ours"),
    (1, "bf16", "t5-v1.1", "huggingface"),
    (3, "fp32", "t5", "huggingface"),
    (1, "fp32", "bert", "huggingface"),
    (3, "bf16", "roberta", "huggingface"),
]


def write_universal(path: Path, output: Path) -> tuple[int, list[str]]:
    """A checkpoint of ours under its own names."""
    opened = own_weights(path)
    return universal.write_universal(Outgoing(opened, opened.own_map), output)


def groups_of(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Two groups, so that it shows when their settings or steps are mixed up."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def module_of(config: ModelConfig, names: str) -> torch.nn.Module:
    """What a stranger trains: our plain module, or transformers' of the same architecture; other weights."""
    if names == "huggingface":
        return twin(config, random_weights(config, seed=99)).train()
    module = family(config).build(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def loss_of(module: Any, names: str) -> torch.Tensor:
    """Of one row, the same on every rank; of the GPT forms alone."""
    tokens_BT = torch.arange(8).unsqueeze(0)
    if names == "huggingface":
        return module(input_ids=tokens_BT, labels=tokens_BT).loss
    return module(tokens_BT=tokens_BT, targets_BT=tokens_BT, weights_BT=torch.ones(1, 8))["losses_L"].sum()


def load_with_deepspeed(
    environment: Any, config: ModelConfig, names: str, zero_stage: int, dtype: str, folder: Path
) -> Any:
    """(values after the load, counters, working weights, decay of the groups, fp32 weights a step later where the loss
    is one of `loss_of` and bf16 does not blur it)"""
    import deepspeed
    from deepspeed.runtime.lr_schedules import WarmupLR
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    torch.manual_seed(environment.global_rank)
    module = module_of(config, names)
    optimizer = torch.optim.AdamW(groups_of(module), **SETTINGS)
    schedule: Any = WarmupLR(optimizer, warmup_min_lr=0.01, warmup_max_lr=0.01)
    engine: Any
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": zero_stage},
            "bf16": {"enabled": dtype == "bf16"},
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"load_universal": True},
        },
    )
    assert engine.load_checkpoint(str(folder))[0] is not None
    named = {name.removeprefix("module."): p for name, p in module.named_parameters()}
    values: dict[tuple[str, str], Any]
    values = {("fp32", name): safe_get_full_fp32_param(p) for name, p in named.items()}
    for moment in MOMENTS:
        values |= {(moment, name): safe_get_full_optimizer_state(p, moment) for name, p in named.items()}
    values = {key: value.detach().numpy().copy() for key, value in values.items()}
    working = {}
    for name, p in named.items():
        with deepspeed.zero.GatheredParameters(p) if zero_stage == 3 else nullcontext():
            working[name] = p.detach().float().numpy().copy()
    inner = engine.optimizer.optimizer
    steps = [state["step"] for state in inner.state.values()]
    shared = len(set(map(id, steps))) < len(steps)
    counters = (engine.global_steps, {float(step) for step in steps}, engine.lr_scheduler.last_batch_iteration, shared)
    decays = [group["weight_decay"] for group in inner.param_groups]
    for state in inner.state.values():
        state["step"] = state["step"].clone()  # as docs/checkpoint-format.md says, for ZeRO-3
    after = {}
    if dtype == "fp32" and config.family == "gpt":
        engine.backward(loss_of(engine, names))
        engine.step()
        for name, p in named.items():
            full = safe_get_full_fp32_param(p)
            assert full is not None
            after[name] = full.detach().numpy().copy()
    return values, counters, working, decays, after


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, run folder, expected values by the names of either side) of a form, made once."""
    made: dict[str, Any] = {}

    def make(form: str) -> Any:
        if form not in made:
            folder = tmp_path_factory.mktemp(form)
            config = run_config(folder / "run", form, folder / "tokenizer")
            model = config.model.model_copy(update={"vocab_multiple": 1})  # a plain module has no padded rows
            config = config.model_copy(update={"model": model})
            states = {moment: random_weights(model, seed) for seed, moment in enumerate(MOMENTS, start=1)}
            states["exp_avg_sq"] = {name: value**2 for name, value in states["exp_avg_sq"].items()}
            save(config, STEP, 0, moments=states)
            made[form] = (model, config.folder, states | {"fp32": random_weights(model, 0)})
        return made[form]

    return make


def padding_second(folder: Path) -> Path:
    """A tokenizer whose padding token has the number 1, as that of RoBERTa's twin: positions are counted behind it."""
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return folder


def expected(model: ModelConfig, states: dict[str, dict[str, torch.Tensor]], names: str) -> dict[Any, np.ndarray]:
    if names == "ours":
        return {(state, name): value.numpy() for state, values in states.items() for name, value in values.items()}
    theirs = {state: twin(model, values) for state, values in states.items()}
    return {(state, name): p.detach().numpy() for state in theirs for name, p in theirs[state].named_parameters()}


def step_with_torch(model: ModelConfig, truth: dict[Any, np.ndarray], names: str) -> dict[str, np.ndarray]:
    """Weights after one step of AdamW in this process from the expected state."""
    module = module_of(model, names)
    named = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(groups_of(module), **SETTINGS)
    for name, p in named.items():
        p.data.copy_(torch.from_numpy(truth["fp32", name]))
        moments = {moment: torch.from_numpy(truth[moment, name]).clone() for moment in MOMENTS}
        optimizer.state[p] = {"step": torch.tensor(float(STEP)), **moments}
    loss_of(module, names).backward()
    optimizer.step()
    return {name: p.detach().numpy() for name, p in named.items()}


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "form", "names"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.matrix) for case in MORE)],
)
def test_deepspeed_loads_ours(saved, tmp_path, capsys, zero_stage, dtype, form, names):
    model, run, states = saved(form)
    output = tmp_path / "universal"
    command = ["convert", str(run), "--to", "universal", "--names", names, "--output", str(output)]
    if form == "roberta":
        command += ["--tokenizer", str(padding_second(tmp_path / "tokenizer"))]
    assert main(command) == 0, capsys.readouterr().err
    ranks = run_ranks(2, load_with_deepspeed, model, names, zero_stage, dtype, output)
    truth = expected(model, states, names)
    for values, counters, working, decays, after in ranks:
        assert values.keys() == truth.keys()
        for key, value in truth.items():
            assert np.array_equal(values[key], value), key
        for name, value in working.items():
            weight = torch.from_numpy(truth["fp32", name])
            assert np.array_equal(value, (weight.bfloat16().float() if dtype == "bf16" else weight).numpy()), name
        assert counters == (STEP, {STEP}, STEP - 1, zero_stage == 3)
        assert decays == [0.1, 0.0]
        if after:  # the same sums but for rounding; a wrong step, decay or rate moves weights by 1e-4
            for name, value in step_with_torch(model, truth, names).items():
                np.testing.assert_allclose(after[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_positions_behind_padding_rows_follow_the_tokenizer(saved, tmp_path, capsys):
    """RoBERTa's twin: without its tokenizer nobody knows how many rows come first."""
    _, run, _ = saved("roberta")
    command = ["convert", str(run), "--to", "universal", "--names", "huggingface", "--output", str(tmp_path / "u")]
    assert main(command) == 2
    assert "holds no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "u").exists()


def test_what_deepspeed_does_not_load_is_refused(tmp_path):
    with_momentum = muon(World(layout_of(1, 2, 1), 3, small_model()))
    whole = random_state(with_momentum.specs, 4)
    whole |= {f"optim.momentum_buffer.{spec.name}": whole[f"model.{spec.name}"] for spec in with_momentum.specs}
    with_momentum.fill(whole)
    path = with_momentum.save(tmp_path / "muon", some_state(5))
    with pytest.raises(
        CheckpointError, match=r"out_proj.weight has momentum_buffer|qkv_proj.weight has momentum_buffer"
    ):
        write_universal(path, tmp_path / "universal")
    bare = World(layout_of(1, 1, 1), 0, small_model())
    bare.fill(whole)
    bare.shards = [[dataclasses.replace(shard, moments={}) for shard in shards] for shards in bare.shards]
    path = bare.save(tmp_path / "bare", some_state(5))
    with pytest.raises(CheckpointError, match=r"has no moments \(as 15 of 15 parameters\)") as caught:
        write_universal(path, tmp_path / "universal")
    assert "--to huggingface" in caught.value.remedy
    assert not (tmp_path / "universal").exists()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    world = World(layout_of(1, 2, 1), 3, small_model())
    world.fill(random_state(world.specs, 3))
    return world.save(tmp_path / "run" / "checkpoints", some_state(5))


def test_wrong_places_are_refused(checkpoint, tmp_path, capsys):
    def convert(*arguments: Any) -> tuple[int, str]:
        return main(["convert", *map(str, arguments)]), capsys.readouterr().err

    full = tmp_path / "full"
    full.mkdir()
    (full / "something").write_text("")
    for arguments, code, said in [
        ((checkpoint, "--to", "universal", "--output", full), 2, "holds something already"),
        ((tmp_path / "no", "--to", "universal", "--output", tmp_path / "new"), 2, "is not there"),
        ((full, "--to", "universal", "--output", tmp_path / "new"), 2, "holds neither checkpoints/ nor manifest.json"),
        ((checkpoint, "--to", "dcp", "--license", "mit", "--output", tmp_path / "new"), 2, "with --to dcp"),
        (
            (checkpoint, "--to", "universal", "--output", full / "something" / "new"),
            1,
            "cannot be written: Not a directory",
        ),
    ]:
        assert (found := convert(*arguments))[0] == code, found
        assert said in found[1]
    assert not (tmp_path / "new").exists()
    next(checkpoint.glob("*.safetensors")).write_bytes(b"torn")
    code, said = convert(tmp_path / "run", "--to", "universal", "--output", tmp_path / "new")
    assert (code, "no whole checkpoint" in said) == (1, True)


def test_a_full_disk_leaves_nothing_that_deepspeed_takes_for_a_checkpoint(checkpoint, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*\.pt|no space left"):
            write_universal(checkpoint, tmp_path / "universal")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "universal" / LATEST).exists()


def test_a_parameter_cannot_lead_out_of_the_folder(tmp_path):
    for name in ("../stray", "/stray", "a/b", "..", "a\\b"):
        specs = [ParameterSpec(name, (2,))]
        world = World(layout_of(1, 1, 1), 0, specs)
        world.fill(random_state(specs, 1))
        path = world.save(tmp_path / "checkpoints", some_state(5))
        with pytest.raises(CheckpointError, match="is not that of a folder"):
            write_universal(path, tmp_path / "universal")
    assert not (tmp_path / "universal").exists()


def test_files_open_without_running_anything(checkpoint, tmp_path):
    write_universal(checkpoint, tmp_path)
    paths = sorted(tmp_path.rglob("*.pt"))
    assert len(paths) == 3 + 15 * 4
    for path in paths:
        torch.load(path, weights_only=True)
