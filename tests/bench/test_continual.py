"""The continual-learning experiment at toy size: its runs share a checkpoint; its figures follow from the losses."""

from pathlib import Path

import pytest

from bench.continual import corpora
from bench.continual.__main__ import all_methods, experiment
from bench.continual.core import JOINT, RESERVOIR, SCRATCH, bars, summarize
from bench.continual.methods import CONSTANT, PLAIN, REPLAY, compare, merges, methods, verdicts
from bench.continual.report import draw, draw_methods, methods_table, table, told
from bench.continual.setup import BASE, Setup, Sizes
from engine.config.load import parse_run
from engine.config.resolve import resolve
from engine.errors import DataError

TOY = {"vocab_size": 260, "num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 32}


def a_seed(**losses: tuple[float, float]) -> dict[str, object]:
    """Runs of one seed by name, with (old, new) losses."""
    given = {
        BASE: (1.0, None),
        "0 %": (2.0, 1.0),
        "5 %": (1.6, 1.005),
        "10 %": (1.4, 1.01),
        "25 %": (1.2, 1.03),
        RESERVOIR: (1.45, 1.01),
        JOINT: (1.05, 1.05),
        SCRATCH: (None, 1.3),
    }
    pairs = {name: {"old": old, "new": new} for name, (old, new) in (given | losses).items()}
    return {
        name: {"loss": {key: value for key, value in loss.items() if value is not None}} for name, loss in pairs.items()
    }


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    """Prose and source; reading the whole library takes seconds."""
    return corpora.standard_library(100_000)


def test_figures_follow_from_the_losses():
    found = summarize({"1": a_seed(), "2": a_seed(**{"5 %": (1.4, 1.015)})})
    assert found["0 %"]["forgetting_removed"] == 0
    assert found["5 %"]["forgetting_removed"] == pytest.approx((0.4 + 0.6) / 2), "the mean of the seeds"
    assert found["5 %"]["cost_on_new"] == pytest.approx(0.01)
    assert found["25 %"]["mean_over_joint"] == pytest.approx((1.2 + 1.03) / (1.05 + 1.05) - 1)
    assert found[SCRATCH]["forgetting_removed"] is None
    assert found[SCRATCH]["cost_on_new"] == pytest.approx(0.3)


def test_bars_say_honestly_what_is_met():
    met = {bar.text: bar.is_met for bar in bars(summarize({"1": a_seed()}))}
    assert all(met.values())
    missed = bars(summarize({"1": a_seed(**{"25 %": (1.5, 1.06), RESERVOIR: (1.9, 1.0)})}))
    assert [bar.text for bar in missed if not bar.is_met] == [
        "replay of 25 % removes",
        "replay of 25 % costs on the new domain",
        "mean loss at 25 % above joint training",
        "reservoir of 1 % keeps of the effect at 10 %",
    ]
    assert told(missed).count("NOT met") == 4


def test_texts_of_the_standard_library_have_nothing_in_common(texts):
    prose, source = texts
    assert all(100_000 <= sum(len(text.encode()) for text in texts) < 110_000 for texts in (prose, source))
    assert not set(prose) & set(source)


def test_code_is_source_without_docstrings_and_comments():
    source = '''"""A module."""
import os  # a comment


class Empty:
    """Nothing."""


def path(name):
    """Return a path."""
    return os.path.join("a # b", name)
'''
    assert corpora.code_of(source) == (
        "import os\n\nclass Empty:\n    pass\n\ndef path(name):\n    return os.path.join('a # b', name)"
    )
    assert corpora.code_of("this is no Python") == ""
    _, whole = corpora.standard_library(20_000, with_comments=True)
    _, code = corpora.standard_library(20_000)
    assert any('"""' in text for text in whole)
    assert not any("\n# " in text for text in code)


def test_a_file_that_is_no_text_is_one_clear_error(tmp_path):
    (tmp_path / "some.jsonl").write_text('{"words": 1}\n')
    with pytest.raises(DataError, match="JSON lines with the key `text`"):
        corpora.read_texts(tmp_path / "some.jsonl", 100)


def test_all_runs_are_trained_and_told(tmp_path: Path, texts):
    prose, source = (half[:12] for half in texts)
    sizes = Sizes(TOY, old_steps=4, new_steps=3, length=32, batch=8, evaluated_samples=8, seeds=(1,), ratios=(0.0, 0.5))
    found = experiment({corpora.OLD: prose, corpora.NEW: source}, sizes, processes=2)
    runs = found["seeds"]["1"]
    assert list(runs) == [BASE, "0 %", "50 %", RESERVOIR, JOINT, SCRATCH]
    assert set(runs[BASE]["loss"]) == {"old"}
    assert set(runs[JOINT]["loss"]) == set(runs[RESERVOIR]["loss"]) == {"old", "new"}
    losses = [run["loss"]["old"] for run in runs.values() if "old" in run["loss"]]
    assert len(set(losses)) == len(losses), "each run has trained something else"
    draw(found["mean"], "toy", tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 1000
    assert table(found["mean"]).count("\n") == 1 + len(runs)


def test_a_method_is_judged_by_its_losses():
    runs = {
        BASE: {"loss": {"old": 1.0}, "cpu_seconds": 9.0},
        PLAIN: {"loss": {"old": 2.0, "new": 1.0}, "cpu_seconds": 4.0},
        REPLAY: {"loss": {"old": 1.4, "new": 1.01}, "cpu_seconds": 4.0},
        "good": {"loss": {"old": 1.2, "new": 1.005}, "cpu_seconds": 6.0},
        "useless": {"loss": {"old": 2.1, "new": 1.5}, "cpu_seconds": 2.0},
    }
    found = compare(runs)
    assert found["good"]["forgetting_removed"] == pytest.approx(0.8)
    assert found["useless"]["forgetting_removed"] == pytest.approx(-0.1)
    assert found["good"]["cost_on_new"] == pytest.approx(0.005)
    assert found["good"]["cpu_over_plain"] == 1.5
    said = verdicts(found)
    assert list(said) == ["good", "useless"]
    assert said["good"] == (
        "forgets less and learns less than plain continuation; forgets less and learns more than replay"
    )
    assert said["useless"].count("forgets more and learns less") == 2


def test_every_method_is_a_run_that_can_start(tmp_path):
    setup = Setup(tmp_path, Sizes(), 1)
    for method in methods(setup):
        stages = [setup.old_stage(), setup.new_stage(1, setup.of(corpora.OLD, corpora.NEW)) | method.stage]
        config = resolve(parse_run(setup.tree(1, method.name, stages) | method.run, method.name), 1)
        assert config is not None
    [*_, wsm] = merges(Sizes())
    assert wsm.steps == (550, 575, 600, 625, 650)
    assert sum(wsm.weights) == pytest.approx(1.0)


@pytest.mark.matrix
def test_all_methods_are_trained_merged_and_told(tmp_path: Path, texts):
    prose, source = (half[:12] for half in texts)
    sizes = Sizes(TOY, old_steps=4, new_steps=10, length=32, batch=8, evaluated_samples=None, seeds=(1,))
    found = all_methods({corpora.OLD: prose, corpora.NEW: source}, sizes, processes=2)
    rows = found["measures"]
    assert {BASE, PLAIN, REPLAY, CONSTANT, "merge, half old", "constant rate, WSM"} < set(rows)
    branches = {name: row["old"] for name, row in rows.items() if name != BASE}
    # a model of one layer has embeddings alone to freeze in the second case, and both in the first
    assert len(set(branches.values())) == len(branches), "each method has trained something else"
    draw_methods(rows, "toy", tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 1000
    assert methods_table(rows).count("\n") == 1 + len(rows)
