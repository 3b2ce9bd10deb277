"""`palimpsest checkpoint merge` as a user calls it; the output is told, opened, evaluated and trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.checkpoint.folder import committed
from engine.checkpoint.load import read_weights
from engine.cli import main
from engine.data.loader import first_samples
from engine.data.shards.index import read_index
from engine.data.shards.tombstones import Tombstones, add_tombstones, read_tombstones
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE
from engine.library import open_checkpoint
from engine.serve.held_out import held_out_loss
from tests.distributed.runs import run_tree
from tests.engine.data.corpus import write_shards
from tests.engine.serve.runs import run_config, save
from tests.engine.train.fake import fake_run


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A run of nine steps with a checkpoint every three."""
    folder = tmp_path_factory.mktemp("merge") / "run"
    fake_run(run_tree(corpus, folder))
    return folder


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def merged(arguments: list[Any], code: int = EXIT_DONE) -> None:
    assert main(["checkpoint", "merge", *map(str, arguments)]) == code


def test_the_newest_of_a_run_are_merged_as_a_decay(trained, tmp_path, capsys):
    merged([trained, "--last", "3", "--wsm", "1-sqrt", "--output", tmp_path / "out"])
    said = capsys.readouterr().out
    roots = np.sqrt(np.arange(4) / 3)
    expected = np.diff(roots)
    for number, coefficient in zip((3, 6, 9), expected, strict=True):
        assert f"{coefficient:.6f}  {step(trained, number)}" in said
    weights = [read_weights(step(trained, number))["weight"].double().numpy() for number in (3, 6, 9)]
    found = read_weights(step(tmp_path / "out", 9))["weight"].numpy()
    assert np.allclose(found, sum(c * w for c, w in zip(expected, weights, strict=True)), rtol=2**-23, atol=0)
    assert main(["checkpoint", "verify", str(tmp_path / "out")]) == EXIT_DONE
    assert main(["checkpoint", "diff", str(tmp_path / "out"), str(trained)]) == EXIT_FAILURE


def test_old_and_new_weights_of_a_run_of_two_stages_are_merged(corpus, tmp_path, capsys):
    """The mean of before and after the second stage, which stands at the end of the run."""
    tree = run_tree(corpus, tmp_path / "run")
    [stage] = tree["stages"]
    tree["stages"] = [stage | {"name": "old", "duration": {"steps": 3}}, stage | {"name": "new"}]
    tree["reservoir"] = {"rows": 100, "span_tokens": 16, "pin": {"max_bytes": 10**6}}
    fake_run(tree)
    gone = Tombstones({shard.content_hash: range(3) for shard in read_index(corpus / "train").shards})
    add_tombstones(tmp_path / "run", gone)
    old, new = (step(tmp_path / "run", number) for number in (3, 12))
    merged([old, tmp_path / "run", "--weights", "0.25,0.75", "--output", tmp_path / "out"])
    before, after = (read_weights(path)["weight"].double() for path in (old, new))
    assert torch.equal(read_weights(step(tmp_path / "out", 12))["weight"], (0.25 * before + 0.75 * after).float())
    # the reservoir and its copies, which the newest one names, lie beside the output, and what is forgotten stays so
    assert main(["checkpoint", "verify", str(tmp_path / "out")]) == EXIT_DONE
    assert read_tombstones(tmp_path / "out") == gone
    tree["stages"].append(stage | {"name": "third", "replay": {"ratio": 0.25}})
    run = fake_run(tree | {"folder": str(tmp_path / "out")})
    assert (run.started_at, run.state.step, run.state.run_stage) == (12, 21, 2)


def test_training_goes_on_from_a_merge_with_an_optimizer_that_begins_anew(trained, corpus, tmp_path, capsys):
    merged([step(trained, 3), step(trained, 6), "--output", tmp_path / "out"])
    mean = (read_weights(step(trained, 3))["weight"].double() + read_weights(step(trained, 6))["weight"].double()) / 2
    began: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        engine = trainer.pipeline.engine
        began.update(weight=engine.weight_W.clone(), step=trainer.state.step, updates=engine.updates)
        began["moments"] = max(float(moment.abs().max()) for moment in engine.moments.values())

    run = fake_run(run_tree(corpus, tmp_path / "out"), look)
    assert (began["step"], began["updates"], began["moments"]) == (6, 0, 0.0)
    assert torch.equal(began["weight"], mean.float())
    assert run.state.step == 9
    assert json.loads((step(tmp_path / "out", 9) / "manifest.json").read_text())["moments"]


def test_the_held_out_loss_is_that_of_the_logits(tmp_path, capsys):
    config = run_config(tmp_path / "run", "gpt2", tmp_path / "tokenizer")
    documents = [np.append(np.random.default_rng(n).integers(1, 40, 20), 0) for n in range(12)]
    dataset = write_shards(tmp_path / "held-out", documents, vocab_size=config.model.vocab_size)
    for number in (10, 20):
        save(config, number, number, {"progress": {"run_stage": 0}})
    write_shards(tmp_path / "more", documents[:3], vocab_size=config.model.vocab_size)
    verify_on = [item for name in ("held-out", "more") for item in ("--verify-on", tmp_path / name)]
    merged([tmp_path / "run", "--last", "2", "--output", tmp_path / "out", *verify_on])
    said = capsys.readouterr().out
    assert said.count("held-out loss on") == 2
    first = said[said.index("held-out loss on") : said.rindex("held-out loss on")]
    alone = {step(tmp_path / "run", number): f"of {step(tmp_path / 'run', number)} alone: " for number in (10, 20)}
    told = {step(tmp_path / "out", 20): f"held-out loss on {tmp_path / 'held-out'}: "} | alone
    for path, name in told.items():
        batch = first_samples(dataset, 32, 0, 10**6)
        given = {key: value for key, value in batch.inputs.items() if key not in ("targets_BT", "weights_BT")}
        with torch.inference_mode():
            logits = open_checkpoint(path).build_model()(**given)["logits_BTV"].double()
        losses = F.cross_entropy(logits.flatten(0, 1), batch.inputs["targets_BT"].flatten(), reduction="none")
        weights = batch.inputs["weights_BT"].flatten().double()
        expected = float((losses * weights).sum() / weights.sum())
        # fp32 sums of some hundred losses of about 4: a relative error of 2^-23 times their number's root, and a margin
        assert held_out_loss(path, dataset) == pytest.approx(expected, rel=1e-5)
        assert f"{name}{held_out_loss(path, dataset):.6f}" in first


def test_bad_input_is_one_clear_error_and_nothing_is_written(trained, tmp_path, capsys):
    a, b, out = step(trained, 3), step(trained, 6), ["--output", tmp_path / "out"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    damaged = Path(shutil.copytree(b, tmp_path / "damaged"))
    file = next(damaged.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    cases: list[tuple[list[Any], int, str]] = [
        ([a, *out], EXIT_USAGE, "these are 1 checkpoints"),
        ([a, a, *out], EXIT_USAGE, "these are 1 checkpoints"),
        ([trained, step(trained, 9), *out], EXIT_USAGE, "these are 1 checkpoints"),
        ([a, b, "--weights", "0.5,0.6", *out], EXIT_USAGE, "they add up to 1.1"),
        ([a, b, "--weights", "1", *out], EXIT_USAGE, "1 numbers for 2 checkpoints"),
        ([a, b, "--weights", "nan,1", *out], EXIT_USAGE, "they add up to nan"),
        ([a, b, "--weights", "a,b", *out], EXIT_USAGE, "could not convert"),
        ([a, b, "--weights", "0.5,0.5", "--wsm", "linear", *out], EXIT_USAGE, "named both"),
        ([a, b, "--wsm", "square", *out], EXIT_USAGE, "1-sqrt"),
        ([a, b, "--last", "2", *out], EXIT_USAGE, "of 2 sources"),
        ([trained, "--last", "9", *out], EXIT_USAGE, "holds 3 checkpoints"),
        ([trained, "--last", "1", *out], EXIT_USAGE, "--last"),
        ([tmp_path / "nowhere", b, *out], EXIT_USAGE, "is not there"),
        ([tmp_path / "full", b, *out], EXIT_USAGE, "holds neither"),
        ([a, damaged, *out], EXIT_FAILURE, "is damaged"),
        ([a, b, "--output", tmp_path / "full"], EXIT_USAGE, "exists and holds something"),
        ([a, b, "--output", "s3://bucket/run"], EXIT_USAGE, "is a URL"),
        ([a, b, "--verify-on", tmp_path / "full", *out], EXIT_FAILURE, "holds no index.json"),
    ]
    for arguments, code, said in cases:
        merged(arguments, code)
        found = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert said in found, (arguments, found)
        assert not (tmp_path / "out").exists()
    assert len(committed(trained / "checkpoints")) == 3
