"""Weights that a run starts from: agreement of the models, what may be missing, and what the run notes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.interchange.initial import model_of
from engine.cli import main
from engine.config.load import load_run, parse_run
from engine.config.resume import meaning_hash, refuse_new_meaning
from engine.config.save import save_run
from engine.config.schema.run import RunConfig
from engine.errors import CheckpointError, ConfigError
from engine.models.families import family
from engine.models.initial import initial_value
from engine.train.starting_weights import StartingWeights, with_fingerprint
from tests.engine.checkpoint.interchange.formats import save_run as save_formats_run
from tests.engine.models.tiny import random_weights, tiny, twin
from tests.engine.serve.runs import run_config, save

STAGE = {"data": {"train": "t"}, "sequence_length": 32, "global_batch_size": 1, "duration": {"steps": 9}}


@pytest.fixture
def theirs(tmp_path) -> Path:
    model = tiny("llama")
    twin(model, random_weights(model, seed=2)).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def run_from(source: Path, folder: Path, model, **given) -> RunConfig:
    tree = {"folder": str(folder), "tokenizer": "t", "stages": [STAGE], "init_from": {"path": str(source), **given}}
    return parse_run(tree | {"model": model.model_dump(mode="json")}, "test")


def check_rows(config: RunConfig, expected: dict[str, torch.Tensor]) -> None:
    source = StartingWeights(config)
    for spec in family(config.model).specs(config.model):
        whole = torch.zeros(spec.shape)
        whole[: len(expected[spec.name])] = expected[spec.name]
        rows = spec.shape[0]
        for first, end in ((0, rows), (rows // 2, rows), (rows - 1, rows), (0, 1)):
            assert torch.equal(source.rows(spec, first, end), whole[first:end]), spec.name


def test_rows_are_those_of_the_folder_and_padding_is_zero(theirs, tmp_path):
    check_rows(run_from(theirs, tmp_path / "run", tiny("llama")), random_weights(tiny("llama"), seed=2))


def test_a_checkpoint_of_another_run_is_a_source_too(tmp_path):
    config = run_config(tmp_path / "before", "gpt2", tmp_path)
    save(config, step=3, seed=3)
    save(config, step=5, seed=5)
    check_rows(run_from(config.folder, tmp_path / "run", config.model), random_weights(config.model, seed=5))
    older = config.folder / "checkpoints" / "step-00000003"
    check_rows(run_from(older, tmp_path / "run", config.model), random_weights(config.model, seed=3))


def test_another_model_is_refused_by_its_keys(theirs, tmp_path):
    wrong = tiny("llama", num_layers=3, rope_theta=5.0, dropout=0.1, vocab_multiple=8)
    with pytest.raises(
        ConfigError, match=r"model.num_layers = 3 \(there 4\), model.rope_theta = 5.0 \(there 10000.0\)"
    ):
        StartingWeights(run_from(theirs, tmp_path / "run", wrong))
    # with dynamic scaling the frequencies depend on the number of positions
    dynamic = tiny("llama", max_positions=4096, rope_scaling={"type": "dynamic", "factor": 2.0})
    with pytest.raises(ConfigError, match=r"model.max_positions = 4096 \(there 128\), model.rope_scaling = "):
        StartingWeights(run_from(theirs, tmp_path / "run", dynamic))
    # what no weight depends on is the run's own
    StartingWeights(run_from(theirs, tmp_path / "run", tiny("llama", dropout=0.1, max_positions=4096)))


PROMPT, BOTTLENECK = {"method": "prompt", "virtual_tokens": 5}, {"method": "bottleneck", "size": 4}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (PROMPT, None),
        (PROMPT, {"method": "prompt", "virtual_tokens": 3}),
        (PROMPT, {"method": "prompt", "virtual_tokens": 9}),
        (PROMPT, {"method": "lora"}),
        ({"method": "prefix", "virtual_tokens": 5}, PROMPT),
        (BOTTLENECK, None),
        (BOTTLENECK, {"method": "bottleneck", "size": 4, "targets": ["ffn"]}),
    ],
)
@pytest.mark.parametrize("missing", ["error", "initialise"])
def test_an_adapter_that_is_not_merged_is_gone_on_with_or_refused(tmp_path, theirs, ours, missing):
    begun = run_config(tmp_path / "before", "gpt2", tmp_path)
    config = begun.model_copy(update={"model": tiny("gpt2", adapter=theirs)})
    save(config, step=3, seed=3)
    with pytest.raises(
        ConfigError, match=r"init_from = \S*before has an adapter beside its weights, .*" + theirs["method"]
    ):
        StartingWeights(run_from(config.folder, tmp_path / "run", tiny("gpt2", adapter=ours), missing=missing))
    same = run_from(config.folder, tmp_path / "run", config.model, missing=missing)
    check_rows(same, random_weights(config.model, seed=3))


def test_new_rows_and_heads_are_initialised_on_request(tmp_path):
    small = tiny("bert", pair_head=False, vocab_size=500)
    weights = random_weights(small, seed=2)
    twin(small, weights).save_pretrained(tmp_path / "theirs")
    large = tiny("bert", pair_head=True, vocab_size=507)
    with pytest.raises(
        ConfigError, match=r"model.pair_head = True \(there False\), model.vocab_size = 507 \(there 500\)"
    ):
        StartingWeights(run_from(tmp_path / "theirs", tmp_path / "run", large))
    config = run_from(tmp_path / "theirs", tmp_path / "run", large, missing="initialise")
    initial = {spec.name: initial_value(spec, large, config.seed) for spec in family(large).specs(large)}
    expected = {name: values.clone() for name, values in initial.items()}
    for name, values in weights.items():
        expected[name][: len(values)] = values
    check_rows(config, expected)


def test_a_missing_body_is_never_initialised(theirs, tmp_path):
    state = load_file(theirs / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, theirs / "model.safetensors")
    for missing in ("error", "initialise"):
        with pytest.raises(ConfigError, match=r"no file holds model.layers.0.mlp.up_proj.weight"):
            StartingWeights(run_from(theirs, tmp_path / "run", tiny("llama"), missing=missing))


def test_the_fingerprint_is_meaning_and_the_path_is_not(theirs, tmp_path):
    config = with_fingerprint(run_from(theirs, tmp_path / "run", tiny("llama")))
    assert config.init_from is not None
    assert config.init_from.fingerprint is not None
    config.folder.mkdir()
    save_run(config, config.folder)
    moved = theirs.rename(tmp_path / "moved")
    again = run_from(moved, config.folder, tiny("llama"))
    assert meaning_hash(with_fingerprint(again)) == meaning_hash(config)
    refuse_new_meaning(config, again, "f")
    # the source is gone: the run goes on by what it has noted
    assert with_fingerprint(run_from(theirs, config.folder, tiny("llama"))) == config
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        with_fingerprint(run_from(theirs, tmp_path / "new", tiny("llama")))


def test_other_weights_are_another_run(theirs, tmp_path):
    config = with_fingerprint(run_from(theirs, tmp_path / "run", tiny("llama")))
    twin(tiny("llama"), random_weights(tiny("llama"), seed=9)).save_pretrained(theirs)
    other = with_fingerprint(run_from(theirs, tmp_path / "run", tiny("llama")))
    with pytest.raises(ConfigError, match=r"init_from.fingerprint: .* -> "):
        refuse_new_meaning(config, other, "f")
    noted = config.init_from
    assert noted is not None
    with pytest.raises(ConfigError, match=r"init_from.fingerprint = .*, and the weights in .* have"):
        with_fingerprint(run_from(theirs, tmp_path / "run", tiny("llama"), fingerprint=noted.fingerprint))


def test_a_run_file_may_leave_the_model_out(theirs, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"folder: {tmp_path}/run\ntokenizer: t\ninit_from: {theirs}\nmodel: {{dropout: 0.1}}\n"
        "stages: [{data: {train: t}, sequence_length: 32, global_batch_size: 1, duration: {steps: 9}}]\n"
    )
    found = load_run(path, [], model_of)
    assert found.model == tiny("llama", dropout=0.1)
    assert found.init_from is not None
    assert (found.init_from.path, found.init_from.missing) == (str(theirs), "error")
    with pytest.raises(ConfigError):
        load_run(path)
    # the source is gone: the run goes on with the model that it has noted, and another one does not begin
    found.folder.mkdir()
    save_run(found, found.folder)
    theirs.rename(tmp_path / "moved")
    assert load_run(path, [], model_of).model == found.model
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_run(path, [f"folder={tmp_path}/new"], model_of)


@pytest.mark.parametrize("to", ["dcp", "universal", "deepspeed"])
def test_other_formats_are_sources_of_rows_and_of_moments(tmp_path, to):
    before, states = save_formats_run(tmp_path / "before", "llama")
    command = ["convert", str(tmp_path / "before"), "--to", to, "--with-optimizer", "--names", "huggingface"]
    assert main([*command, "--output", str(tmp_path / to)]) == 0
    config = run_from(tmp_path / to, tmp_path / "run", before.model, moments=True)
    check_rows(config, states["model"])
    source = StartingWeights(config)
    spec = next(spec for spec in family(before.model).specs(before.model) if "down_proj" in spec.name)
    rows = source.moment_rows("exp_avg")(spec, 2, 5)
    assert torch.equal(rows, states["exp_avg"][spec.name][2:5])
    assert source.updates == 5
    # those rows alone, of weights and moments
    source.rows(spec, 0, 1)
    assert source.bytes_read == 4 * states["exp_avg"][spec.name][:4].nelement()
    with pytest.raises(ConfigError, match=r"holds no momentum_buffer of layers\.\d+\.ffn\.down_proj"):
        source.moment_rows("momentum_buffer")(spec, 0, 1)
    # files that say of which model they are: `model` may be left out
    assert model_of(str(tmp_path / to)) == before.model.model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"model\.num_layers = 2 \(there 4\)"):
        StartingWeights(run_from(tmp_path / to, tmp_path / "run", tiny("llama", num_layers=2)))
