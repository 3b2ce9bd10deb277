"""The reviews of `make demo-tasks` follow their rule."""

import json
import random
import re
from itertools import islice

from tools.demo.reviews import BLAME, NEGATIONS, NEGATIVE, POSITIVE, PRAISE, unlike_reviews, write_reviews


def said(sentence: str) -> int:
    words = re.findall(r"\w+", sentence.lower())
    turned = bool({*words} & {*NEGATIONS})
    return (1 if words[-1] in PRAISE else -1 if words[-1] in BLAME else 0) * (-1 if turned else 1)


def test_a_label_is_what_most_sentences_say():
    found = list(islice(unlike_reviews(random.Random(1)), 500))
    for text, label in found:
        votes = [said(sentence) for sentence in text.rstrip(".").split(". ")]
        assert 0 not in votes
        assert label == (POSITIVE if sum(votes) > 0 else NEGATIVE)
    assert 0.4 < sum(label == POSITIVE for _, label in found) / len(found) < 0.6


def test_parts_share_no_review(tmp_path):
    write_reviews(tmp_path, {"train": 300, "test": 100})
    parts = [[json.loads(line)["text"] for line in (tmp_path / f"{part}.jsonl").open()] for part in ("train", "test")]
    assert [len(part) for part in parts] == [300, 100]
    assert not {*parts[0]} & {*parts[1]}
