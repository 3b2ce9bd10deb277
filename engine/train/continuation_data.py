"""The data of a new run stage, from a folder or a URL of token shards: training sets, and held-out sets with names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.paths import expand
from engine.config.rules.data import MOST_SOURCES
from engine.config.schema.data import CacheConfig
from engine.data.shards.cache import ShardCache
from engine.data.shards.folders import PARTS, TRAIN, VALIDATION, data_sets
from engine.data.shards.index import FILE
from engine.data.shards.remote import RemoteFolder, is_remote
from engine.errors import ConfigError, DataError


@dataclass(frozen=True)
class NewData:
    """Locations of the data of a new stage: folders or URLs of token shards, by name."""

    train: dict[str, str]
    """One entry without a name, or several sources."""
    validation: dict[str, str]

    def keys(self) -> dict[str, Any]:
        """Return the keys of a stage's `data`."""
        if list(self.train) == [""]:
            train: dict[str, Any] = {"train": self.train[""]}
        else:
            train = {"sources": [{"name": name, "path": path} for name, path in self.train.items()]}
        return train | ({"validation": self.validation} if self.validation else {})


def find_data(location: str, name: str, taken: Collection[str], cache: CacheConfig | None) -> NewData:
    """Return the data at `location` for a stage `name`: what `palimpsest prepare` wrote, its `train`, or one data set.

    Held-out sets of a stage have its name, or their domains'; `taken` are names that held-out sets of the run have.

    Raises:
        DataError: there are no token shards.
        ConfigError: a URL without a cache, or more sources than a stage may have.
    """
    location = location.rstrip("/") or location
    if is_remote(location) and cache is None:
        raise ConfigError(
            f"--data {location} is a URL, and no stage of the run has data.cache",
            "a folder on a disk, or a URL and a cache",
            "add `cache: {folder: DIR, bytes: N}` to the data of the run's last stage (a change that is free), which "
            "the new stage takes over",
        )
    own = _sets(location, cache)
    if TRAIN in own:
        train, held_out = f"{location}/{TRAIN}", f"{location}/{VALIDATION}"
        own = {"": train} if own[TRAIN] else _sets(train, cache)
    else:
        # Who names the training half of what `prepare` wrote means the other half to be held out.
        above, _, last = location.rpartition("/")
        train, held_out = location, f"{above}/{VALIDATION}" if last == TRAIN and above else ""
        own = {"": location} if not own or "" in own else own
    if len(own) > MOST_SOURCES:
        raise ConfigError(
            f"{train} holds {len(own)} data sets", f"{MOST_SOURCES} at most", "prepare some of them into one folder"
        )
    training = {"": train} if "" in own else {key: f"{train}/{key}" for key in own}
    return NewData(training, _validation(held_out, name, taken, cache))


def _validation(location: str, name: str, taken: Collection[str], cache: CacheConfig | None) -> dict[str, str]:
    """Return the held-out data sets at a location by name, none where there are none."""
    found = _sets(location, cache) if location else {}
    if "" in found:
        names = {name: location}
    else:
        names = {domain if domain not in taken else f"{name}-{domain}": f"{location}/{domain}" for domain in found}
    if both := sorted(set(names) & set(taken)):
        raise ConfigError(
            f"{location}: the run has a held-out set {both[0]!r} already",
            "a different name for each domain, or nobody could tell their losses apart",
            "choose another --name",
        )
    return names


def _sets(location: str, cache: CacheConfig | None) -> dict[str, bool]:
    """Return the names of the data sets at a location, "" for the location itself, each with True; `train` and
    `validation` of what `prepare` wrote are named, too, with False where they hold domains."""
    if is_remote(location):
        assert cache is not None, "asked for by find_data"
        remote = RemoteFolder(location, ShardCache(Path(expand(str(cache.folder))), cache.bytes))
        names = remote.data_sets()
        if names:
            return dict.fromkeys(names, True)
        if RemoteFolder(f"{location}/{TRAIN}", remote.cache).data_sets():
            return {TRAIN: False}
        return {"": True} if _has_index(remote) else {}
    folder = Path(expand(location))
    if (folder / FILE).is_file():
        return {"": True}
    if not folder.is_dir():
        return {}
    found = dict.fromkeys(data_sets(folder), True)
    by_domain = dict.fromkeys((name for name in PARTS if data_sets(folder / name)), False)
    return by_domain | found if TRAIN in by_domain | found else found


def _has_index(remote: RemoteFolder) -> bool:
    try:
        return bool(remote.read_index())
    except DataError:
        return False
