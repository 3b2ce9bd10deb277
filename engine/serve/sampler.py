"""Documents that a causal model samples from itself, in units of a fixed number of documents.

A unit is a function of the model, the seed and its number alone: token t of document d is drawn by one uniform number
of the stream (seed, d), and a unit is always computed as one batch, so that not even rounding depends on who computes
it or on what was computed before.

Under `attention: row` a document begins as the model goes on behind an end of text. Under `attention: document` no
model ever predicts the first token of a document, so it is drawn from the tokens that a first unit, begun with tokens
drawn uniformly, has sampled. A document that reaches the longest length is cut there and gets no end of text: one that
the model did not predict would teach it a wrong end.

Legend: B documents of a unit, T tokens of a document, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

DOCUMENTS = 32
"""Documents of a unit."""
PURPOSE_SYNTHETIC = int.from_bytes(b"synthetic")
PURPOSE_STARTS = int.from_bytes(b"starts")


@dataclass(frozen=True)
class Sampler:
    """A model, and how documents are drawn from it."""

    model: Any
    """One of transformers' causal models, in evaluation mode."""
    text_ids: np.ndarray
    """Tokens that may be drawn, (n,) int64 rising, the end of text among them."""
    eos_id: int
    length: int
    """Tokens of a document at most."""
    temperature: float
    seed: int
    starts: np.ndarray | None = None
    """Tokens from which a document's first one is drawn, (n,); None: the model predicts it behind an end of text."""

    def unit(self, number: int) -> list[np.ndarray]:
        """Return the documents of a unit, each (T,) int64."""
        documents = range(number * DOCUMENTS, (number + 1) * DOCUMENTS)
        uniform_BT = np.stack([self._uniform(PURPOSE_SYNTHETIC, document) for document in documents])
        if self.starts is None:
            first_B = np.full(DOCUMENTS, self.eos_id)
            return self._continued(first_B, uniform_BT, is_text=False)
        first_B = self.starts[(uniform_BT[:, 0] * self.starts.size).astype(np.int64)]
        return self._continued(first_B, uniform_BT[:, 1:], is_text=True)

    def sampled_starts(self) -> np.ndarray:
        """Return the tokens of a unit whose documents begin with tokens drawn uniformly, without these and ends."""
        uniform_BT = np.stack([self._uniform(PURPOSE_STARTS, document) for document in range(DOCUMENTS)])
        text = self.text_ids[self.text_ids != self.eos_id]
        first_B = text[(uniform_BT[:, 0] * text.size).astype(np.int64)]
        found = np.concatenate([row[1:] for row in self._continued(first_B, uniform_BT[:, 1:], is_text=True)])
        found = found[found != self.eos_id]
        return found if found.size else first_B  # a model that has learned nothing may end each document at once

    def _uniform(self, purpose: int, document: int) -> np.ndarray:
        """Return the numbers of a document, (T,) in [0, 1)."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, purpose, document])).random(self.length)

    @torch.inference_mode()
    def _continued(self, first_B: np.ndarray, uniform_BT: np.ndarray, is_text: bool) -> list[np.ndarray]:
        """Return documents that go on behind a token each, which is their first one where `is_text`."""
        from transformers import DynamicCache  # an import of seconds

        rows: list[list[int]] = [[int(token)] if is_text else [] for token in first_B]
        open_B, last_B = np.ones(DOCUMENTS, bool), first_B
        # one that the model fills in place; its name has changed since transformers 5.0
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        cache = {name: DynamicCache(config=self.model.config)}
        for t in range(uniform_BT.shape[1]):
            given = torch.as_tensor(last_B, device=self.model.device)[:, None]
            made = self.model(input_ids=given, use_cache=True, **cache)
            last_B = self._draw(made.logits[:, -1].double().cpu().numpy(), uniform_BT[:, t])
            for b in np.flatnonzero(open_B):
                rows[b].append(int(last_B[b]))
            open_B &= last_B != self.eos_id
            if not open_B.any():
                break
        return [np.array(row, np.int64) for row in rows]

    def _draw(self, logits_BV: np.ndarray, uniform_B: np.ndarray) -> np.ndarray:
        """Return a token for each row: the first whose cumulative probability exceeds the row's number, (B,)."""
        scaled = logits_BV[:, self.text_ids] / self.temperature
        cumulative = np.cumsum(np.exp(scaled - scaled.max(axis=1, keepdims=True)), axis=1)
        chosen = (cumulative <= (uniform_B * cumulative[:, -1])[:, None]).sum(axis=1)
        return self.text_ids[np.minimum(chosen, self.text_ids.size - 1)]
