"""Models under evaluation: tiny runs of random weights, opened as `evaluate` opens them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config.load import parse_run
from engine.corpus.tokenizer_training import train_tokenizer
from engine.evaluate.subject import Subject, open_subject
from engine.serve.sample_text import TEXT
from tests.engine.models.tiny import BERT_FORMS, FORMS
from tests.engine.serve.runs import run_config, save

SENTENCES = [
    "A palimpsest is a page whose text was scraped off.",
    "刮去旧文，写上新文。",  # noqa: RUF001
    "x",
    "The ink fades, and the older words come through again. " * 8,
]
"""Documents of several lengths, the last one longer than the positions of a tiny model."""


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT], folder, "bpe", 400)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, tokenizer) -> Path:
    """Folder of a run of a tiny GPT-2."""
    config = run_config(tmp_path_factory.mktemp("runs") / "gpt2", "gpt2", tokenizer)
    save(config, step=3, seed=3)
    return config.folder


@pytest.fixture(scope="session")
def causal(run) -> Subject:
    return open_subject(run)


LABELS = ("bad", "fair", "good")
TEXTS = [
    "the ink fades",
    "A palimpsest is a page; one thrifty monk hides older lines.",
    "x",
    "was read again and again",
]


def classifier_run(folder: Path, tokenizer: Path, form: str, task: str = "classification", seed: int = 2) -> Path:
    """Folder of a run that was fine-tuned, by the look of it: random weights with a task's head."""
    num_labels = len(LABELS) if task == "classification" else 1
    head = {"task": task, "num_labels": num_labels}
    model = (FORMS | BERT_FORMS)[form].model_dump(mode="json") | {"task_head": head, "dropout": 0.0}
    objective = {"name": task} | ({"labels": list(LABELS)} if task == "classification" else {})
    stage = {
        "data": {"train": "t"},
        "sequence_length": 32,
        "global_batch_size": 1,
        "duration": {"steps": 9},
        "objective": objective,
    }
    tree = {"folder": str(folder), "tokenizer": str(tokenizer), "model": model, "stages": [stage]}
    config = parse_run(tree, "test")
    save(config, step=1, seed=seed)
    return config.folder


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wordpiece")
    train_tokenizer([TEXT, *TEXTS], folder, "wordpiece", 260, "masked")
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, wordpiece) -> Subject:
    return open_subject(classifier_run(tmp_path_factory.mktemp("bert") / "run", wordpiece, "bert"))


def write_set(path: Path, pairs: bool = False) -> str:
    rows = [{"text": text, "label": LABELS[number % 3]} for number, text in enumerate(TEXTS * 3)]
    if pairs:
        rows = [row | {"pair": TEXTS[number % 4]} for number, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
