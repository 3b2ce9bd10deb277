"""Continuation of a prompt through transformers' `generate`; the draw depends on the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.data.tokenizer.wrapping import unspelt_bytes
from engine.errors import ConfigError
from engine.logs import logger
from engine.serve.language_model import LanguageModel, caches

log = logger(__name__)


@dataclass(frozen=True)
class Sampling:
    """Settings of the draw of tokens. `temperature` 0 takes the likeliest token each time; `top_k` 0 draws from all."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0


def generate(
    language_model: LanguageModel, prompt: str, sampling: Sampling, on_text: Callable[[str], None] | None = None
) -> str:
    """Return the prompt and its continuation as text; stop at the end of a document.

    `on_text` is called with each bit of text as it is made, the prompt first. The process's random state is left
    as it was found.

    Raises:
        ConfigError: the model is an encoder, the prompt is empty or no text, or prompt and continuation are longer than
            the model's positions.
    """
    tokenizer = language_model.tokenizer
    model: Any = language_model.model
    if not model.can_generate():
        raise ConfigError(
            f"{language_model.origin} is a {type(model).__name__}, which predicts masked tokens and continues no text",
            "a GPT",
            "name another model",
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is no text: {error}", "UTF-8", "give other text with --prompt") from error
    encoded = tokenizer(
        prompt,
        return_tensors="pt",
        # a decoder has none, and would refuse the argument
        return_token_type_ids=False,
    ).to(model.device)
    num_prompt_tokens = encoded["input_ids"].shape[1]
    _check_length(model.config, num_prompt_tokens, language_model.virtual_tokens, sampling)
    if lost := unspelt_bytes(tokenizer, prompt):
        log.warning("the tokenizer cannot spell %d of the prompt's %d bytes", lost, len(prompt.encode()))
    streamer = _streamer(tokenizer, on_text) if on_text else None
    # transformers draws from torch's global generators; a library call must not leave them seeded.
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sampling.seed)
        ids_BT = model.generate(
            **encoded,
            **_settings(sampling),
            pad_token_id=pad_id(tokenizer, model),
            # Padded rows of the vocabulary have logits, too: drawn, they would decode to nothing.
            suppress_tokens=without_text(tokenizer, model.config.vocab_size),
            streamer=streamer,
            use_cache=caches(model.config, language_model.virtual_tokens),
        )
    return tokenizer.decode(ids_BT[0], skip_special_tokens=True)


def _settings(sampling: Sampling) -> dict[str, Any]:
    # not temperature=0.0, by which transformers refuses to divide
    if sampling.temperature == 0:
        return {"max_new_tokens": sampling.max_new_tokens, "do_sample": False}
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
    }


def _check_length(config: Any, num_prompt_tokens: int, virtual_tokens: int, sampling: Sampling) -> None:
    if num_prompt_tokens == 0:
        raise ConfigError("the prompt is empty", "at least one token of text", "give some text with --prompt")
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit is not None and rope.get("rope_type") == "dynamic":
        limit = int(limit * rope["factor"])
    # Relative positions (T5) have no limit.
    room = None if limit is None else limit - virtual_tokens - num_prompt_tokens
    if room is not None and sampling.max_new_tokens > room:
        virtual = f", {virtual_tokens} virtual ones" if virtual_tokens else ""
        raise ConfigError(
            f"a prompt of {num_prompt_tokens} tokens{virtual} and {sampling.max_new_tokens} new ones are more than the "
            f"model's {limit} positions",
            f"at most {max(room, 0)} new tokens",
            "lower --max-new-tokens or shorten the prompt",
        )


def pad_id(tokenizer: Any, model: Any) -> int | None:
    """Return the token behind the end of a row; a single row has none, but the library asks for it."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else model.generation_config.eos_token_id


def without_text(tokenizer: Any, vocab_size: int) -> list[int] | None:
    """Return ids of the rows that pad a vocabulary, which no token stands for; None where there are none."""
    return sorted(set(range(vocab_size)) - set(tokenizer.get_vocab().values())) or None


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_special_tokens=True)
