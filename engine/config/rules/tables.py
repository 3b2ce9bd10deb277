"""Rules of shares that change over a run stage: a mixture's table of weights, and the replay of earlier data."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from fractions import Fraction

from engine.config.rules.data import LONGEST_PERIOD, MOST_SOURCES, is_url, whole_parts
from engine.config.schema.data import ReplayConfig, TableRow, WeightsRow
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.errors import ConfigError, PalimpsestError

REPLAY = "replay"
"""Name of the replayed samples among the sources of a run stage, in metrics and in the seed of their order."""

Ratios = tuple[tuple[int, Fraction], ...]
"""(first step, share of replayed samples)."""


def check_weights_table(key: str, stage: RunStage, problems: list[PalimpsestError]) -> None:
    """Add every rule that the table of weights of the run stage at `key` breaks."""
    data, name = stage.data, f"{key}.data.weights_table"
    if data.weights_table is None:
        return
    if not data.sources:
        problems.append(
            ConfigError(f"{name} without sources", "a table for a mixture", "name data.sources, or leave it out")
        )
        return
    others = [f"the weight of {source.name}" for source in data.sources if source.weight is not None]
    others += [f"temperature = {data.temperature}"] * (data.temperature != 1)
    if others:
        problems.append(
            ConfigError(f"{name} with {', '.join(others)}", "one of them", "leave the others out: the table has all")
        )
    if not _check_rows(name, data.weights_table, stage, problems):
        return
    names = [source.name for source in data.sources]
    for number, row in enumerate(data.weights_table):
        _check_weights(f"{name}.{number}.weights", row, names, problems)


def _check_weights(key: str, row: WeightsRow, names: list[str], problems: list[PalimpsestError]) -> None:
    unknown, missing = [name for name in row.weights if name not in names], [n for n in names if n not in row.weights]
    for name in unknown:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "add the source, or remove the weight"
        problems.append(ConfigError(f"{key}: no source has the name {name!r}", ", ".join(names), hint))
    if missing and not unknown:
        problems.append(
            ConfigError(
                f"{key}: no weight for {', '.join(missing)}",
                "a weight for every source, 0 for one that gives nothing",
                "write it",
            )
        )
    if not unknown and not missing:
        try:
            whole_row(row, names)
        except ValueError as error:
            problems.append(
                ConfigError(
                    f"{key}: {error} ({', '.join(f'{name}: {weight:g}' for name, weight in row.weights.items())})",
                    f"one weight above 0 or more, each 0 or 1/{LONGEST_PERIOD:,} of their sum or more",
                    "change the weights",
                )
            )


def check_replay(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add every rule that the replay of earlier data breaks, in all run stages."""
    for number, stage in enumerate(config.stages):
        if (replay := stage.replay) is not None:
            key = f"stages.{number}.replay"
            _check_ratio(key, replay, stage, problems)
            _check_source(key, number, replay, config, problems)


def _check_ratio(key: str, replay: ReplayConfig, stage: RunStage, problems: list[PalimpsestError]) -> None:
    if not isinstance(replay.ratio, tuple):
        given = {f"{key}.ratio": replay.ratio}
    elif _check_rows(f"{key}.ratio", replay.ratio, stage, problems):
        given = {f"{key}.ratio.{number}.ratio": row.ratio for number, row in enumerate(replay.ratio)}
    else:
        return
    problems += [
        ConfigError(
            f"{name} = {ratio:g}",
            "0 or more, and less than 1: the share of replayed samples",
            "0.05 to 0.25 are common; leave `replay` out where nothing is replayed",
        )
        for name, ratio in given.items()
        if not 0 <= ratio < 1
    ]


def _check_source(
    key: str, number: int, replay: ReplayConfig, config: RunConfig, problems: list[PalimpsestError]
) -> None:
    stage = config.stages[number]
    if replay.source is None and (number == 0 or config.reservoir is None):
        first, later = "no run stage comes before the first one", "this run keeps no reservoir of earlier data"
        problems.append(
            ConfigError(
                f"{key}.source is missing, and {later if number else first}: there is nothing to replay",
                "a folder of token shards, or its URL; or, from the second run stage on, a `reservoir` that the "
                "earlier ones have filled",
                f"set {key}.source, or leave `replay` out; `reservoir: {{rows: N}}` serves the run stages that begin "
                "after it is switched on",
            )
        )
    if is_url(replay.source) and stage.data.cache is None:
        problems.append(
            ConfigError(
                f"stages.{number}.data.cache is missing, and {key}.source = {replay.source} is a URL",
                "a folder on a disk of each node, and how many bytes it may hold",
                "for example data.cache: {folder: /scratch/shards, bytes: 50_000_000_000}",
            )
        )
    names = [source.name for source in stage.data.sources]
    if REPLAY in names:
        problems.append(
            ConfigError(
                f"stages.{number}.data.sources: the name {REPLAY!r} is that of replayed samples",
                "another name",
                "rename the source",
            )
        )
    if len(names) == MOST_SOURCES:
        problems.append(
            ConfigError(
                f"stages.{number}.data.sources: {len(names)} sources beside replayed samples",
                f"{MOST_SOURCES - 1} at most",
                "prepare some of them into one folder",
            )
        )


def _check_rows(name: str, rows: Sequence[TableRow], stage: RunStage, problems: list[PalimpsestError]) -> bool:
    """Add the rules of a table's beginnings; return True if it keeps them."""
    found = len(problems)
    if not rows:
        problems.append(
            ConfigError(f"{name} is empty", "one row or more, the first from_step: 0", "write rows, or leave it out")
        )
    for number, row in enumerate(rows):
        given = [key for key in ("from_step", "from_tokens") if getattr(row, key) is not None]
        if len(given) != 1:
            problems.append(
                ConfigError(f"{name}.{number}: {len(given)} beginnings", "exactly one of from_step and from_tokens")
            )
    if len(problems) > found:
        return False
    firsts = [stage.first_step(row) for row in rows]
    if firsts[0] != 0:
        problems.append(
            ConfigError(
                f"{name}.0 begins at step {firsts[0]}: nothing is in force before",
                "a first row from_step: 0",
                "add one",
            )
        )
    for number, (before, first) in enumerate(itertools.pairwise(firsts), 1):
        if first <= before:
            problems.append(
                ConfigError(
                    f"{name}.{number} begins at step {first}, {name}.{number - 1} at step {before}: the table does not "
                    "rise",
                    "rows in order, each in force for one step or more",
                    f"put {name}.{number} later, or remove it",
                )
            )
    return len(problems) == found


def whole_row(row: WeightsRow, names: Sequence[str]) -> tuple[int, ...]:
    """Return a row's weights of the sources `names`, in their order, as whole numbers. Raises as `whole_parts`."""
    given = [name for name in names if row.weights[name] > 0]
    if not given:
        raise ValueError("all weights are 0")
    parts = dict(zip(given, whole_parts([row.weights[name] for name in given]), strict=True))
    return tuple(parts.get(name, 0) for name in names)


def replay_ratios(stage: RunStage) -> Ratios | None:
    """Return the ratios of replay, each a fraction as its decimals stand; None where nothing is replayed."""
    if stage.replay is None:
        return None
    ratio = stage.replay.ratio
    if not isinstance(ratio, tuple):
        return ((0, Fraction(str(ratio))),)
    return tuple((stage.first_step(row), Fraction(str(row.ratio))) for row in ratio)
