"""Tasks learned one after the other: bodies under the heads of other runs. Ensembles: means of probabilities."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.checkpoint.folder import CHECKPOINTS, step_path
from engine.cli import main
from engine.config.save import save_run
from engine.config.schema.run import RunConfig
from engine.data.shards.dataset import TokenDataset
from engine.errors import ConfigError
from engine.models.families import family
from engine.models.initial import initial_value
from engine.models.materialize import whole_model
from engine.serve.source import open_trained
from engine.tasks.ensemble import ensemble
from engine.tasks.predict import logits_of
from engine.tasks.resolve import resolve_task
from engine.tasks.sequence import BODY, language_model_losses, measures, open_tasks
from engine.train.starting_weights import StartingWeights
from tests.engine.serve.runs import save
from tests.engine.tasks.starts import tree_of, write_examples, write_start


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


def learned(folder: Path, start: Path, name: str, labels: tuple, seed: int) -> RunConfig:
    """A run of a task with a checkpoint of random weights."""
    (folder / name).mkdir()
    write_examples(folder / name, labels=labels)
    run = resolve_task(tree_of(folder / name, start) | {"name": name}, "task")
    save(run, 3, seed)
    return run


def test_an_earlier_task_is_measured_by_the_later_body_under_its_own_head(tmp_path, start):
    runs = [learned(tmp_path, start, name, labels, seed) for name, labels, seed in
            (("first", ("old", "new"), 1), ("second", ("a", "b", "c"), 2))]  # fmt: skip
    tasks = open_tasks([run.folder for run in runs])
    (first, none), (again, second) = measures(tasks)
    assert none is None
    for run, found in zip(runs, (first, second), strict=True):
        trained, (location, *_) = open_trained(run.folder), run.stages[-1].data.validation_locations
        dataset = TokenDataset(location)
        predicted = np.array([row.argmax() for row in logits_of(trained, run.stages[-1], dataset)])
        assert found == pytest.approx(np.mean(predicted == dataset.whole_column("label")))
    # by hand: the second body, the first head
    one, two = (open_trained(run.folder) for run in runs)
    weights = {name: (two if name.startswith(BODY) else one).weights[name] for name in one.weights}
    model = whole_model(one.config, weights).eval()
    dataset = TokenDataset(runs[0].stages[0].data.validation_locations[0])
    labels = dataset.whole_column("label")
    hits = []
    for number, label in enumerate(labels):
        first_token, end = dataset.offsets(0)[0][number : number + 2]
        ids = torch.from_numpy(np.array(dataset.shard(0).tokens[first_token:end], np.int64))[None]
        with torch.no_grad():
            hits.append(int(model(tokens_BT=ids)["logits_BC"].argmax()) == label)
    assert again == pytest.approx(np.mean(hits))


def test_of_a_run_counts_what_finetune_exports(tmp_path, start):
    """The best checkpoint, where it is kept; else the newest; or the one that is named."""
    run = learned(tmp_path, start, "run", ("old", "new"), 1)
    for step in (5, 7):
        save(run, step, seed=step)
    records = ({"step": step, "validation_accuracy": value} for step, value in ((3, 0.25), (5, 0.75), (7, 0.5)))
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run.checkpoint.keep_best == 1
    save_run(run, run.folder)
    best = open_trained(step_path(run.folder / CHECKPOINTS, 5))
    for source, step in ((run.folder, 5), (step_path(run.folder / CHECKPOINTS, 3), 3)):
        [task] = open_tasks([source])
        assert task.trained.step == step
    expected = [logits.argmax() for logits in logits_of(best, run.stages[-1], validation_of(run))]
    labels = run.stages[-1].objective.labels
    assert [row["predicted"] for row in ensemble([run.folder]).rows()] == [labels[number] for number in expected]
    save_run(run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"keep_best": 0})}), run.folder)
    assert open_tasks([run.folder])[0].trained.step == 7


def validation_of(run: RunConfig) -> TokenDataset:
    return TokenDataset(run.stages[-1].data.validation_locations[0])


def test_the_language_model_is_the_start_s_head_on_each_body(tmp_path, start):
    """A body that is the start's own has the start's loss."""
    runs = [learned(tmp_path, start, "random", ("old", "new"), 1)]
    (location,) = runs[0].stages[0].data.validation_locations
    before, after = language_model_losses(open_tasks([runs[0].folder]), Path(location), None)
    assert before != pytest.approx(after, abs=1e-3)


def test_an_ensemble_is_the_mean_of_probabilities(tmp_path, start):
    runs = [learned(tmp_path, start, name, ("old", "new"), seed) for name, seed in (("a", 1), ("b", 2), ("c", 3))]
    found = list(ensemble([run.folder for run in runs]).rows())
    stage = runs[0].stages[-1]
    dataset = TokenDataset(stage.data.validation_locations[0])
    members = [
        torch.tensor(np.stack(logits_of(open_trained(run.folder), stage, dataset))).double().softmax(1) for run in runs
    ]
    mean = torch.stack(members).mean(0)
    for row, shares in zip(found, mean, strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(shares.tolist(), abs=2e-6)
        assert row["predicted"] == stage.objective.labels[int(shares.argmax())]


def test_generated_answers_make_no_ensemble(tmp_path, monkeypatch):
    stage = SimpleNamespace(objective=SimpleNamespace(name="answer"))
    trained = SimpleNamespace(run=SimpleNamespace(stages=(stage,)))
    monkeypatch.setattr("engine.tasks.ensemble.open_learned", lambda _: trained)
    with pytest.raises(ConfigError, match="answers are generated token by token"):
        ensemble([tmp_path])


def test_runs_of_other_tasks_make_no_ensemble(tmp_path, start):
    runs = [learned(tmp_path, start, name, labels, 1) for name, labels in (("a", ("x", "y")), ("b", ("p", "q", "r")))]
    with pytest.raises(ConfigError, match="is a run of classification with labels p, q, r"):
        ensemble([run.folder for run in runs])


def test_a_run_goes_on_from_another_task_with_a_new_head(tmp_path, start):
    before = learned(tmp_path, start, "first", ("old", "new"), 1)
    held = open_trained(before.folder).weights
    (tmp_path / "second").mkdir()
    write_examples(tmp_path / "second", labels=("a", "b", "c"))
    tree = tree_of(tmp_path / "second", start)
    run = resolve_task(tree | {"init_from": {"path": str(before.folder), "head": "new"}}, "task")
    starting = StartingWeights(run)
    for spec in family(run.model).specs(run.model):
        rows = starting.rows(spec, 0, spec.stored_shape[0])
        is_body = spec.name.startswith(BODY)
        expected = held[spec.name] if is_body else initial_value(spec, run.model, run.seed)
        assert torch.equal(rows, expected), spec.name
    with pytest.raises(ConfigError, match="head for classification of 2 labels"):
        resolve_task(tree | {"init_from": str(before.folder), "folder": str(tmp_path / "third")}, "task")


def test_the_command_shows_a_row_for_each_state(tmp_path, start, capsys):
    runs = [learned(tmp_path, start, name, ("old", "new"), seed) for name, seed in (("a", 1), ("b", 2))]
    (shards,) = runs[0].stages[0].data.validation_locations
    folders = [str(run.folder) for run in runs]
    assert main(["tasks", *folders, "--language-model", shards]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["a", "(accuracy)", "b", "(accuracy)", "language-model", "loss"]
    assert rows[0].split()[:3] == ["before", "its", "run"]
    assert [len(row.split()) for row in rows] == [6, 4, 5]  # a row's name, its measures so far, and the loss
    assert main(["tasks", *folders, "--ensemble"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["tasks", str(start / "hf")]) == 2
    # in a process of its own: nothing that is imported there prints beside it
    command = "import sys; from engine.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", command, "tasks", *folders, "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["measures"][1] == [float(number) for number in rows[2].split()[2:4]]
