"""Starts of conditional generation for tests: tiny pretrained GPTs and T5s, and files of prompts and answers."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.huggingface import to_huggingface
from engine.config.schema.model import ModelConfig, make_model
from engine.data.tokenizer.folder import load_tokenizer
from tests.engine.models.tiny import FORMS, T5_FORMS, random_weights

WORDS = ("ink", "monk", "page", "codex", "prayer", "margin")


def write_folder(folder: Path, form: str, tokenizer: Path, **sizes: Any) -> ModelConfig:
    """A Hugging Face folder of a tiny model with random weights, and a tokenizer."""
    loaded = load_tokenizer(tokenizer)
    fitting = {"vocab_size": loaded.vocab_size, "vocab_multiple": 8, "max_positions": 48} | sizes
    model = make_model(**((FORMS | T5_FORMS)[form].model_dump(exclude_unset=True) | fitting))
    padding = loaded.vocabulary.padding
    config, state = to_huggingface(model, random_weights(model, seed=2), padding)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = padding
    kind = getattr(transformers, form_of(model).architecture)
    with torch.random.fork_rng():
        kind.from_pretrained(None, config=config, state_dict=state).save_pretrained(folder)
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return model


def write_pairs(folder: Path, train: int = 20, validation: int = 4) -> None:
    """Prompts of one to three words, whose answer is the last of them twice."""
    for part, count in (("train", train), ("validation", validation)):
        with (folder / f"{part}.jsonl").open("w") as file:
            for number in range(count):
                words = [WORDS[(number + i * i) % 6] for i in range(number % 3 + 1)]
                record = {"prompt": f"{' '.join(words)} =>", "answer": f" {words[-1]} {words[-1]}"}
                file.write(json.dumps(record) + "\n")


def write_dialogues(folder: Path, train: int = 20, validation: int = 4) -> None:
    """Dialogues of one to three rounds."""
    for part, count in (("train", train), ("validation", validation)):
        with (folder / f"{part}.jsonl").open("w") as file:
            for number in range(count):
                messages = []
                for i in range(number % 3 + 1):
                    word = WORDS[(number + i) % 6]
                    messages += [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]
                file.write(json.dumps({"messages": messages}) + "\n")


def answer_tree(folder: Path, init_from: Path, columns: Any = None, **stage: Any) -> dict[str, Any]:
    data = {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")}
    data |= {} if columns is None else {"columns": columns}
    return {
        "folder": str(folder / "run"),
        "init_from": str(init_from),
        "precision": {"dtype": "fp32"},
        "stages": [{"objective": "answer", "data": data | stage.pop("data", {})} | stage],
    }
