"""Starts of tasks that are gone: a run with checkpoints goes on, as the same run."""

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from engine.config.resume import compare
from engine.config.save import save_run
from engine.errors import CheckpointError, ConfigError
from engine.tasks.resolve import resolve_task
from tests.distributed.runs import write_sentences
from tests.engine.serve.runs import save
from tests.engine.tasks.answer_starts import answer_tree, write_dialogues, write_folder
from tests.engine.tasks.starts import tree_of, write_examples, write_start

HEAD = {"task": "classification", "num_labels": 2}
DISTILS = {"regularization": {"distillation": {"strength": 1.0}}}


def tree(folder: Path, **keys: Any) -> dict[str, Any]:
    """A task from the encoder in the folder; `stage` are keys of its stage."""
    write_examples(folder)
    return tree_of(folder, folder, **keys.pop("stage", {})) | keys


def encoder(folder: Path, case: str) -> dict[str, Any]:
    write_start(folder, task_head=HEAD if case == "kept-head" else None)
    replay = {"replay": {"ratio": 0.25, "source": str(folder / "train")}}
    adapter = {"adapter": {"method": "lora", "rank": 2}, "model": {"dropout": 0.2}}
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "adapter": adapter,
        "kept-head": {"stage": DISTILS},
        "replay": {"stage": DISTILS | replay},
        "head-new": {"init_from": {"path": str(folder / "hf"), "head": "new"}},
    }
    return tree(folder, **cases[case])


def decoder(folder: Path) -> dict[str, Any]:
    """Dialogues, for which the run folder gets a tokenizer of its own."""
    write_sentences(folder, "bpe", 400, "causal")
    write_folder(folder / "hf", "gpt2", folder / "tokenizer", max_positions=96)
    write_dialogues(folder)
    return answer_tree(folder, folder / "hf", {"messages": "messages"})


@pytest.mark.parametrize("case", ["plain", "adapter", "kept-head", "replay", "head-new", "dialogues"])
def test_a_run_with_checkpoints_resolves_as_the_same_run(tmp_path, caplog, case):
    given = decoder(tmp_path) if case == "dialogues" else encoder(tmp_path, case)
    run = resolve_task(deepcopy(given), "task")
    shutil.rmtree(tmp_path / "hf")
    with pytest.raises((ConfigError, CheckpointError), match="hf"):
        resolve_task(deepcopy(given), "task")
    save(run, 2, seed=1)
    save_run(run, run.folder)
    assert compare(run, resolve_task(deepcopy(given), "task")) == []
    assert "the run goes on from its own checkpoints" in caplog.text
    changed = deepcopy(given)
    changed["seed"] = 9
    assert "seed" in {change.key for change in compare(run, resolve_task(changed, "task"))}, "the trainer refuses it"


def test_another_start_that_is_not_there_is_no_start_of_the_run(tmp_path):
    given = encoder(tmp_path, "plain")
    run = resolve_task(deepcopy(given), "task")
    save(run, 2, seed=1)
    save_run(run, run.folder)
    with pytest.raises(ConfigError, match=rf"elsewhere.*which has checkpoints, started from {tmp_path / 'hf'}"):
        resolve_task(deepcopy(given) | {"init_from": str(tmp_path / "elsewhere")}, "task")
