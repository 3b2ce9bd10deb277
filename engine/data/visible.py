"""Text of strangers on a terminal: control characters are shown, not sent.

A document (or the name of a file) may hold escape sequences, which would move the cursor, change colours or retitle the
window, and marks that reverse the direction of what follows.
"""

from __future__ import annotations

import re

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return the text with control characters other than tabs and line ends spelt out (`\\x1b`)."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
