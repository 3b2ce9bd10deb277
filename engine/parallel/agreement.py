"""Failure on every rank or on none: an action that some or all ranks take, and one error that all of them raise.

A rank that raised alone would leave the others waiting in the next collective until a timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from engine.errors import PalimpsestError
from engine.parallel import collectives
from engine.parallel.groups import Group

Result = TypeVar("Result")


def on_all(action: Callable[[], Result], group: Group, unexpected: type[PalimpsestError]) -> Result:
    """Run `action` on every rank and return this rank's result. Collective over `group`.

    Raises:
        PalimpsestError: the error of the first rank that failed, the same on every rank; an error of no class of
            ours becomes `unexpected`.
    """
    result, error = _attempt(action, group, unexpected)
    failed = collectives.first_error(error, group)
    if failed is not None:
        # A cause is lost when an error is pickled to other ranks; this rank's own, where it has one, is chained here.
        raise failed from (error.__cause__ if error is not None else None)
    return result  # type: ignore[return-value]  # no error, so there is a result


def on_first(action: Callable[[], Result], group: Group, unexpected: type[PalimpsestError]) -> Result:
    """Run `action` on the group's first rank and return its result on every rank. Collective over `group`.

    Raises:
        PalimpsestError: that rank's error, the same on every rank; one of no class of ours becomes `unexpected`.
    """
    # Result and error in one broadcast, so that the other ranks leave it with one or the other.
    result, error = _attempt(action, group, unexpected) if group.position == 0 else (None, None)
    result, failed = collectives.broadcast_object((result, error), group)
    if failed is not None:
        raise failed from (error.__cause__ if error is not None else None)
    return result  # type: ignore[return-value]


def _attempt(
    action: Callable[[], Result], group: Group, unexpected: type[PalimpsestError]
) -> tuple[Result | None, PalimpsestError | None]:
    # Exception, not a narrower class: whatever a rank meets here must reach the others.
    try:
        return action(), None
    except Exception as problem:
        where = f"rank {group.ranks[group.position]}: " if group.size > 1 else ""
        if isinstance(problem, PalimpsestError):
            error = type(problem)(where + problem.wrong, problem.allowed, problem.remedy)
        else:
            error = unexpected(f"{where}{type(problem).__name__}: {problem}")
        error.__cause__ = problem
        return None, error
