"""Rules of the sources of data: a folder, a mixture of them, URLs; and the weights as whole numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from engine.config.schema.data import DataConfig
from engine.errors import ConfigError, PalimpsestError

LONGEST_PERIOD = 2**16
"""Largest sum of the weights as whole numbers; beyond it they are rounded to this sum."""

LONGEST_NAME = 64
"""Largest number of characters in the name of a source or of a validation set."""
MOST_SOURCES = 16
"""Largest number of sources: each has an entry in the loader's state, which stays below 1 KiB."""


def check_mixture(key: str, data: DataConfig, problems: list[PalimpsestError]) -> None:
    """Add every rule that the data of the run stage at `key` breaks."""
    name = f"{key}.data"
    problems += [*_source_problems(name, data), *_name_problems(name, data), *_weight_problems(name, data)]
    urls = [location for location in (*data.training_locations, *data.validation_locations) if is_url(location)]
    if urls and data.cache is None:
        problems.append(
            ConfigError(
                f"{name}.cache is missing, and {urls[0]} is a URL",
                "a folder on a disk of each node, and how many bytes it may hold",
                "for example data.cache: {folder: /scratch/shards, bytes: 50_000_000_000}",
            )
        )


def _source_problems(name: str, data: DataConfig) -> Iterator[PalimpsestError]:
    """Yield what is wrong with the folders that are named, and how many they are."""
    sources = data.sources
    if (data.train is None) == (not sources):
        yield ConfigError(
            f"{name}: {'both' if sources else 'neither'} train and sources",
            "exactly one of them",
            "train names one folder, sources a mixture",
        )
    if len(sources) > MOST_SOURCES:
        yield ConfigError(
            f"{name}.sources: {len(sources)} sources",
            f"{MOST_SOURCES} at most",
            "prepare some of them into one folder",
        )
    if data.validation == {}:
        yield ConfigError(f"{name}.validation is empty", "NAME: FOLDER, or one folder", "name one, or leave it out")


def _name_problems(name: str, data: DataConfig) -> Iterator[PalimpsestError]:
    """Yield names of sources and validation sets that are used twice or cannot stand in a metric's name."""
    names = [source.name for source in data.sources]
    for item in sorted({item for item in names if names.count(item) > 1}):
        yield ConfigError(
            f"{name}.sources: the name {item!r} is used twice", "a different name for each source", "rename one"
        )
    for key, item in _names(data):
        if not (item.isprintable() and item == item.strip() and 0 < len(item) <= LONGEST_NAME):
            yield ConfigError(
                f"{name}.{key}: {item!r} is no name",
                "1 to 64 printable characters, no space at either end: metrics use it (loss/NAME)",
                "give it another name",
            )


def _weight_problems(name: str, data: DataConfig) -> Iterator[PalimpsestError]:
    """Yield what is wrong with the weights of the sources, or with the temperature in their place."""
    sources = data.sources
    weights = [source.weight for source in sources if source.weight is not None]
    if 0 < len(weights) < len(sources):
        missing = [source.name for source in sources if source.weight is None]
        yield ConfigError(
            f"{name}.sources: no weight for {', '.join(missing)}",
            "a weight for every source, or for none (then their tokens weigh)",
            "write them, or remove the others",
        )
    elif weights and len(weights) <= MOST_SOURCES:
        try:
            whole_parts(weights)
        except ValueError as error:
            yield ConfigError(
                f"{name}.sources: {error} ({', '.join(f'{item.name}: {item.weight:g}' for item in sources)})",
                f"finite weights of 1/{LONGEST_PERIOD:,} of their sum or more",
                "change the weights",
            )
    if data.temperature != 1 and (weights or not sources):
        yield ConfigError(
            f"{name}.temperature = {data.temperature} {'with weights' if weights else 'without sources'}",
            "1",
            "leave out the weights: the temperature is that of the sources' tokens",
        )


def _names(data: DataConfig) -> list[tuple[str, str]]:
    """Return (key, name) of everything in a stage's data that metrics name."""
    named = data.validation if isinstance(data.validation, dict) else {}
    return [("sources", source.name) for source in data.sources] + [("validation", item) for item in named]


def is_url(location: str | None) -> bool:
    """Return True for a URL, False for a folder or nothing."""
    return location is not None and "://" in location


def whole_parts(weights: Sequence[float], longest: int = LONGEST_PERIOD) -> tuple[int, ...]:
    """Return the weights (as their decimals stand) as whole numbers without a common divisor.

    They are exact where these add up to at most `longest`, else rounded (largest remainders) to that sum.

    Raises:
        ValueError: a weight is not positive, or less than half a part of the whole.
    """
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError("a weight is no finite number above 0")
    # Through text: 0.1 is 1/10 to whoever wrote it, and not the nearest binary fraction. (0.7, 0.2, 0.1) is (7, 2, 1).
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*parts)
    parts = [part // divisor for part in parts]
    if (total := sum(parts)) > longest:
        exact = [Fraction(part * longest, total) for part in parts]
        parts = [int(share) for share in exact]
        # Rounded down, the parts lack less than one each; those with the largest remainders get one more (Hare quota).
        # Equal remainders go by position, so that every rank and every start finds the same numbers.
        by_remainder = sorted(range(len(exact)), key=lambda k: (parts[k] - exact[k], k))
        for k in by_remainder[: longest - sum(parts)]:
            parts[k] += 1
        if not all(parts):
            raise ValueError(f"a weight is less than 1/{longest:,} of the sum")
    divisor = math.gcd(*parts)
    return tuple(part // divisor for part in parts)
