"""Comparison of a written Hugging Face folder with our own forward pass: the logits of both on the same tokens.

The whole model is compared where it is small. Of a larger one a twin is, cut to its first layers and to the first rows
of its vocabulary, whose weights are read from the folder: embeddings, heads, configuration and each kind of layer are
met, and memory stays bounded. That every row is right is not seen by logits, but by the comparison of all weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.interchange.foreign_model import load
from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.huggingface import ForeignModel, open_folder
from engine.checkpoint.interchange.mapping import ModelMap
from engine.checkpoint.interchange.sources import read_parameter
from engine.config.schema.model import BERTConfig, GPTConfig, ModelConfig, T5Config
from engine.models.materialize import whole_model
from engine.serve.same_tokens import differs

LARGEST_DIFFERENCE = 1e-4
"""Largest difference between a logit of ours and of theirs, both computed in fp32 from the same weights."""
WHOLE_BYTES = 128 << 20
"""Bytes of fp32 weights up to which the whole model is compared: both sides hold it once."""
MAX_TOKENS, MAX_TOKENS_OF_CUT = 512, 64
"""Longest part of the text that both sides read, in tokens: of the whole model, and of one that is cut."""
ROWS_OF_CUT = 1024
"""Rows of the vocabulary of a model that is cut; tokens beyond are replaced by their remainder."""
_NAMES = (
    ("logits_BTV", "logits"),
    ("logits_BTV", "prediction_logits"),
    ("pair_logits_BC", "seq_relationship_logits"),
    ("logits_BC", "logits"),
    ("logits_BTC", "logits"),
)
"""Names of the output of each head, ours and theirs."""


@dataclass(frozen=True)
class Agreement:
    """Distance between both sides on `num_tokens` tokens of text."""

    num_tokens: int
    num_layers: int
    """Number of layers of the compared model: all, or the first ones."""
    largest_difference: float
    largest_logit: float


def check_logits(model: ModelConfig, folder: Path, ids: list[int], name: Path) -> Agreement:
    """Compare the logits of a folder in transformers with ours; `name` is how errors call the folder.

    Raises:
        CheckpointError: they differ by more than `LARGEST_DIFFERENCE`.
    """
    opened = open_folder(folder, model.vocab_multiple)
    num_bytes = 4 * sum(int(torch.Size(one.shape).numel()) for one in opened.map.parameters.values())
    is_whole = num_bytes <= WHOLE_BYTES
    # Ours is what the checkpoint says, theirs what the folder says.
    cut = model if is_whole else first_layers(model, opened.theirs.pad_token_id)
    length = min(MAX_TOKENS if is_whole else MAX_TOKENS_OF_CUT, cut.max_positions)
    tokens_BT = torch.tensor([ids[:length]]) % cut.vocab_size
    ours, inputs = _inputs(cut, tokens_BT)
    model_map = form_of(cut).mapping(cut, opened.theirs.pad_token_id)
    # One side after the other, so that only one of them is in memory.
    weights = {key: read_parameter(opened.source, one) for key, one in model_map.parameters.items()}
    with torch.no_grad():
        made = whole_model(cut, weights)(**ours)
        del weights
        theirs = _whole_twin(folder, opened) if is_whole else _cut_twin(opened, model_map)
        output = theirs(**inputs)
    if "start_logits" in output:  # of an answer's first and last token, which are two columns of one output here
        output["logits"] = torch.stack([output["start_logits"], output["end_logits"]], dim=-1)
    found = {key: output[their_key] for key, their_key in _NAMES if key in made and their_key in output}
    assert found.keys() == made.keys(), f"{list(made)} of ours and {list(output)} of theirs"
    difference = torch.stack([(made[key] - value).abs().max() for key, value in found.items()]).max().item()
    if not difference <= LARGEST_DIFFERENCE:  # so that NaN fails too
        raise differs(name, f"its logits are off by {difference:.2e}", f"at most {LARGEST_DIFFERENCE:.0e}")
    return Agreement(tokens_BT.numel(), cut.num_layers, difference, next(iter(made.values())).abs().max().item())


def first_layers(model: ModelConfig, padding_id: int | None = None) -> ModelConfig:
    """Return the same model with its first layers, at least one of each kind, and the first rows of its vocabulary.

    The padding token is among them: some classes count positions from its number on.
    """
    changes: dict[str, Any] = {"num_layers": 1}
    if isinstance(model, T5Config):
        changes = {"num_layers": 2, "num_decoder_layers": 1}
    elif isinstance(model, BERTConfig) and model.local_attention is not None:
        changes = {"num_layers": min(2, model.num_layers)}  # a global one, then a local one
    elif isinstance(model, GPTConfig) and model.first_window_layer:
        changes = {"num_layers": 2, "first_window_layer": 1}
    rows = max(ROWS_OF_CUT, (padding_id or 0) + 1)
    return model.model_copy(update=changes | {"vocab_size": min(model.vocab_size, rows)})


def _whole_twin(folder: Path, opened: ForeignModel) -> Any:
    """Return the model that users of the folder get, in fp32, with all heads that the folder has."""
    return load(folder, opened.form.architecture).check(folder).eval()


def _cut_twin(opened: ForeignModel, model_map: ModelMap) -> Any:
    """Return a twin with the first layers alone: the folder's configuration, but for what counts layers and rows."""
    import transformers

    form, padding_id = opened.form, opened.theirs.pad_token_id
    # Both from the folder's model: a field in which it differs from ours has to stay as the folder has it.
    models = (opened.model, first_layers(opened.model, padding_id))
    whole, less = (form.their_config(one, padding_id).to_dict() for one in models)
    for field in (key for key, value in less.items() if whole.get(key) != value):
        setattr(opened.theirs, field, less[field])
    opened.theirs.dtype = torch.float32
    state = {}
    for name, shape in model_map.tensors.items():
        state[name] = opened.source.read(name, 0, shape[0]).float()
    kind = getattr(transformers, opened.form.architecture)
    return kind.from_pretrained(None, config=opened.theirs, state_dict=state, dtype=torch.float32).eval()


def _inputs(config: ModelConfig, tokens_BT: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return keywords of ours and of theirs; an encoder-decoder reads the first half of the tokens, then the second."""
    if config.family != "t5":
        return {"tokens_BT": tokens_BT}, {"input_ids": tokens_BT}
    # (B, T) -> (B, S) and (B, T - S), S the larger half
    read_BS, said_BT = tokens_BT.tensor_split(2, dim=1)
    ours = {"tokens_BS": read_BS, "decoder_tokens_BT": said_BT}
    return ours, {"input_ids": read_BS, "decoder_input_ids": said_BT}
