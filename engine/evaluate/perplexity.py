"""Perplexity and bits per byte of a domain.

A causal model's are those of its likelihood, exact. A model that fills gaps has no likelihood of a text; its numbers
are those of the pseudo-log-likelihood, and named so. Bits per byte count the UTF-8 bytes of the original text, so
that models of different tokenizers compare; perplexity, which is per token, compares within one tokenizer alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from engine.evaluate.domains import Documents, Domain, read_documents
from engine.evaluate.likelihood import text_likelihoods
from engine.evaluate.pseudo import pseudo_likelihoods
from engine.evaluate.subject import Subject, require_kind


def perplexity_of(
    subject: Subject,
    domain: Domain,
    text_key: str = "text",
    limit: int | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Return what a model makes of a domain's documents, of at most `limit` of them.

    `done` is told of each few documents that are through.

    Raises:
        ConfigError: the model has no likelihood of either kind.
        DataError: the domain cannot be read.
    """
    require_likelihood(subject)
    documents = read_documents(domain, subject.text, text_key, limit)
    of_texts = text_likelihoods if subject.kind == "causal" else pseudo_likelihoods
    nats = -math.fsum(of_texts(subject, documents.ids, done))
    return {"domain": domain.name, "source": domain.source} | measured(documents, nats, subject.kind == "causal")


def require_likelihood(subject: Subject) -> None:
    """Raise `ConfigError` where a model has no likelihood of either kind."""
    allowed = "a language model (GPT), or one that fills gaps (BERT, T5)"
    require_kind(subject, ("causal", "masked", "spans"), "perplexity", allowed)


def measured(documents: Documents, nats: float, is_exact: bool) -> dict[str, Any]:
    """Return the measures of some documents whose negative log likelihood is `nats`."""
    prefix = "" if is_exact else "pseudo_"
    num_tokens = sum(map(len, documents.ids))
    return {
        "likelihood": "exact" if is_exact else "pseudo (each token hidden in turn, all others in sight)",
        "documents": len(documents.ids),
        "tokens": num_tokens,
        "bytes": documents.num_bytes,
        "unspelt_bytes": documents.unspelt_bytes,
        "nats": nats,
        f"{prefix}perplexity": math.exp(min(nats / num_tokens, 700.0)),  # e^700 is near the largest number
        f"{prefix}bits_per_byte": nats / math.log(2) / documents.num_bytes if documents.num_bytes else None,
    }
