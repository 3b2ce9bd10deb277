"""The fine-tuning benchmark: its cells are drawn and kept as said, and its bars follow from the scores."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.finetune import ablations, texts
from bench.finetune import cells as module
from bench.finetune.__main__ import ablation_cells, cells_of
from bench.finetune.cells import Cell, Cells, Result, Side
from bench.finetune.encoder import Encoder, Size
from bench.finetune.ours import run_file
from bench.finetune.relations import OTHER, marked_text, relations_of
from bench.finetune.report import OURS, RANDOM, THEIRS, bars, summarize, table
from bench.finetune.sets import SETS, few
from bench.finetune.their_kinds import best_span, first_tokens
from engine.errors import ConfigError, DataError
from engine.tasks.relations import marked

SST2 = next(task for task in SETS if task.name == "sst2")


def results(ours: list[float], theirs: list[float], random: list[float]) -> dict[Cell, Result]:
    sides: dict[Side, tuple[list[float], float]] = {OURS: (ours, 9.0), THEIRS: (theirs, 10.0), RANDOM: (random, 9.0)}
    return {
        Cell(SST2, side, seed): Result({"accuracy": score}, seconds, 1.0, 6920, 1821)
        for side, (scores, seconds) in sides.items()
        for seed, score in enumerate(scores)
    }


def test_bars_compare_means_with_the_range_over_the_seeds() -> None:
    close = summarize(results([0.80, 0.82, 0.81], [0.82, 0.83, 0.81], [0.70, 0.71, 0.69]))
    assert list(bars(close).values()) == [True, True, True]
    # means 0.81 and 0.84, ranges 0.02; pretraining gains 0.01 with a range of 0.02
    apart = summarize(results([0.80, 0.82, 0.81], [0.83, 0.85, 0.84], [0.80, 0.80, 0.80]))
    assert list(bars(apart).values()) == [False, False, True]
    assert table(close).splitlines()[2] == (
        "| sst2 | accuracy | 6,920 | 81.0 (80.0 to 82.0) | 82.0 (81.0 to 83.0) | 70.0 (69.0 to 71.0) | 0.90 |"
    )


def test_sets_without_a_bar_and_few_rows_are_reported_alone() -> None:
    free = {replace(cell, num_rows=10): result for cell, result in results([0.1], [0.9], [0.5]).items()}
    (entry,) = summarize(free)
    assert [*bars([entry])] == ["CPU time over Trainer's, 0.90, is at most 1"]


def test_few_rows_have_each_label_equally_often() -> None:
    rows = [{"label": number % 4, "text": str(number)} for number in range(100)]
    drawn = few(rows, 10, seed=1)
    counts = [sum(row["label"] == label for row in drawn) for label in range(4)]
    assert counts == [3, 3, 2, 2]
    assert drawn == few(rows, 10, seed=1) != few(rows, 10, seed=2)
    assert len(few(rows, 1000, seed=1)) == 100


def test_few_rows_have_every_tag() -> None:
    rows = [{"tags": ["O", f"I-{number % 5}" if number % 20 < 5 else "O"]} for number in range(100)]
    for seed in range(5):
        assert {tag for row in few(rows, 6, seed) for tag in row["tags"]} == {"O", *(f"I-{kind}" for kind in range(5))}


def test_the_other_side_labels_first_tokens_and_decodes_spans() -> None:
    assert first_tokens([None, 0, 0, 1, 2, 2, None]) == [None, 0, None, 1, 2, None, None]
    offsets = [None, (0, 3), (4, 7), (8, 12)]
    starts, ends = np.array([9.0, 1.0, 3.0, 0.0]), np.array([9.0, 5.0, 1.0, 2.0])
    # the best start and end are outside of the context, and the best end inside lies before its start
    assert best_span(starts, ends, offsets) == (6.0, 0, 3)
    assert best_span(starts, np.array([9.0, 0.0, 1.0, 3.0]), offsets) == (6.0, 4, 12)


def test_documents_that_hold_a_test_text_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tested, trained = "A thrifty monk, who hides older lines in the codex: nothing fades.", "the ink fades in the codex"
    documents = [
        {"source": "movie_reviews", "text": "kept"},
        {"source": "movie_reviews", "text": f"Before. {tested.upper().replace(',', '')} After."},
        {"source": "abc", "text": "news"},
        {"source": "unknown", "text": "of no domain"},
    ]
    monkeypatch.setattr(texts, "SETS", [SST2])
    monkeypatch.setattr(texts, "CORPUS", ("corpus.jsonl.gz",))
    monkeypatch.setattr(
        texts,
        "DOMAINS",
        (texts.Domain("reviews", 0.5, "movie_.*"), texts.Domain("prose", 0.3, "brown|abc"), texts.Domain("sst2", 0.2)),
    )
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)
    for half, text in ((SST2.train, trained), (str(SST2.test), tested)):
        (tmp_path / half).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / half).write_text(json.dumps({"text": text, "label": "positive"}) + "\n", encoding="utf-8")
    texts.write_texts(tmp_path, tmp_path / "texts")
    written = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "texts").iterdir()}
    assert written == {
        name: json.dumps({"text": text}) + "\n"
        for name, text in (("reviews", "kept"), ("prose", "news"), ("sst2", trained))
    }


def test_few_rows_are_trained_on_for_as_many_steps_as_it_takes() -> None:
    assert SST2.for_rows(6920) == SST2
    ten = SST2.for_rows(10)
    assert (ten.batch, ten.epochs) == (10, 60), "a step is all ten"
    assert SST2.for_rows(1000) == SST2, "3 passes of 32 steps are more than 60"


def test_each_side_has_the_same_seeds() -> None:
    planned = cells_of([SST2], 2, few=True)
    assert len(planned) == 2 * 3 + 3 * 2 * 2
    assert len({cell.name for cell in planned}) == len(planned)


def test_a_finished_cell_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, ran = Encoder(tmp_path, tmp_path / "encoder", Size()), []
    for folder in (encoder.pretrained, encoder.random):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "cells").mkdir()

    def run(_: Cells, cell: Cell) -> Result:
        ran.append(cell.name)
        return Result({"accuracy": 0.5}, 1.0, 1.0, 8, 8)

    monkeypatch.setattr(module.Cells, "_run", run)
    planned = cells_of([SST2], 1, few=False)
    first = Cells(tmp_path, tmp_path / "cells", encoder).run(planned, 1)
    assert len(ran) == 3
    assert Cells(tmp_path, tmp_path / "cells", encoder).run(planned, 1) == first
    assert len(ran) == 3
    (tmp_path / "cells" / f"{planned[0].name}.json").write_text(json.dumps({"settings": {}}))
    Cells(tmp_path, tmp_path / "cells", encoder).run(planned, 1)
    assert ran[3:] == [planned[0].name], "damaged, or of other settings"
    (encoder.pretrained / "model.safetensors").write_bytes(b"others")
    Cells(tmp_path, tmp_path / "cells", encoder).run(planned, 1)
    assert len(ran) == 7


def test_relations_are_pairs_of_neighbouring_entities() -> None:
    row = {
        "tokens": ["Ann", "Lee", "left", "Rome", "for", "IBM", "Ltd"],
        "tags": ["I-PER", "I-PER", "O", "I-LOC", "O", "I-ORG", "I-ORG"],
    }
    lonely = {"tokens": ["Ann", "slept"], "tags": ["I-PER", "O"]}
    train, test = relations_of([row, lonely] * 20, [row, {"tokens": ["Rome", "Ann"], "tags": ["I-LOC", "I-PER"]}])
    assert len(train) == 40
    assert [(marked_text(one), one["label"]) for one in train[:2]] == [
        ("@ Ann Lee @ left # Rome # for IBM Ltd", "PER-LOC"),
        ("Ann Lee left @ Rome @ for # IBM Ltd #", "LOC-ORG"),
    ]
    assert [one["label"] for one in test] == ["PER-LOC", "LOC-ORG", OTHER], "a pair that training does not have"


def test_both_sides_see_the_same_marks() -> None:
    row = {"text": "Ann left Rome .", "head": {"start": 0, "end": 3}, "tail": {"start": 9, "end": 13}, "label": "x"}
    text, _ = marked("rows", 1, row, ("head", "tail"), row["text"])
    assert marked_text(row) == text == "@ Ann @ left # Rome # ."


def test_each_ablation_changes_one_thing(tmp_path: Path) -> None:
    trees = {}
    for switch in ablations.SWITCHES:
        tree = run_file(ablations.SET, "start", ("train", "test"), tmp_path, seed=1)
        trees[switch.name] = json.dumps(ablations.changed(tree, switch), sort_keys=True)
    plain = trees.pop("nothing")
    assert [name for name, tree in trees.items() if tree == plain] == ["ensemble of 3"], "several runs of it"
    assert len({*trees.values()}) == len(trees)
    assert len({cell.name for cell in ablation_cells(3)}) == 3 * len(ablations.SWITCHES)
    with pytest.raises(ConfigError, match="choose from these"):
        ablations.switch_of("prayer")


def test_an_ensemble_is_scored_by_its_mean_probabilities() -> None:
    one, other = np.log([[0.9, 0.1], [0.4, 0.6]]), np.log([[0.3, 0.7], [0.5, 0.5]])
    found = ablations.score([one, other], np.array([0, 0]))
    # means (0.6, 0.4) and (0.45, 0.55)
    assert found["accuracy"] == 0.5
    assert found["loss"] == pytest.approx(-(np.log(0.6) + np.log(0.45)) / 2)


def test_switches_are_compared_seed_by_seed() -> None:
    nothing = [{"accuracy": 0.5, "loss": 0.7}, {"accuracy": 0.6, "loss": 0.6}]
    dropout = [{"accuracy": 0.52, "loss": 0.5}, {"accuracy": 0.61, "loss": 0.5}]
    assert ablations.table({"nothing": nothing, "dropout": dropout}).splitlines()[2:] == [
        "| nothing | 55.0 (50.0 to 60.0) |  | 0.650 (0.600 to 0.700) |  |",
        "| dropout | 56.5 (52.0 to 61.0) | 1.5 (1.0 to 2.0) | 0.500 (0.500 to 0.500) | -0.150 (-0.200 to -0.100) |",
    ]


def test_a_folder_without_the_sets_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a data folder with tasks/ and corpus/"):
        SST2.rows(tmp_path)
