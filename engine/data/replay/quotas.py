"""Quotas: how many of a reservoir's rows each domain may have.

A domain that has fewer rows than its share gives the rest to the others, in their proportions. With a level L, domain d
has min(rows of d, L * share of d), all together `capacity`. L falls as domains gain rows, and never rises: what is cut
off is never wanted later. Shares are whole numbers, so all of it is exact.

While rows still come, a domain keeps one row more than the whole part of L * share (`bounds`); only a generation is cut
to the quotas themselves (`quotas`), whose remainders may move by one row from domain to domain as others grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from engine.errors import DataError

KINDS = ("uniform", "proportional", "square_root", "fixed")

Counts = Mapping[str, int]


def shares(kind: str, sizes: Counts, fixed: Mapping[str, float] | None = None) -> dict[str, int]:
    """Return the share of each domain as whole numbers.

    `sizes` are tokens of the domains' data sets. `fixed` are the shares of that kind, by domain; 0 for the others.

    Raises:
        DataError: a share of `fixed` is not 0 or above.
    """
    assert kind in KINDS, kind
    if kind == "uniform":
        return dict.fromkeys(sizes, 1)
    if kind == "proportional":
        return {name: max(1, size) for name, size in sizes.items()}
    if kind == "square_root":
        # times 2**32, so that the roots of small domains are not rounded away
        return {name: max(1, math.isqrt(size << 64)) for name, size in sizes.items()}
    fixed = fixed or {}
    wrong = {name: share for name, share in fixed.items() if not (math.isfinite(share) and share >= 0)}
    if wrong:
        raise DataError(
            f"the fixed shares of the reservoir are {dict(fixed)}",
            "a share of 0 or more for each domain",
            "give shares in any unit: 1 and 3 are a quarter and three quarters",
        )
    exact = {name: Fraction(fixed.get(name, 0)) for name in sizes}
    divisor = math.lcm(*(share.denominator for share in exact.values())) if exact else 1
    return {name: int(share * divisor) for name, share in exact.items()}


def bounds(capacity: int, share: Counts, rows: Counts) -> dict[str, int]:
    """Return the most rows that each domain may still need, at least its quota and at most one more."""
    return {
        name: rows[name] if ideal is None else min(rows[name], int(ideal) + 1) if ideal else 0
        for name, ideal in ideal_rows(capacity, share, rows).items()
    }


def quotas(capacity: int, share: Counts, rows: Counts) -> dict[str, int]:
    """Return the rows of each domain: at most those that it has, all together `capacity` where there are as many.

    Of the exact shares the whole parts are given, then one row each to the largest remainders (by name where equal).
    """
    ideals = ideal_rows(capacity, share, rows)
    given = {name: rows[name] if ideal is None else int(ideal) for name, ideal in ideals.items()}
    remainders = {name: ideal - int(ideal) for name, ideal in ideals.items() if ideal is not None}
    left = min(capacity, sum(rows[name] for name in share if share[name])) - sum(given.values())
    for name in sorted(remainders, key=lambda name: (-remainders[name], name))[: max(0, left)]:
        given[name] += 1
    return given


def ideal_rows(capacity: int, share: Counts, rows: Counts) -> dict[str, Fraction | None]:
    """Return the exact share of each domain in rows; None for one that has no more than that."""
    found: dict[str, Fraction | None] = {name: Fraction(0) for name in share if not share[name]}
    left, room = {name for name in share if share[name]}, capacity
    while left:
        total = sum(share[name] for name in left)
        ideals = {name: Fraction(room * share[name], total) for name in left}
        # those with too few rows leave, and what they do not need raises the ideals of the rest
        few = {name for name in left if rows[name] <= ideals[name]}
        if not few:
            found |= ideals
            break
        found |= dict.fromkeys(few)
        room -= sum(rows[name] for name in few)
        left -= few
    return {name: found[name] for name in share}
