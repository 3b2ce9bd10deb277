"""Fail on every rank or on none: an action that some or all ranks take, and one error that all of them raise.

A rank that raised alone would leave the others waiting in the next collective until a timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from engine.errors import CheckpointError, PalimpsestError
from engine.parallel import collectives
from engine.parallel.groups import Group

Result = TypeVar("Result")


def on_all(action: Callable[[], Result], group: Group) -> Result:
    """This rank's result of `action`. Collective over `group`.

    Raises:
        CheckpointError: the error of the first rank that failed, the same on every rank.
    """
    result, error = _attempt(action, group)
    failed = collectives.first_error(error, group)
    if failed is not None:
        raise failed from (error.__cause__ if error is not None else None)
    return result  # type: ignore[return-value]  # no error, so there is a result


def on_first(action: Callable[[], Result], group: Group) -> Result:
    """The result of `action` as the group's first rank found it, on every rank. Collective over `group`.

    Raises:
        CheckpointError: its error, the same on every rank.
    """
    result, error = _attempt(action, group) if group.position == 0 else (None, None)
    result, failed = collectives.broadcast_object((result, error), group)
    if failed is not None:
        raise failed from (error.__cause__ if error is not None else None)
    return result  # type: ignore[return-value]


def _attempt(action: Callable[[], Result], group: Group) -> tuple[Result | None, CheckpointError | None]:
    # Exception, not a narrower class: whatever a rank meets here must reach the others.
    try:
        return action(), None
    except Exception as problem:
        where = f"rank {group.ranks[group.position]}: " if group.size > 1 else ""
        if isinstance(problem, PalimpsestError):
            error = CheckpointError(where + problem.wrong, problem.allowed, problem.remedy)
        else:
            error = CheckpointError(f"{where}{type(problem).__name__}: {problem}")
        error.__cause__ = problem
        return None, error
