"""Explanations of a classifier's predictions: integrated gradients by captum (Sundararajan et al. 2017, Axiomatic
Attribution for Deep Networks, eq. 1).

The path leads from a baseline, whose text is all padding (or the end of text), to the example, in the space of the
embedded tokens; special tokens stay. A token's attribution is the sum over its embedding's dimensions. Completeness
(their proposition 1): the attributions of all tokens sum to the difference of the explained logit between example and
baseline. The integral is a sum over steps; steps are doubled until the sum is that difference within `TOLERANCE`.

Legend: B steps at once, T tokens of a row, D width, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.errors import ConfigError
from engine.evaluate.labelled import Row, inputs_of, rows_at_once
from engine.evaluate.subject import Subject, require_kind
from engine.extras import need

TOLERANCE = 0.02
"""Largest distance of the attributions' sum from the difference of the logits, as a share of it (or of 1, if that is
more)."""
FIRST_STEPS, MOST_STEPS = 32, 1024
"""Steps of the integral (Gauss-Legendre) that are tried first, and at the most."""
_AT_ONCE = 64


@dataclass(frozen=True)
class Explanation:
    """Attributions of one prediction to the tokens of its text."""

    text: str
    pieces: list[tuple[str, float]]
    """Each token's part of the text and its attribution, in order; special tokens have a name in brackets."""
    label: str
    """Label whose logit is explained: the predicted one."""
    probability: float | None
    """None of a regression."""
    place: str | None
    """Word whose label is explained, of an entity."""
    difference: float
    """Logit of the example less that of the baseline."""
    total: float
    """Sum of the attributions."""
    num_steps: int

    @property
    def is_complete(self) -> bool:
        """True if the sum is the difference within the tolerance."""
        return abs(self.total - self.difference) <= TOLERANCE * max(1.0, abs(self.difference))

    def table(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "text": self.text,
            "label": self.label,
            "probability": self.probability,
            "place": self.place,
            "pieces": [[piece, value] for piece, value in self.pieces],
            "difference": self.difference,
            "sum": self.total,
            "steps": self.num_steps,
            "complete": self.is_complete,
        }


def require_captum() -> None:
    """Raise `EnvironmentProblem` where the package is missing."""
    need("captum", "--explain", "evaluate")


def require_explained(subject: Subject) -> None:
    """Raise `ConfigError` where a model predicts no labels."""
    require_kind(subject, ("classes", "tokens"), "--explain", "a model fine-tuned for classification or entities")


def explain(subject: Subject, text: str, pair: str | None = None) -> list[Explanation]:
    """Explain the predicted label of a text, or of a model of entities that of each word with a label but `O`.

    Raises:
        ConfigError: the model predicts no labels, or the text has no token.
        EnvironmentProblem: captum is missing.
    """
    require_captum()
    require_explained(subject)
    framing = subject.framing
    assert framing is not None
    (found,) = framing.encodings([text], None if pair is None else [pair], subject.longest)
    if all(found.special_tokens_mask):
        raise ConfigError(f"--explain {text!r:.60}", "a text with a token", "give other text")
    types = found.type_ids
    row = Row(np.array(found.ids), types.index(1) if 1 in types else None)
    inputs = inputs_of(subject, [row])
    with torch.inference_mode():
        logits = subject.model(**inputs).logits[0].float()
    if subject.kind == "classes":
        return [_explained(subject, text, pair, found, inputs, logits, None)]
    names = subject.model.config.id2label
    entities = [place for place, label in enumerate(logits.argmax(-1).tolist()) if names[label] != "O"]
    # the first token of a word has its label
    words = found.word_ids
    places = [place for place in entities if words[place] is not None and words[place] != words[place - 1]]
    return [_explained(subject, text, pair, found, inputs, logits[place], place) for place in places]


def _explained(
    subject: Subject,
    text: str,
    pair: str | None,
    found: Any,
    inputs: dict[str, torch.Tensor],
    logits_C: torch.Tensor,
    place: int | None,
) -> Explanation:
    """Explain the likeliest label of the logits, (C,), which are those of token `place`, or of the whole row."""
    config = subject.model.config
    label = int(logits_C.argmax())
    is_special_T = torch.tensor(found.special_tokens_mask, dtype=torch.bool, device=subject.device)
    values_T, difference, num_steps = attributions(subject, inputs, is_special_T, label, place)
    pieces = _pieces(found, (text, pair), values_T.tolist())
    return Explanation(
        text=text if pair is None else f"{text} | {pair}",
        pieces=pieces,
        label=str(config.id2label[label]),
        probability=None if config.num_labels == 1 else float(logits_C.softmax(-1)[label]),
        place=None if place is None else text[slice(*found.offsets[place])].strip(),
        difference=difference,
        total=float(values_T.sum()),
        num_steps=num_steps,
    )


def _pieces(found: Any, texts: tuple[str, str | None], values: list[float]) -> list[tuple[str, float]]:
    """Return each token's part of its text, with the blanks before it, and its attribution.

    Tokens that are bytes of one character are one piece.
    """
    pieces: list[tuple[str, float]] = []
    ends = [0, 0]
    for number, value in enumerate(values):
        if found.special_tokens_mask[number]:
            pieces.append((f"[{found.tokens[number].strip('[]')}]", value))
            continue
        sequence = found.sequence_ids[number] or 0
        _, end = found.offsets[number]
        piece = (texts[sequence] or "")[ends[sequence] : end]
        ends[sequence] = max(end, ends[sequence])
        if piece or not pieces:
            pieces.append((piece, value))
        else:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + value)
    return pieces


def attributions(
    subject: Subject, inputs: dict[str, torch.Tensor], is_special_T: torch.Tensor, label: int, place: int | None
) -> tuple[torch.Tensor, float, int]:
    """Return the attributions of one row, (T,) fp64, the difference of the logits, and the number of steps.

    `label` is that of the logit, `place` the token where a model of entities has it (None: it has one for the row).
    """
    gradients = need("captum.attr", "--explain", "evaluate").IntegratedGradients
    others = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    embed = subject.model.get_input_embeddings()
    baseline_BT = inputs["input_ids"].masked_fill(~is_special_T, _baseline_id(subject))
    with torch.no_grad():
        whole_BTD, baseline_BTD = embed(inputs["input_ids"]), embed(baseline_BT)

    def logit(embedded_BTD: torch.Tensor) -> torch.Tensor:
        """Logit of the label for rows of one example, (B,)."""
        rows = len(embedded_BTD)
        known = {name: value.expand(rows, *value.shape[1:]) for name, value in others.items()}
        mask_BT = torch.ones(embedded_BTD.shape[:2], dtype=torch.long, device=embedded_BTD.device)
        logits = subject.model(inputs_embeds=embedded_BTD, attention_mask=mask_BT, **known).logits
        return logits[:, label] if place is None else logits[:, place, label]

    with torch.no_grad():
        difference = float(logit(whole_BTD)[0].double() - logit(baseline_BTD)[0].double())
    num_steps = FIRST_STEPS
    while True:
        found_BTD = gradients(logit).attribute(
            whole_BTD, baselines=baseline_BTD, n_steps=num_steps, internal_batch_size=rows_at_once(subject, _AT_ONCE)
        )
        values_T = found_BTD[0].double().sum(-1).cpu()
        is_near = abs(float(values_T.sum()) - difference) <= TOLERANCE * max(1.0, abs(difference))
        if is_near or num_steps >= MOST_STEPS:
            return values_T, difference, num_steps
        num_steps *= 2


def _baseline_id(subject: Subject) -> int:
    """Return the token of the baseline's text: the padding token, as captum's own tutorials, else the end of text."""
    known = subject.text.vocabulary.padding
    return subject.text.eos_id if known is None else known
