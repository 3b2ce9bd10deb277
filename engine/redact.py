"""Redaction of credentials in URLs, in all that is written or printed.

A run gets its credentials from the environment or from fsspec's own configuration. Where a URL holds some all the same,
it is used as it stands, and `redact` cleans the copies of it in files, errors and logs. `redact_process` does so with
what Python and other libraries say: tracebacks, warnings, and log records of any logger with any handler.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import Any

_URL = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>]+")
_USER = re.compile(
    r"(?<=://)(?:[^/?#]*"  # user, user:password
    r"|[^/?#@:]*:(?!\d+/|:)[^?#@]*)@"  # a password that holds a slash; host:port/path@version is none
)
_QUERY = re.compile(r"(?<=[?&;])([^=&#;]+)=[^&#;]*")


def redact(text: str) -> str:
    """Return the text with its URLs freed of user, password and the values of their query."""
    # Every log line comes here, and most have no URL.
    if "://" not in text:
        return text
    # s3://key:secret@bucket/x?token=abc becomes s3://bucket/x?token=***: names of keys help to find a mistake.
    return _URL.sub(lambda url: _QUERY.sub(r"\1=***", _USER.sub("", url[0])), text)


def redacted(tree: Any) -> Any:
    """Return a copy of nested dictionaries and lists, each text in it redacted."""
    if isinstance(tree, dict):
        return {key: redacted(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redacted(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree


def redact_process() -> None:
    """Free all tracebacks, warnings and log records of this process of credentials; may be called again."""
    logging.setLogRecordFactory(_Record)
    if warnings.formatwarning is not _format_warning:
        warnings.formatwarning = _format_warning
    # Three hooks, for Python prints tracebacks in three ways: of the main thread, of destructors, of other threads.
    sys.excepthook = _print_exception
    sys.unraisablehook = lambda told: _print_exception(told.exc_type, told.exc_value, told.exc_traceback)
    threading.excepthook = lambda told: _print_exception(told.exc_type, told.exc_value, told.exc_traceback)


class _Record(logging.LogRecord):
    """A log record whose texts are redacted before any handler, also one of another library, formats them."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if isinstance(self.exc_info, tuple) and self.exc_info[0] is not None:
            # formatters take this text where it is there, and make their own of `exc_info` where it is not
            self.exc_text = redact("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))
        if self.stack_info:
            self.stack_info = redact(self.stack_info)

    def getMessage(self) -> str:
        return redact(super().getMessage())


_plain_format_warning = warnings.formatwarning


def _format_warning(message: Warning | str, *arguments: Any, **keywords: Any) -> str:
    return redact(_plain_format_warning(message, *arguments, **keywords))


def _print_exception(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if kind is not SystemExit and sys.stderr is not None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
