"""Credentials in URLs: they are taken out of all that is written or said.

A run gets its credentials from the environment or from fsspec's own configuration. Where a URL holds some all the same,
it is used as it stands, and `redact` cleans the copies of it in files, errors and logs.
"""

from __future__ import annotations

import re
from typing import Any

_URL = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>]+")
_USER = re.compile(
    r"(?<=://)(?:[^/?#]*"  # user, user:password
    r"|[^/?#@:]*:(?!\d+/|:)[^?#@]*)@"  # a password that holds a slash; host:port/path@version is none
)
_QUERY = re.compile(r"(?<=[?&;])([^=&#;]+)=[^&#;]*")


def redact(text: str) -> str:
    """Return the text with its URLs freed of user, password and the values of their query."""
    if "://" not in text:
        return text
    return _URL.sub(lambda url: _QUERY.sub(r"\1=***", _USER.sub("", url[0])), text)


def redacted(tree: Any) -> Any:
    """Return a copy of nested dictionaries and lists, each text in it redacted."""
    if isinstance(tree, dict):
        return {key: redacted(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redacted(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree
