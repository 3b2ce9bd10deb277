"""Greedy answers to many prompts at once, through transformers' `generate`.

Prompts and answers are tokens: what a run was trained on is what its model is asked. An answer is the one that the
prompt would get alone, but for the rounding of a sum over padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from engine.serve.generate import pad_id, without_text
from engine.serve.language_model import LanguageModel, caches

ROWS = 32
"""Prompts that are answered together."""


def answer(language_model: LanguageModel, prompts: Sequence[np.ndarray], max_new_tokens: int) -> list[np.ndarray]:
    """Return the tokens of each prompt's greedy continuation, its end of text included if it came to one.

    A prompt (n,) int64 that leaves less room among the model's positions than `max_new_tokens` gets as many tokens as
    there is room for, and at least one.
    """
    model: Any = language_model.model
    # T5's relative positions have no limit
    limit = getattr(model.config, "max_position_embeddings", None)
    limit = limit if limit is None else limit - language_model.virtual_tokens
    room = [max_new_tokens if limit is None else max(1, min(max_new_tokens, limit - len(one))) for one in prompts]
    # prompts of one length side by side, so that little is padded; rows of one call have one limit
    order = sorted(range(len(prompts)), key=lambda number: (room[number], len(prompts[number])))
    found: dict[int, np.ndarray] = {}

    def together(number: int) -> tuple[int, int]:
        # padding between virtual tokens and a text would move them apart: peft counts the positions of both through
        return room[number], len(prompts[number]) if language_model.virtual_tokens else 0

    for (most, _), group in groupby(order, key=together):
        numbers = list(group)
        for first in range(0, len(numbers), ROWS):
            rows = numbers[first : first + ROWS]
            answers = _answer_together(language_model, [prompts[number] for number in rows], most)
            found |= dict(zip(rows, answers, strict=True))
    return [found[number] for number in range(len(prompts))]


def _answer_together(
    language_model: LanguageModel, prompts: Sequence[np.ndarray], max_new_tokens: int
) -> list[np.ndarray]:
    model: Any = language_model.model
    tokenizer = language_model.tokenizer
    is_encoder_decoder = model.config.is_encoder_decoder
    padding = pad_id(tokenizer, model)
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), width), 0 if padding is None else padding, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        # a decoder continues behind the last token, so its padding stands before the first one
        real = slice(0, len(prompt)) if is_encoder_decoder else slice(width - len(prompt), width)
        ids_BT[b, real], mask_BT[b, real] = torch.from_numpy(prompt.astype(np.int64)), 1
    with torch.no_grad():
        made_BT = model.generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=padding,
            suppress_tokens=without_text(tokenizer, model.config.vocab_size),
            use_cache=caches(model.config, language_model.virtual_tokens),
        )
    # a decoder's rows repeat the prompt; T5's begin with the token that starts the decoder
    made_BT = made_BT[:, 1 if is_encoder_decoder else width :].cpu().numpy()
    return [_up_to_end(row, model.generation_config.eos_token_id) for row in made_BT]


def _up_to_end(row: np.ndarray, eos: int | list[int] | None) -> np.ndarray:
    """Return a row (n,) up to its first end of text; what stands behind it is padding."""
    ends = np.flatnonzero(np.isin(row, [] if eos is None else eos))
    return row[: ends[0] + 1] if ends.size else row
