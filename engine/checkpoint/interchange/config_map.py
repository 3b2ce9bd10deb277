"""Fields of a configuration of theirs as keys of ours, each in both directions.

A `Field` writes the fields of theirs that a model of ours has, and reads our keys back from a configuration of theirs,
telling what ours cannot express. A form is a list of fields, so that a field which is written but never read, or the
other way round, shows where the form is declared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.config.huggingface_forms import Problems
from engine.config.schema.model import ModelConfig
from engine.errors import ConfigError


class Field(Protocol):
    """One fact about a model, or several that belong together."""

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the fields of theirs that say it."""
        ...

    def read(self, theirs: Any, problems: Problems) -> dict[str, Any]:
        """Return our keys that say it; add to `problems` what ours cannot express."""
        ...


@dataclass(frozen=True)
class Same:
    """A key of ours and a field of theirs with the same values. None is their word for a default."""

    ours: str
    theirs: str

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.theirs: getattr(model, self.ours)}

    def read(self, theirs: Any, problems: Problems) -> dict[str, Any]:
        found = getattr(theirs, self.theirs)
        return {} if found is None else {self.ours: found}


ENCODER_SIZES = (
    Same("vocab_size", "vocab_size"),
    Same("num_layers", "num_hidden_layers"),
    Same("hidden_size", "hidden_size"),
    Same("num_heads", "num_attention_heads"),
    Same("feed_forward_size", "intermediate_size"),
    Same("init_std", "initializer_range"),
)
"""Sizes that all encoders of theirs call alike."""


@dataclass(frozen=True)
class Always:
    """A field of theirs whose value ours always computes: the first of `values`; any of them is read."""

    theirs: str
    values: tuple[Any, ...]
    written: bool = True
    """False leaves the field at the default of their class."""

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.values[0]} if self.written else {}

    def read(self, theirs: Any, problems: Problems) -> dict[str, Any]:
        # A field that their class does not have cannot ask for anything else.
        found = getattr(theirs, self.theirs, self.values[0])
        if found not in self.values:
            problems.append(ConfigError(f"{self.theirs} = {found!r}", " or ".join(map(repr, self.values))))
        return {}


@dataclass(frozen=True)
class Left:
    """Fields of theirs that are no matter of the model: dropout belongs to the run, token ids to the tokenizer."""

    fields: Mapping[str, Any]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return dict(self.fields)

    def read(self, theirs: Any, problems: Problems) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Choice:
    """A key and a field whose values have other names on either side."""

    ours: str
    theirs: str
    names: Mapping[str, str]
    """Ours -> theirs."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Theirs -> ours: further names of theirs for some of these values, which are read and never written."""

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.names[getattr(model, self.ours)]}

    def read(self, theirs: Any, problems: Problems) -> dict[str, Any]:
        found, ours = getattr(theirs, self.theirs), {name: key for key, name in self.names.items()} | dict(self.also)
        if found not in ours:
            problems.append(ConfigError(f"{self.theirs} = {found!r}", " or ".join(map(repr, ours))))
            return {}
        return {self.ours: ours[found]}


@dataclass(frozen=True)
class Computed:
    """Fields that take more than a table to say, by a pair of inverse functions."""

    to_theirs: Callable[[Any], dict[str, Any]]
    to_ours: Callable[[Any, Problems], dict[str, Any]]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return self.to_theirs(model)

    def read(self, theirs: Any, problems: Problems) -> dict[str, Any]:
        return self.to_ours(theirs, problems)
