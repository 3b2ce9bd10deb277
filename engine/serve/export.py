"""Export of a trained model as a Hugging Face folder, checked by reading it back.

The folder is made beside its final path and renamed after their library has loaded it and agreed with our own
forward pass on real text and on every weight; so a folder that exists is right, and a failure leaves nothing.
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from engine.checkpoint.interchange.huggingface import from_huggingface
from engine.checkpoint.interchange.older_readers import older_spellings
from engine.config.schema.model import ModelConfig
from engine.models.materialize import whole_model
from engine.serve.card import model_card
from engine.serve.language_model import LanguageModel, caches, read_folder, read_tokenizer, their_form
from engine.serve.new_folder import new_folder
from engine.serve.same_tokens import differs, same_tokens
from engine.serve.source import Trained
from engine.serve.tokenizer_files import write_tokenizer

LARGEST_DIFFERENCE = 1e-4
"""Largest difference between a logit of ours and of theirs, both computed in fp32 from the same weights."""

THEIR_LOGITS = (
    ("logits_BTV", "logits"),
    ("logits_BTV", "prediction_logits"),
    ("pair_logits_BC", "seq_relationship_logits"),
)
"""Names of the output of each head, ours and theirs."""
MAX_TOKENS = 512
"""Longest part of the text that both sides read, in tokens."""

TEXT = """A palimpsest is a page whose first writing was scraped away so that it could be used again. What was \
written before can still be read beneath the new lines: ink bites into parchment, and monks were thrifty but not \
thorough. In 1906 J. L. Heiberg recognised a lost work of Archimedes under a Byzantine prayer book; it took until \
2008 - two world wars, one theft, and 2,000,000 US dollars later - to read most of it.

    def overwrite(page: list[str], text: str) -> list[str]:
        return [f"{old:.3}{new}" for old, new in zip(page, text)]  # 3 > 0

Nul n'est censé l'ignorer; 再利用された羊皮紙; ἀπὸ τοῦ πάλιν καὶ ψάω.
"""
"""Prose, numbers, code and other scripts, so that many kinds of tokens are met."""


@dataclass(frozen=True)
class Exported:
    """Summary of an export, with the distance between both sides on `num_tokens` tokens of text."""

    folder: Path
    num_parameters: int
    num_tokens: int
    num_shard_tokens: int
    """Number of tokens of the run's shards that the exported tokenizer reproduces."""
    largest_difference: float
    largest_logit: float


def export(trained: Trained, output: Path, license_id: str | None = None) -> Exported:
    """Write a Hugging Face folder and read it back.

    It holds config.json, safetensors (fp32), the tokenizer, a model card and, for a model that generates,
    generation_config.json.

    Raises:
        ConfigError: `output` is taken, or the model has no twin in Hugging Face's library.
        CheckpointError: what their library loads is not the same model.
        EnvironmentProblem: the folder cannot be written.
    """
    with new_folder(output) as partial:
        try:
            write_folder(trained, partial, license_id)
        except SafetensorError as error:  # theirs, where the disk is full
            raise OSError(str(error)) from error
        return check(trained, partial, output)


def write_folder(trained: Trained, folder: Path, license_id: str | None = None) -> None:
    """Write all files of the model into an existing folder."""
    from huggingface_hub import save_torch_state_dict
    from transformers import GenerationConfig

    # The tokenizer first: its special tokens go into the configuration.
    write_tokenizer(trained.tokenizer, folder, trained.config)
    config, state = their_form(trained, read_tokenizer(folder))
    config.save_pretrained(folder)
    _add_fields(folder / "config.json", older_spellings(trained.config))
    if trained.config.family != "bert":
        generation = GenerationConfig.from_model_config(config)
        # what generate() does with this folder by default
        generation.use_cache = caches(config)
        generation.save_pretrained(folder)
    save_torch_state_dict(state, folder, filename_pattern="model{suffix}.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(model_card(trained, config, license_id), encoding="utf-8")
    mode = (folder / "README.md").stat().st_mode  # as the user's umask has it; safetensors writes for its owner alone
    for path in folder.iterdir():
        path.chmod(stat.S_IMODE(mode))


def _add_fields(path: Path, fields: dict[str, Any]) -> None:
    """Add fields to a file of JSON; a field that is there already gets this value."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(tree | fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check(trained: Trained, folder: Path, name: Path) -> Exported:
    """Read the folder back and compare tokens, weights and logits; `name` is how errors call it.

    Raises:
        CheckpointError: anything differs, logits by more than `LARGEST_DIFFERENCE`.
    """
    theirs = read_folder(folder)
    same = same_tokens(trained, folder, name, TEXT)
    tokens_BT = torch.tensor([same.ids[: min(MAX_TOKENS, trained.config.max_positions)]])
    # Logits cannot show everything: rows of tokens that are not in the text, for one.
    _same_weights(trained, theirs, name)
    with torch.no_grad():
        ours, inputs = _inputs(trained.config, tokens_BT)
        made = whole_model(trained.config, trained.weights)(**ours)
        output = theirs.model(**inputs)
        found = {name: output[theirs] for name, theirs in THEIR_LOGITS if name in made and theirs in output}
        assert found.keys() == made.keys(), f"{list(made)} of ours and {list(output)} of theirs"
        difference = torch.stack([(made[name] - value).abs().max() for name, value in found.items()]).max().item()
    if not difference <= LARGEST_DIFFERENCE:  # so that NaN fails too
        raise differs(name, f"its logits are off by {difference:.2e}", f"at most {LARGEST_DIFFERENCE:.0e}")
    return Exported(
        folder=name,
        num_parameters=sum(value.numel() for value in trained.weights.values()),
        num_tokens=tokens_BT.numel(),
        num_shard_tokens=same.num_shard_tokens,
        largest_difference=difference,
        largest_logit=made["logits_BTV"].abs().max().item(),
    )


def _inputs(config: ModelConfig, tokens_BT: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return keywords of ours and of theirs; an encoder-decoder reads the first half of the tokens, then the second."""
    if config.family != "t5":
        return {"tokens_BT": tokens_BT}, {"input_ids": tokens_BT}
    # (B, T) -> (B, S) and (B, T - S), S the larger half
    read_BS, said_BT = tokens_BT.tensor_split(2, dim=1)
    ours = {"tokens_BS": read_BS, "decoder_tokens_BT": said_BT}
    return ours, {"input_ids": read_BS, "decoder_input_ids": said_BT}


def _same_weights(trained: Trained, theirs: LanguageModel, name: Path) -> None:
    _, weights = from_huggingface(theirs.model)
    for parameter, expected in trained.weights.items():
        if not torch.equal(weights[parameter], expected):
            raise differs(name, f"{parameter} has other values", "the checkpoint's, bit for bit")
