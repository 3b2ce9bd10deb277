"""Starts of tasks for tests: a tiny pretrained model, files of examples, task files."""

import json
from typing import Any

import transformers

from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.huggingface import to_huggingface
from engine.data.tokenizer.folder import load_tokenizer
from tests.distributed.runs import write_sentences
from tests.engine.models.tiny import random_weights, tiny


def write_start(folder, form="bert", **changes):
    """A tokenizer, and in `hf` a Hugging Face folder of a tiny model with it."""
    write_sentences(folder, "wordpiece", 260, "masked")
    loaded = load_tokenizer(folder / "tokenizer")
    model = tiny(form, vocab_size=loaded.vocab_size, vocab_multiple=8, max_positions=40, **changes)
    config, state = to_huggingface(model, random_weights(model), loaded.vocabulary.padding)
    kind = getattr(transformers, form_of(model).architecture)
    kind.from_pretrained(None, config=config, state_dict=state).save_pretrained(folder / "hf")
    for path in (folder / "tokenizer").iterdir():
        (folder / "hf" / path.name).write_bytes(path.read_bytes())
    return folder


def write_examples(folder, count=20, labels=("old", "new")):
    for part, number in (("train", count), ("validation", 4)):
        rows = [{"text": "the ink fades " * (n % 3 + 1), "label": labels[n % len(labels)]} for n in range(number)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tree_of(folder, start, objective: Any = "classification", **stage):
    data = {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")}
    return {
        "folder": str(folder / "run"),
        "init_from": str(start / "hf"),
        "precision": {"dtype": "fp32"},
        "stages": [{"objective": objective, "data": data} | stage],
    }
