"""`make demo-tasks`: reviews by a rule, an encoder that is pretrained on them, a classifier from it, its evaluation.

Everything is done by the public command; this file says in which order, and compares what it sees with what it expects.
It works in `.demo-tasks/` of the checkout and starts afresh each time.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

from engine.errors import EXIT_DONE, PalimpsestError
from tools.demo.commands import Commands, DemoFailed
from tools.demo.reviews import write_reviews

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(".demo-tasks")
REVIEWS = {"text": 4000, "train": 4000, "validation": 200, "test": 200}
"""Number of reviews: of the encoder's text, and of the labelled sets."""
LEAST_ACCURACY = 0.8
"""Accuracy on the test set that the classifier has to come to; the commoner label has about half of it."""
EXPLAINED = "The film was not very good. Its end is dull. Its sound seems rather warm."


def run(commands: Commands) -> None:
    """Go through the demonstration. Raises `DemoFailed` where a command fails, or the classifier has not learned."""
    _say("text: reviews by a rule")
    write_reviews(WORK / "reviews", REVIEWS)
    print((WORK / "reviews" / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    _say("an encoder of our own: tokenizer, shards, pretraining")
    text, tokenizer = str(WORK / "reviews" / "text.jsonl"), str(WORK / "tokenizer")
    purpose = ("--kind", "wordpiece", "--purpose", "masked", "--vocab-size", "320")
    commands.run("tokenizer", text, *purpose, "--output", tokenizer)
    commands.run("prepare", text, "--tokenizer", tokenizer, "--output", str(WORK / "tokens"))
    commands.run("train", "configs/demo/encoder.yaml")
    _say("a classifier from it: early stopping, measures, the best checkpoint")
    commands.run("finetune", "configs/demo/sentiment.yaml")
    _say("evaluation on a test set, and an explanation")
    test = f"test={WORK / 'reviews' / 'test.jsonl'}"
    report = ("--output", str(WORK / "report"), "--explain", EXPLAINED)
    commands.run("evaluate", str(WORK / "sentiment" / "best"), "--set", test, "--faults", *report)
    _check(commands)


def _check(commands: Commands) -> None:
    """Compare the classifier's answers on the test set with the rule's, by transformers alone."""
    from transformers import pipeline

    rows = [json.loads(line) for line in (WORK / "reviews" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    classify = pipeline("text-classification", str(WORK / "sentiment" / "huggingface"))
    found = [answer["label"] for answer in classify([row["text"] for row in rows])]
    accuracy = sum(label == row["label"] for label, row in zip(found, rows, strict=True)) / len(rows)
    if accuracy < LEAST_ACCURACY:
        raise DemoFailed(
            f"the classifier is right in {accuracy:.1%} of the test reviews",
            f"{LEAST_ACCURACY:.0%} or more",
            f"read the logs in {commands.log_folder}",
        )
    print(f"transformers' pipeline is right in {accuracy:.1%} of {len(rows)} reviews that were never seen")
    pictures = ", ".join(str(WORK / "sentiment" / name) for name in ("learning.png", "confusion.png"))
    print(f"look at: {WORK / 'report' / 'evaluation.html'}, {pictures}")


def _say(title: str) -> None:
    print(f"\n== {title}", flush=True)


def main() -> int:
    """Run the demonstration in the checkout; return the exit code."""
    os.chdir(ROOT)
    shutil.rmtree(WORK, ignore_errors=True)
    (WORK / "logs").mkdir(parents=True)
    begin = time.monotonic()
    try:
        run(Commands(WORK / "logs"))
    except PalimpsestError as error:
        print(f"demo-tasks: {error}", file=sys.stderr)
        return error.exit_code
    print(f"done in {time.monotonic() - begin:.0f} s")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
