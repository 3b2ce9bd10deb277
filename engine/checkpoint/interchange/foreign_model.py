"""Strict reading of a Hugging Face model folder: nothing is invented, executed or unpickled.

transformers initialises tensors that no file holds at random and passes over those that it does not know, with a
warning at most. Here every such tensor is an error by name, and so are values that are not finite.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from engine.errors import ConfigError
from engine.foreign import refuse_custom_code

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_NAME_IN_FILES = {"gpt_neox": "embed_out.weight"}
"""Name of the head's weight in files, by model type, where it is not that of the module."""
_SHOWN = 3
"""Largest number of names that an error lists."""


@dataclass(frozen=True)
class Loaded:
    """A model (fp32) and the names of its tensors that no file holds, and of those in the files that it lacks."""

    model: PreTrainedModel
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def check(self, folder: Path) -> PreTrainedModel:
        """Return the model, where files and configuration name the same tensors and every value is finite.

        Raises:
            ConfigError: they do not; names the tensors.
        """
        problems = [f"no file holds {_names(self.missing)}"] if self.missing else []
        if self.unexpected:
            problems.append(f"{type(self.model).__name__} has no place for {_names(self.unexpected)}")
        if problems:
            raise ConfigError(
                f"the weights in {folder} are not those of its config.json: {'; '.join(problems)}",
                f"exactly the tensors of {type(self.model).__name__}",
                "complete the folder, or mend config.json (model_type, architectures, number of layers)",
            )
        check_finite(self.model.named_parameters(), folder)
        return self.model


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], source: Path) -> None:
    """Refuse weights that hold NaN or infinity, of which nothing can be computed.

    Raises:
        ConfigError: names the tensors.
    """
    broken = tuple(name for name, value in tensors if not torch.isfinite(value).all())
    if broken:
        raise ConfigError(
            f"weights in {source} are not finite: {_names(broken)}",
            "numbers",
            "take a checkpoint from before they became NaN or infinite",
        )


def read_config(folder: Path) -> PretrainedConfig:
    """Return the configuration of a folder.

    Raises:
        ConfigError: it cannot be read, wants code of its own, or belongs to an adapter or to quantised weights.
    """
    from transformers import AutoConfig

    refuse_custom_code(folder)
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} holds an adapter (adapter_config.json) and not a whole model",
            "a folder with all weights",
            "merge it into its base model first (peft's merge_and_unload), then save_pretrained",
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # validators of the library raise classes of their own for each kind of bad value
        raise _unreadable(folder, error) from error
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ConfigError(
            f"{folder} holds quantised weights (quantization_config{f': {method}' if method else ''})",
            "weights in fp32, bf16 or fp16",
            "name the folder that they were quantised from",
        )
    return config


def load(folder: Path, architecture: str) -> Loaded:
    """Load the safetensors of a folder into the transformers class `architecture`, in fp32.

    Raises:
        ConfigError: the files cannot be read, or a tensor has another shape than the configuration says.
    """
    import transformers

    if not any(folder.glob("*.safetensors")) and (pickles := sorted(path.name for path in folder.glob("*.bin"))):
        raise ConfigError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which may run code and is never opened",
            "safetensors",
            "write it anew with save_pretrained where you trust it",
        )
    try:
        model, info = getattr(transformers, architecture).from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            # never a pickle, even where one lies beside the safetensors
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, by name; the library's own report is a table on stderr
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, torch and the library each raise their own
        raise _unreadable(folder, error) from error
    if mismatched := sorted(info["mismatched_keys"]):
        told = [f"{name} has shape {tuple(found)} and not {tuple(expected)}" for name, found, expected in mismatched]
        more = f" (and {len(told) - _SHOWN} more)" if len(told) > _SHOWN else ""
        raise ConfigError(
            f"the weights in {folder} are not those of its config.json: {'; '.join(told[:_SHOWN])}{more}",
            "the shapes that config.json says",
            "mend config.json (vocab_size counts the rows of a padded vocabulary, too), or take the right files",
        )
    # transformers has filled these with random numbers by now.
    missing = info["missing_keys"] | _lost_head(folder, model)
    return Loaded(model, tuple(sorted(missing)), tuple(sorted(info["unexpected_keys"])))


def _lost_head(folder: Path, model: PreTrainedModel) -> set[str]:
    """Return the head's weight where config.json says that it is not tied and no file holds it.

    transformers 5 ties every T5 whose head is missing, whatever config.json says.
    """
    head = model.get_output_embeddings()
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if head is None or settings.get("tie_word_embeddings") is not False:
        return set()
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if {name, _NAME_IN_FILES.get(model.config.model_type)} & set(file.keys()):
                return set()
    return {name}


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _unreadable(folder: Path, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ConfigError(
        f"{folder} cannot be read as a Hugging Face model: {reason}",
        "a folder with config.json and whole safetensors files",
        "name a folder that `palimpsest convert` or save_pretrained wrote, or copy it again",
    )
