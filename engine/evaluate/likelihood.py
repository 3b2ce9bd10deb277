"""Log likelihood of tokens under a causal model, exact: each token once, behind as much text as the model takes.

A text longer than the model's positions is cut into windows as lm-evaluation-harness does
(`lm_eval.utils.get_rolling_token_windows` with `context_len=1`), so that both agree on every text: windows follow one
another with one token of overlap, and the last one is moved back so far that it is full. The first token stands behind
the token that begins a text (the tokenizer's `bos_token`, else the end of text).

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from engine.evaluate.subject import Subject

ROWS = 16
"""Rows of a forward pass."""


class Window(NamedTuple):
    """A row of tokens, of which the last `num_scored` are measured."""

    ids: list[int]
    num_scored: int


def windows(ids: list[int], begin: int, longest: int) -> Iterator[Window]:
    """Yield the windows of a text for a model that takes `longest` tokens."""
    row = [begin, *ids]
    scored = 0
    while scored < len(ids):
        # 10 tokens, of which a model takes 4: scored 4, 4 and 2, from rows that end behind tokens 4, 8 and 10; the
        # model reads the row without its last token, so a row has 5
        end = min(scored + longest, len(ids))
        yield Window(row[max(0, end - longest) : end + 1], end - scored)
        scored = end


def log_likelihoods(subject: Subject, rows: Iterable[Window]) -> list[float]:
    """Return the natural logarithm of the probability of each row's measured tokens together, in the rows' order."""
    given = list(rows)
    found = [0.0] * len(given)
    # long rows first: rows of about one length are padded least, and memory runs out at once or never
    order = sorted(range(len(given)), key=lambda number: -len(given[number].ids))
    for first in range(0, len(order), ROWS):
        batch = order[first : first + ROWS]
        for number, value in zip(batch, _scores(subject, [given[number] for number in batch]), strict=True):
            found[number] = value
    return found


@torch.inference_mode()
def _scores(subject: Subject, rows: list[Window]) -> list[float]:
    length = max(len(row.ids) for row in rows) - 1
    # Padding is on the right, where no token of a causal model sees it: any id will do.
    ids_BT = torch.zeros(len(rows), length + 1, dtype=torch.long)
    scored_BT = torch.zeros(len(rows), length, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.ids)] = torch.tensor(row.ids)
        scored_BT[b, len(row.ids) - 1 - row.num_scored : len(row.ids) - 1] = True
    ids_BT = ids_BT.to(subject.device)
    logits_BTV = subject.model(input_ids=ids_BT[:, :-1], use_cache=False).logits.float()
    logs_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1).double().cpu()
    # not a product with the mask: a padded token may have the logarithm -inf
    return logs_BT.masked_fill(~scored_BT, 0.0).sum(1).tolist()


def begin_of(subject: Subject) -> int:
    """Return the token behind which a text begins: as lm-evaluation-harness, `bos_token`, else the end of text."""
    known = subject.tokenizer.bos_token_id
    return subject.text.eos_id if known is None else known


def text_likelihoods(
    subject: Subject, texts: list[list[int]], done: Callable[[int], None] = lambda count: None
) -> list[float]:
    """Return the log likelihood of each text of token ids; `done` is told of each group of texts that is through."""
    begin, longest = begin_of(subject), subject.longest
    found: list[float] = []
    for first in range(0, len(texts), 4 * ROWS):
        group = texts[first : first + 4 * ROWS]
        rows = [(number, row) for number, ids in enumerate(group) for row in windows(ids, begin, longest)]
        totals = [0.0] * len(group)
        scores = log_likelihoods(subject, (row for _, row in rows))
        for (number, _), value in zip(rows, scores, strict=True):
            totals[number] += value
        found += totals
        done(len(group))
    return found
