"""Pseudo-log-likelihood of a text under a model that fills gaps (Salazar et al. 2020, Masked Language Model Scoring,
eq. 1): the sum over its tokens of the log probability of each, all others in sight.

BERT sees `[MASK]` in the place of the token. T5 has no such loss in the paper; here it sees its first sentinel there,
and says behind it, in the decoder, the token: a gap of one token, as span corruption makes them. Either number is of
no use beside a likelihood: tokens see what comes after them.

A text longer than the model's rows is cut into pieces that do not see each other. Each token is a row of its own, so
this costs a forward pass per token.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.errors import ConfigError
from engine.evaluate.likelihood import ROWS
from engine.evaluate.subject import Subject


def pseudo_likelihoods(
    subject: Subject, texts: list[list[int]], done: Callable[[int], None] = lambda count: None
) -> list[float]:
    """Return the pseudo-log-likelihood of each text of token ids.

    Raises:
        ConfigError: the tokenizer has no mask (BERT) or no sentinel (T5).
    """
    gap = _gap(subject)
    head, tail = _frame(subject)
    room = subject.longest - len(head) - len(tail)
    found = []
    for ids in texts:
        total = 0.0
        for first in range(0, len(ids), room):
            piece = ids[first : first + room]
            row = torch.tensor([*head, *piece, *tail])
            places = range(len(head), len(head) + len(piece))
            for start in range(0, len(piece), ROWS):
                total += _filled(subject, row, places[start : start + ROWS], gap)
        found.append(total)
        done(1)
    return found


@torch.inference_mode()
def _filled(subject: Subject, row_T: torch.Tensor, places: range, gap: int) -> float:
    """Return the sum of the log probabilities of the tokens at some places, each hidden in a row of its own."""
    places_B = torch.tensor(list(places))
    expected_B = row_T[places_B]
    rows_BT = row_T.repeat(len(places), 1)
    rows_BT[torch.arange(len(places)), places_B] = gap
    rows_BT = rows_BT.to(subject.device)
    inputs: dict[str, Any] = {"input_ids": rows_BT, "attention_mask": torch.ones_like(rows_BT)}
    at_B = places_B.to(subject.device)
    if subject.kind == "spans":
        # the decoder has said the sentinel, and says next what stands in its place
        said = torch.tensor([[subject.model.config.decoder_start_token_id, gap]], device=subject.device)
        inputs["decoder_input_ids"] = said.repeat(len(places), 1)
        at_B = torch.ones_like(at_B)
    made = subject.model(**inputs)
    logits_BTV = made.logits if "logits" in made else made.prediction_logits  # BertForPreTraining
    logits_BV = logits_BTV[torch.arange(len(places)), at_B].float()
    return float(logits_BV.log_softmax(-1).cpu().gather(1, expected_B[:, None]).double().sum())


def _gap(subject: Subject) -> int:
    """Return the token that stands for a hidden one."""
    known = subject.text.vocabulary
    found = (known.sentinels or (None,))[0] if subject.kind == "spans" else known.mask
    if found is None:
        what = "sentinel (<extra_id_0>)" if subject.kind == "spans" else "mask token"
        raise ConfigError(
            f"the tokenizer of {subject.origin} has no {what}, behind which a token could be hidden",
            "the tokenizer that the model was pretrained with",
            "name it with --tokenizer",
        )
    return found


def _frame(subject: Subject) -> tuple[list[int], list[int]]:
    """Return the special tokens before and behind a text."""
    # tried out: tokenizers know their frame only by making one
    ids, is_special = (
        subject.tokenizer("a", return_special_tokens_mask=True)[key] for key in ("input_ids", "special_tokens_mask")
    )
    head = is_special.index(0) if 0 in is_special else len(ids)
    tail = is_special[::-1].index(0) if 0 in is_special else 0
    return ids[:head], ids[len(ids) - tail :]
