"""Silence of transformers beside a command's own output. For commands alone: it sets that library's globals."""

from __future__ import annotations


def quiet() -> None:
    """Switch off progress bars and all messages below an error."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
