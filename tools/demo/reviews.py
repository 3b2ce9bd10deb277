"""Reviews of things by a rule, for the demonstration of tasks: what each says is known, so that it needs no data.

A review is two to four sentences of the form SUBJECT VERB [NEGATION] [DEGREE] WORD. A word praises or blames, and a
negation turns it around. The label is what most of its sentences say; reviews with as much praise as blame are drawn
again. So a model has to read negations, and to count. It is no measure of anything but this.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

THINGS = ("film", "book", "hotel", "kettle", "train", "soup", "lamp", "garden", "song", "museum")
PARTS = ("colour", "price", "beginning", "end", "size", "smell", "service", "sound", "design", "weight")
PRAISE = ("good", "lovely", "bright", "clever", "fresh", "gentle", "honest", "quiet", "warm", "useful", "splendid")
BLAME = ("bad", "dull", "dirty", "broken", "cold", "loud", "stale", "slow", "ugly", "useless", "boring")
VERBS = ("is", "was", "seems", "felt")
DEGREES = ("", "very", "quite", "really", "rather")
NEGATIONS = ("not", "never")
NEGATIVE, POSITIVE = "negative", "positive"


def write_reviews(folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Write `PART.jsonl` with so many labelled reviews of each part, none of them twice. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    reviews = unlike_reviews(random.Random(seed))
    for part, count in counts.items():
        rows = (dict(zip(("text", "label"), next(reviews), strict=True)) for _ in range(count))
        (folder / f"{part}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def unlike_reviews(draw: random.Random) -> Iterator[tuple[str, str]]:
    """Yield text and label of one review after the other, none of them twice."""
    seen: set[str] = set()
    while True:
        text, praise = _review(draw)
        if praise and text not in seen:
            seen.add(text)
            yield text, POSITIVE if praise > 0 else NEGATIVE


def _review(draw: random.Random) -> tuple[str, int]:
    """Return a review, and how many more of its sentences praise than blame."""
    thing, praise, sentences = draw.choice(THINGS), 0, []
    for number in range(draw.randint(2, 4)):
        subject = f"the {thing}" if number == 0 else f"its {draw.choice(PARTS)}"
        is_praise, is_negated = draw.random() < 0.5, draw.random() < 0.25
        words = [subject, draw.choice(VERBS), draw.choice(NEGATIONS) if is_negated else "", draw.choice(DEGREES)]
        words.append(draw.choice(PRAISE if is_praise else BLAME))
        praise += 1 if is_praise != is_negated else -1
        sentences.append(" ".join(filter(None, words)).capitalize() + ".")
    return " ".join(sentences), praise
