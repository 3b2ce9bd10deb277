"""`palimpsest ledger` on runs of two stages over a fake pipeline: its numbers are those that the metrics hold."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.cli import main
from engine.data.overlap import shared_documents
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.writer import ShardWriter
from engine.data.tokenizer.folder import load_tokenizer, tokenizer_hash
from tests.distributed.runs import LENGTH, Tree, run_tree
from tests.engine.train.fake import fake_run, values

BORDER, LAST = 4, 9


def write_shards(folder: Path, corpus: Path, documents: list[list[int]], shard_bytes: int = 2000) -> Path:
    with ShardWriter(folder, 300, 0, tokenizer_hash(corpus / "tokenizer"), shard_bytes) as writer:
        for tokens in documents:
            writer.add(np.array([*tokens, 0]))
    return folder


@pytest.fixture(scope="module")
def other(corpus, tmp_path_factory) -> Path:
    """A second domain: documents of even tokens, `train` and `validation`."""
    folder = tmp_path_factory.mktemp("other")
    draw = np.random.default_rng(3)
    documents = [(draw.integers(5, 140, 30) * 2).tolist() for _ in range(60)]
    write_shards(folder / "train", corpus, documents[:50])
    write_shards(folder / "validation", corpus, documents[50:])
    return folder


def two_stages(corpus: Path, other: Path, folder: Path, **second: Any) -> Tree:
    tree = run_tree(corpus, folder)
    tree["evaluation"] = {"every_steps": 3}
    [stage] = tree["stages"]
    data = {"train": str(other / "train"), "validation": {"even": str(other / "validation")}}
    new = {"name": "two", "duration": {"steps": LAST - BORDER}, "data": data, "schedule": {"shape": "constant"}}
    tree["stages"] = [stage | {"name": "one", "duration": {"steps": BORDER}}, stage | new | second]
    return tree


@pytest.fixture(scope="module")
def run(corpus, other, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    fake_run(two_stages(corpus, other, folder))
    return folder


def ledger(capsys: Any, *arguments: object) -> dict[str, Any]:
    capsys.readouterr()  # of the training
    assert main(["ledger", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_matrix_is_what_was_recorded_at_the_ends_of_stages(run, corpus, capsys):
    found = ledger(capsys, run)
    old, new = values(run, "validation_loss/one"), values(run, "validation_loss/even")
    whole, initial = (
        values(run, "validation_loss"),
        {name: values(run, f"initial_loss/{name}") for name in ("one", "even")},
    )
    assert [stage["end_step"] for stage in found["stages"]] == [BORDER, LAST]
    # stage one has one set without a name, so its loss is the whole one there
    assert found["loss"] == [[whole[BORDER], new[BORDER]], [old[LAST], new[LAST]]]
    assert found["initial_loss"] == [initial["one"][0], initial["even"][0]]
    # Two sums of the same losses, of which the fake pipeline makes one in fp32: some 10 roundings of 2^-24.
    assert new[LAST] == pytest.approx(whole[LAST], rel=1e-6), "the loss of the stage's own set"
    assert sorted(old) == [6, 9], "at every evaluation of the later stage"
    one, even = found["domains"]
    assert one["forgetting_from_first"] == old[LAST] - whole[BORDER]
    assert one["gain"] == initial["one"][0] - whole[BORDER]
    assert even["gain"] == new[BORDER] - new[LAST]
    assert even["forward_transfer"] == initial["even"][0] - new[BORDER]
    assert found["backward_transfer"] == whole[BORDER] - old[LAST]
    assert found["average"] == (old[LAST] + new[LAST]) / 2
    assert [stage["tokens"] for stage in found["stages"]] == [
        {"one": BORDER * 8 * LENGTH},
        {"two": (LAST - BORDER) * 8 * LENGTH},
    ]
    tokens = TokenDataset(corpus / "validation").index.num_tokens
    tokenizer = load_tokenizer(corpus / "tokenizer")
    texts = [f"document {number} says {'ab' * (number % 7)} and {number * number}." for number in range(180, 200)]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"][1][0] == pytest.approx(old[LAST] / math.log(2) * tokens / num_bytes)
    assert tokenizer.vocab_size == 300
    assert found["is_complete"]


def test_the_loss_of_a_stages_own_sets_does_not_depend_on_the_others(run, corpus, other, tmp_path):
    tree = two_stages(corpus, other, tmp_path / "run")
    del tree["stages"][0]["data"]["validation"]
    fake_run(tree)
    assert not values(tmp_path / "run", "validation_loss/one")
    assert [values(tmp_path / "run", "validation_loss")[step] for step in (6, 9)] == [
        values(run, "validation_loss")[step] for step in (6, 9)
    ], "bit for bit"


def test_the_loss_of_new_data_before_an_appended_stage_is_measured_when_the_stage_begins(
    run, corpus, other, tmp_path, capsys
):
    tree = two_stages(corpus, other, tmp_path / "run")
    fake_run(tree | {"stages": tree["stages"][:1]})
    fake_run(tree)
    found, wanted = ledger(capsys, tmp_path / "run"), ledger(capsys, run)
    assert found["loss"][0] == pytest.approx(wanted["loss"][0])
    assert values(tmp_path / "run", "initial_loss/even")[BORDER] == found["loss"][0][1]
    assert found["initial_loss"] == [], "nobody knew of a ledger at the first step"
    assert found["forward_transfer"] is None


def test_weights_moved_as_far_as_the_checkpoints_say(corpus, other, tmp_path, capsys):
    tree = two_stages(corpus, other, tmp_path / "run")
    tree["checkpoint"] = {"every_steps": 1, "keep_last": 1}  # the last one of each stage stays nevertheless
    held = []

    def note(trainer: Any) -> None:
        begin = trainer.current.begin

        def begun(number: int) -> None:
            held.append(trainer.pipeline.engine.weight_W.clone())
            begin(number)

        trainer.current.begin = begun
        held.append(trainer.pipeline.engine.weight_W)

    fake_run(tree, note)
    last, first = held[0].double(), held[1].double()
    moved = {"two": pytest.approx(float((last - first).norm() / first.norm()))}
    assert ledger(capsys, tmp_path / "run")["distance"] == moved
    assert main(["checkpoint", "prune", str(tmp_path / "run"), "--keep-last", "1", "--yes"]) == 0
    assert ledger(capsys, tmp_path / "run")["distance"] == moved


def test_a_distance_whose_checkpoint_is_gone_is_unknown(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    for path in (copy / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    config = copy / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(run), str(copy)), encoding="utf-8")
    assert ledger(capsys, copy)["distance"] == {"two": None}


def test_held_out_documents_in_the_training_data_are_counted(run, corpus, other, tmp_path, capsys):
    assert ledger(capsys, run)["shared_documents"] == {"one": 0, "even": 0}
    # The same documents in other shards, in another order, in a set of other numbers of tokens.
    held = TokenDataset(other / "validation")
    documents = []
    for number in range(held.num_shards):
        shard = held.shard(number)
        documents += [
            shard.tokens[a : b - 1].tolist() for a, b in zip(shard.documents, shard.documents[1:], strict=False)
        ]
    near = [[*document[:-1], document[-1] + 1] for document in documents]
    write_shards(tmp_path / "leaky", corpus, [[7] * 5, *documents[:3][::-1], documents[0], *near], shard_bytes=300)
    assert shared_documents(held, [TokenDataset(tmp_path / "leaky")]) == 3
    assert shared_documents(held, [TokenDataset(other / "train"), TokenDataset(corpus / "train")]) == 0
    tree = two_stages(corpus, other, tmp_path / "run")
    tree["stages"][0]["data"]["train"] = str(tmp_path / "leaky")
    fake_run(tree)
    assert ledger(capsys, tmp_path / "run")["shared_documents"] == {"one": 0, "even": 3}
    replaying = two_stages(corpus, other, tmp_path / "replaying")
    replaying["stages"][1]["replay"] = {"ratio": 0.25, "source": str(tmp_path / "leaky")}
    fake_run(replaying)
    assert ledger(capsys, tmp_path / "replaying")["shared_documents"] == {"one": 0, "even": 3}, "what is replayed, too"
    assert main(["ledger", str(tmp_path / "run")]) == 0
    assert "held-out set even: 3 of its documents ARE IN THE TRAINING DATA" in capsys.readouterr().out


def test_a_run_beside_another_says_what_was_spared_and_paid(run, corpus, other, tmp_path, capsys):
    tree = two_stages(corpus, other, tmp_path / "mixed")
    mixed = {"name": "old", "path": str(corpus / "train")}, {"name": "even", "path": str(other / "train")}
    tree["stages"][1]["data"] = {"sources": list(mixed), "validation": {"even": str(other / "validation")}}
    fake_run(tree)
    found, plain = ledger(capsys, tmp_path / "mixed", "--reference", run), ledger(capsys, run)
    [beside] = found["compared_with"]
    forgotten, reference = (one["domains"][0]["forgetting_from_first"] for one in (found, plain))
    spared = None if reference <= 0 else pytest.approx(1 - forgotten / reference)
    assert beside["domains"]["one"] == {"loss": plain["loss"][1][0], "recovered_share": spared, "cost": None}
    cost = found["loss"][1][1] / plain["loss"][1][1] - 1
    assert beside["domains"]["even"] == {
        "loss": plain["loss"][1][1],
        "recovered_share": None,
        "cost": pytest.approx(cost),
    }
    # of 40 samples: 180 documents against 50, in proportion to their tokens
    assert sum(found["stages"][1]["tokens"].values()) == (LAST - BORDER) * 8 * LENGTH
    assert set(found["stages"][1]["tokens"]) == {"old", "even"}


def test_the_table_and_the_files(run, capsys):
    assert main(["ledger", str(run)]) == 0
    told = capsys.readouterr().out
    for part in ("after one", "after two", "bits per byte", "forgotten since then", "tokens", "compared by hash"):
        assert part in told
    assert json.loads((run / "ledger.json").read_text(encoding="utf-8"))["run"] == "run"
    assert (run / "ledger.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_one_stage_has_nothing_forgotten(corpus, tmp_path, capsys):
    tree = run_tree(corpus, tmp_path / "run")
    fake_run(tree)
    found = ledger(capsys, tmp_path / "run", "--no-check")
    assert (found["forgetting_from_first"], found["shared_documents"]) == (None, None)
    assert found["loss"] == [[values(tmp_path / "run", "validation_loss")[9]]]


def test_bad_input(run, corpus, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert main(["ledger", *map(str, arguments)]) in (1, 2)
        return capsys.readouterr().err

    assert "is no run folder" in refused(tmp_path)
    tree = run_tree(corpus, tmp_path / "run")
    del tree["stages"][0]["data"]["validation"]
    fake_run(tree)
    assert "has held-out data" in refused(tmp_path / "run")
    assert "has held-out data" in refused(run, "--reference", tmp_path / "run")
    assert "is the run itself" in refused(run, "--reference", run)
    (tmp_path / "run" / "metrics.jsonl").write_text("", encoding="utf-8")
    assert "has no records" in refused(tmp_path / "run")
