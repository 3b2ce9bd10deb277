"""One form of model that both Hugging Face and this engine have: the tables, and what follows from them.

A form is data: names of parameters (`Theirs`), fields of the configuration (`config_map`), tensors that published files
have besides. Everything else, in any direction, is made of it here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from engine.checkpoint.interchange.config_map import Field
from engine.checkpoint.interchange.mapping import ModelMap, ParameterMap, mapped
from engine.config.huggingface_forms import Problems, Twin
from engine.config.rules.model import check_model
from engine.config.schema.model import ModelConfig, make_model, without_vocabulary
from engine.errors import ConfigError, report
from engine.models.families import family
from engine.parallel.sharding import ParameterSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Theirs:
    """Modules of theirs whose parameters, joined along the output dimension, make up one of ours."""

    modules: tuple[str, ...]
    transposed: bool = False
    """True if their weights are (in, out), as in GPT-2's Conv1D; ours are (out, in)."""
    after_padding: bool = False
    """True if their table begins with the rows 0 to the number of the padding token, which ours does not have."""
    per_head: bool = False
    """True if their one projection has queries, keys and values head by head, as in GPT-NeoX."""


def one(module: str) -> Theirs:
    return Theirs((module,))


def conv1d(module: str) -> Theirs:
    return Theirs((module,), transposed=True)


def numbered(config: ModelConfig, module: str) -> tuple[str, str]:
    """Return a module's name with # for the number of its layer, and that number ("" where it has none)."""
    # layers.3.ffn.up_proj -> ("layers.#.ffn.up_proj", "3")
    number = next(iter(re.findall(r"\.(\d+)\.", module)), "")
    return re.sub(r"\.\d+\.", ".#.", module), number


@dataclass(frozen=True)
class Form:
    """One of the model forms that both sides have; `twin` says what `ModelConfig` must be."""

    twin: Twin
    model_type: str
    architecture: str
    """Name of their class that has all heads of ours."""
    names: Mapping[str, Theirs]
    """Their modules by the key of ours (`key`); an entry with .weight or .bias takes precedence over its module."""
    fields: tuple[Field, ...]
    older: Callable[[Any], dict[str, Any]] = lambda model: {}
    """Function from our configuration to the spelling of readers before transformers 5, beside that of 5."""
    key: Callable[[Any, str], tuple[str, str]] = numbered
    """Function from one of our modules to its key in `names` and the number of its layer among theirs."""
    prefix: str = ""
    """Beginning of the names of all parameters but the heads', which files of a model without heads lack."""
    heads: tuple[str, ...] = ("lm_head.",)
    """Beginnings of the names of the heads' parameters."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of names that other versions of their library have -> those of `names`."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors that published files have a second time -> the one that they repeat; a tied head is one, too."""
    unused: tuple[str, ...] = ()
    """Patterns of tensors in published files that no class loads: masks and tables that are computed."""

    @property
    def name(self) -> str:
        return self.twin.name

    @property
    def after_padding(self) -> bool:
        """True if positions are counted from the number of the padding token on."""
        return any(entry.after_padding for entry in self.names.values())

    def mapping(self, model: ModelConfig, padding_id: int | None = None) -> ModelMap:
        """Return where each parameter of a model of this form is in files of theirs, which have one head.

        `padding_id` is the padding token's number, where positions are counted from it on.
        """
        model = without_vocabulary(model)
        specs = {spec.name: spec for spec in family(model).specs(model)}
        parameters = {name: self._mapped(model, spec, padding_id) for name, spec in specs.items()}
        copies = dict(self.copies)
        for head, embedding in family(model).ties(model).items():
            # a head that is tied has no parameter of its own here, and a name there
            copies[self.names_of(model, head)[1][0]] = next(iter(parameters[embedding].tensors))
        return ModelMap(parameters, copies)

    def _mapped(self, model: ModelConfig, spec: ParameterSpec, padding_id: int | None) -> ParameterMap:
        entry, names = self.names_of(model, spec.name)
        skipped = 0
        if entry.after_padding:
            assert padding_id is not None, f"{self.name} counts positions from it on"
            # Padding token 1: two rows of zeros, and our position 0 is their row 2.
            skipped = padding_id + 1
        per_head = model.head_size if entry.per_head else 0
        return mapped(spec, tuple(names), entry.transposed, skipped, per_head)

    def names_of(self, model: ModelConfig, parameter: str) -> tuple[Theirs, list[str]]:
        """Return the table entry of one of our parameters, and the names of those of theirs that it is made of."""
        module, _, kind = parameter.rpartition(".")
        key, layer = self.key(model, module)
        # Some biases of theirs belong to another module than the weight (BERT's `cls.predictions`).
        entry = self.names.get(f"{key}.{kind}") or self.names[key]
        return entry, [f"{name.replace('#', layer)}.{kind}" for name in entry.modules]

    def their_config(self, model: ModelConfig, padding_id: int | None = None) -> PretrainedConfig:
        """Return the configuration of theirs; without `padding_id` the padding token is the form's own."""
        from transformers import AutoConfig

        values: dict[str, Any] = {}
        for each in self.fields:
            values |= each.write(model)
        # Theirs default to token ids of their own vocabularies; whoever has the tokenizer sets the right ones.
        values |= {"bos_token_id": None, "eos_token_id": None, "architectures": [self.architecture]}
        theirs = AutoConfig.for_model(self.model_type, **values)
        if padding_id is not None:
            theirs.pad_token_id = padding_id
        if self.after_padding:
            # 512 positions and padding token 1 make 514, as in roberta-base
            theirs.max_position_embeddings = model.max_positions + theirs.pad_token_id + 1
        return theirs

    def our_config(self, theirs: Any, vocab_multiple: int) -> ModelConfig:
        """Return the `ModelConfig` that computes what their configuration does.

        Raises:
            ConfigError: there is none; names the fields.
        """
        problems: Problems = []
        values: dict[str, Any] = {}
        for each in self.fields:
            values |= each.read(theirs, problems)
        heading = f"this {self.name} model has no twin here"
        if problems:
            raise report(problems, heading)
        try:
            model = make_model(**values, **self.twin.values, vocab_multiple=vocab_multiple)
        except ValidationError as error:
            told = [f"{'.'.join(map(str, one['loc'][1:]))} = {one['input']!r} ({one['msg']})" for one in error.errors()]
            raise ConfigError(
                f"{heading}: {'; '.join(told)}", "values of `model` as `palimpsest schema` lists"
            ) from None
        check_model(model, problems)
        if problems:
            raise report(problems, heading)
        return model
