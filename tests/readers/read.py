"""Reads exported folders with whatever transformers is installed: `python read.py FOLDER`; exits 1 if any differs.

Imports nothing of this repository, so that it runs beside an old transformers as a user of the folder would: the Auto
classes, no options. `tests.readers.write` made the folders and what is expected of them.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

TOLERANCE = 40**0.5 * 256**0.5 * 2**-24
"""Of the largest logit; derived in tests/engine/models/parity.py. T5's is four times as large (test_t5.py)."""


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    cases = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
    print(f"transformers {transformers.__version__} reads {len(cases)} folders")
    failed = 0
    for case in cases:
        problems = list(read(case))
        failed += bool(problems)
        print(f"{'FAILED' if problems else 'passed'} {case.name}", flush=True)
        for problem in problems:
            print(f"    {problem}")
    print(f"{len(cases) - failed} passed, {failed} failed")
    sys.exit(failed > 0 or not cases)


def read(case: Path) -> Iterator[str]:
    """Everything that is wrong with a folder; an exception is one such thing."""
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    tensors = load_file(case / "expected.safetensors")
    for check in (check_files, check_tokens, check_numbers, check_use):
        try:
            yield from check(case / "model", expected, tensors)
        except Exception as error:
            yield f"{check.__name__}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def check_files(folder: Path, expected: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    for path in folder.iterdir():
        if not path.stat().st_mode & 0o044:
            yield f"{path.name} can be read by its owner alone"
    card = (folder / "README.md").read_text(encoding="utf-8")
    yield from differs("first lines of the card", card[:4], "---\n")


def check_tokens(folder: Path, expected: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = expected["texts"]
    for text, ids, framed in zip(texts, expected["ids"], expected["framed"], strict=True):
        yield from differs(f"ids of {text!r}", tokenizer(text, add_special_tokens=False)["input_ids"], ids)
        yield from differs(f"framed ids of {text!r}", tokenizer(text)["input_ids"], framed)
    pair = tokenizer(texts[0], texts[1])
    if expected["pair"] is not None:
        yield from differs("ids of a pair", pair["input_ids"], expected["pair"])
    yield from differs("presence of token types", "token_type_ids" in pair, expected["token_types"])
    yield from differs("model_max_length", tokenizer.model_max_length, expected["max_length"])
    cut = tokenizer(" ".join(texts) * 50, truncation=True)["input_ids"]
    yield from differs("length of a truncated text", len(cut), expected["max_length"])
    if expected["end"] is not None:
        yield from differs("end token", tokenizer.eos_token_id, expected["end"])


def check_numbers(folder: Path, expected: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    model = load_model(folder, expected)
    yield from differs("dtype", str(model.dtype), f"torch.{expected['dtype']}")
    inputs = {name: tensors[name] for name in ("input_ids", "decoder_input_ids", "labels") if name in tensors}
    with torch.no_grad():
        made = model(**inputs)
    tolerance = TOLERANCE * (4 if expected["kind"] == "Seq2SeqLM" else 1)
    yield from far("logits", made.logits, tensors["logits"], tolerance)
    yield from far("loss", made.loss, tensors["loss"], tolerance)
    if "pair_logits" in tensors:
        whole = transformers.AutoModelForPreTraining.from_pretrained(folder).eval()
        with torch.no_grad():
            found = whole(tensors["input_ids"]).seq_relationship_logits
        yield from far("pair logits", found, tensors["pair_logits"], tolerance)


def check_use(folder: Path, expected: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    """A user's first lines: a pair that goes through the model, and a greedy continuation."""
    model, tokenizer = load_model(folder, expected), transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(expected["texts"][0], expected["texts"][1], return_tensors="pt", truncation=True)
    if expected["kind"] == "Seq2SeqLM":
        encoded["decoder_input_ids"] = encoded["input_ids"]
    with torch.no_grad():
        if not model(**encoded).logits.isfinite().all():
            yield "logits of a pair are not finite"
    if "greedy" in expected:
        prompt = tokenizer(expected["prompt"], return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=expected["num_new_tokens"], do_sample=False)[0].tolist()
        first = 1 if expected["kind"] == "Seq2SeqLM" else prompt["input_ids"].shape[1]
        yield from differs("greedy tokens", ids[first:], expected["greedy"])


def load_model(folder: Path, expected: dict[str, Any]) -> Any:
    return getattr(transformers, f"AutoModelFor{expected['kind']}").from_pretrained(folder).eval()


def differs(what: str, found: Any, expected: Any) -> Iterator[str]:
    if found != expected:
        yield f"{what}: {shown(found)}, expected {shown(expected)}"


def shown(value: Any) -> str:
    text = str(value)
    return text if len(text) < 120 else f"{text[:120]}..."


def far(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> Iterator[str]:
    distance, size = (found - expected).abs().max().item(), expected.abs().max().item()
    if not distance <= tolerance * size:  # so that NaN fails too
        yield f"{what}: off by {distance:.2e}, the largest is {size:.2e}"


if __name__ == "__main__":
    main()
