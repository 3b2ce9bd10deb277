"""Slurm's short forms: host lists such as `node[01-03,7],gpu1` and task counts such as `2(x3),1`. Pure text."""

from __future__ import annotations

import re

from engine.errors import EnvironmentProblem


def expand_hosts(text: str) -> list[str]:
    """Return every host of a Slurm host list, in order; ranges keep their leading zeros.

    `node[01-03,7],gpu1` is node01, node02, node03, node7, gpu1.

    Raises:
        EnvironmentProblem: the text is no host list.
    """
    hosts = [host for item in _split_outside_brackets(text) for host in _expand_item(item, text)]
    if not hosts:
        raise _not_a_list(text)
    return hosts


def expand_counts(text: str) -> list[int]:
    """Return the tasks on every node: Slurm's `2(x3),1` is 2, 2, 2, 1.

    Raises:
        EnvironmentProblem: the text is no such list.
    """
    counts = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if match is None:
            raise EnvironmentProblem(
                f"Slurm's tasks per node {text!r} cannot be read", "for example 2(x3),1", "start the ranks with srun"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split_outside_brackets(text: str) -> list[str]:
    # A comma inside brackets is one that meets a "]" before any "[".
    return [item for item in re.split(r",(?![^\[]*\])", text.strip()) if item]


def _expand_item(item: str, text: str) -> list[str]:
    """Return the hosts of one item; several brackets multiply, the last one varies fastest."""
    match = re.fullmatch(r"([^\[\]]*)(?:\[([^\[\]]+)\](.*))?", item)
    if match is None:
        raise _not_a_list(text)
    prefix, ranges, rest = match.groups()
    if ranges is None:
        return [prefix]
    tails = _expand_item(rest, text)
    return [prefix + number + tail for part in ranges.split(",") for number in _numbers(part, text) for tail in tails]


def _numbers(part: str, text: str) -> list[str]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
    if match is None:
        raise _not_a_list(text)
    first, last = match[1], match[2] or match[1]
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _not_a_list(text: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"Slurm's host list {text!r} cannot be read", "for example node[01-03,7]", "set MASTER_ADDR to the first host"
    )
