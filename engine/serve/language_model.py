"""A model and its tokenizer in Hugging Face's classes, from one of our runs or from one of their folders.

Everything that serves goes through these classes, so there is one implementation of sampling and caching: theirs.
Nothing is fetched from the network, and no pickle is opened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from engine.checkpoint.interchange.foreign_model import read_config
from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.huggingface import read_model, their_map, to_huggingface
from engine.checkpoint.interchange.mapping import ModelMap
from engine.checkpoint.interchange.sources.merged import without_adapter
from engine.checkpoint.load import read_state
from engine.config.schema.adapter import PromptConfig
from engine.config.schema.model import ModelConfig
from engine.config.virtual_tokens import prompt_length
from engine.data.tokenizer.files import MODEL_FILE, read_files
from engine.data.tokenizer.wrapping import wrap_files
from engine.errors import ConfigError
from engine.foreign import refuse_custom_code
from engine.serve.adapter import with_prompt
from engine.serve.source import Trained, describe, is_trained, open_trained
from engine.serve.tokenizer_files import write_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_VOCABULARY_FILES = (MODEL_FILE, "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")
"""Files of which every tokenizer folder that transformers writes has at least one."""


@dataclass(frozen=True)
class LanguageModel:
    """`model` computes in fp32 and in evaluation mode. `tokenizer` frames a text as the rows of training were.
    `origin` describes its source, for messages."""

    model: PreTrainedModel
    tokenizer: Any
    origin: str
    virtual_tokens: int = 0
    """Number of embeddings in front of those of each text: `model` is then peft's around Hugging Face's."""


def open_language_model(source: Path, tokenizer: Path | None = None) -> LanguageModel:
    """Return the model in a run folder (newest whole checkpoint), a checkpoint folder or a Hugging Face folder.

    Raises:
        ConfigError: `source` is none of them, or its model has no twin in Hugging Face's library.
        CheckpointError: no checkpoint is whole.
    """
    if is_trained(source):
        return from_trained(open_trained(source, tokenizer))
    if not (source / "config.json").is_file():
        what = "holds no model" if source.is_dir() else "is not there"
        raise ConfigError(
            f"{source} {what}",
            "a run folder, one of its checkpoints, or a Hugging Face folder",
            "check the path, or train first",
        )
    return read_folder(source, tokenizer)


def from_trained(trained: Trained) -> LanguageModel:
    """Return a run's model in Hugging Face's classes, made in memory."""
    import transformers

    if trained.tokenizer is None:
        raise ConfigError(
            f"{trained.checkpoint} was converted from a folder without a tokenizer",
            "a model with its tokenizer",
            "name the tokenizer's folder with --tokenizer",
        )
    with TemporaryDirectory() as folder:  # as `convert` would write it, so that run and folder say the same
        write_tokenizer(trained.tokenizer, Path(folder), trained.config)
        tokenizer = read_tokenizer(Path(folder))
    # One with the head of a task, and any other adapter that is not merged, is refused for want of a form.
    is_prompted = isinstance(trained.config.adapter, PromptConfig) and trained.config.task_head is None
    base = replace(trained, config=without_adapter(trained.config)) if is_prompted else trained
    config = their_config(base, tokenizer)
    _, state = to_huggingface(base.config, base.weights, config.pad_token_id)
    kind = getattr(transformers, (config.architectures or [])[0])
    model = kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    model = with_prompt(model, trained) if is_prompted else model
    origin = f"step {trained.step} of {trained.checkpoint.parent.parent.resolve().name}"
    return LanguageModel(model.eval(), tokenizer, origin, prompt_length(trained.config))


def their_config(trained: Trained, tokenizer: Any) -> PretrainedConfig:
    """Return their configuration with the tokenizer's special tokens; None means that there is no tokenizer.

    Raises:
        ConfigError: the model has no twin, or the tokenizer has more tokens than the model or lacks one it needs.
    """
    form = form_of(trained.config)
    if tokenizer is None:
        config = form.their_config(trained.config)
        config.dtype = torch.float32
        return with_labels(trained, config)
    assert trained.tokenizer is not None
    check_vocabulary(trained.config.vocab_size, trained.tokenizer, tokenizer)
    config = form.their_config(trained.config, _padding_id(trained.config, trained.tokenizer, tokenizer))
    config.dtype = torch.float32
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    if config.is_encoder_decoder:
        config.decoder_start_token_id = config.pad_token_id  # as span corruption shifts its targets
    return with_labels(trained, config)


def with_labels(trained: Trained, config: PretrainedConfig) -> PretrainedConfig:
    """Return their configuration with the names of the labels that a run was fine-tuned on, if it was."""
    if trained.run is not None and (labels := trained.run.stages[-1].objective.labels):
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
    return config


def caches(config: PretrainedConfig, virtual_tokens: int = 0) -> bool:
    """Return True if generation may cache.

    transformers 5 makes a decoder's cache as deep as the encoder. With a cache peft 0.21 puts virtual tokens in front
    of what transformers 5.24 takes for them already, and generates another text.
    """
    return virtual_tokens == 0 and (not config.is_encoder_decoder or config.num_decoder_layers == config.num_layers)


def their_map_of(checkpoint: Path, tokenizer: Path | None = None) -> ModelMap:
    """Return where each parameter of a checkpoint's model is in Hugging Face's class.

    Raises:
        ConfigError: the model has no twin, or counts positions from the padding token of a tokenizer that has none.
    """
    described = describe(checkpoint, read_state(checkpoint))
    model, folder = described.model, tokenizer or described.tokenizer
    # Without positions from the padding token on, the tokenizer need not be there at all.
    if not form_of(model).after_padding or folder is None:
        return their_map(model)
    return their_map(model, _padding_id(model, folder, read_tokenizer(folder)))


def _padding_id(config: ModelConfig, folder: Path, tokenizer: Any) -> int | None:
    if tokenizer.pad_token_id is None and form_of(config).after_padding:
        raise ConfigError(
            f"tokenizer {folder} has no padding token, from whose number RoBERTa's positions are counted",
            "a tokenizer with one",
            "train with model.token_types = 2, whose twin is BERT, or name another tokenizer",
        )
    return tokenizer.pad_token_id


def read_folder(folder: Path, tokenizer: Path | None = None) -> LanguageModel:
    """Return the model of a Hugging Face folder, of any architecture that their library has.

    Raises:
        ConfigError: the folder cannot be read, its weights are not those of its configuration, or the tokenizer has
            more tokens than the model.
    """
    read_config(folder)  # configuration and tokenizer before the weights: they fail sooner
    read = read_tokenizer(tokenizer or folder)
    model = read_model(folder).eval()
    check_vocabulary(model.config.vocab_size, tokenizer or folder, read)
    return LanguageModel(model, read, str(folder))


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder in their general class, which splits text as our own reader does.

    Folders without `tokenizer.json` are converted by the class that they name.

    Raises:
        ConfigError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    refuse_custom_code(folder)
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):  # transformers would make up an empty one
        raise ConfigError(
            f"{folder} holds no tokenizer",
            "a folder with tokenizer.json",
            "name the tokenizer's folder with --tokenizer, or copy its files there",
        )
    try:
        # AutoTokenizer would rebuild some classes by rules of their own, and split text otherwise (`same_tokens`).
        if (folder / MODEL_FILE).is_file():
            return wrap_files(read_files(folder, needs_settings=False))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library and its parsers raise whatever they like for a damaged file
        raise ConfigError(
            f"{folder} cannot be read as a tokenizer: {(str(error).splitlines() or [''])[0]}",
            "a folder with tokenizer.json",
            "name a folder that `palimpsest tokenizer` or save_pretrained wrote",
        ) from error


def check_vocabulary(num_rows: int, folder: Path, tokenizer: Any) -> None:
    """Raise `ConfigError` where a tokenizer has ids that a model of `num_rows` tokens has no row for."""
    if len(tokenizer) > num_rows:
        raise ConfigError(
            f"tokenizer {folder} has {len(tokenizer)} tokens, the model {num_rows} rows",
            f"at most {num_rows} tokens",
            "name the tokenizer that the model was trained with",
        )
