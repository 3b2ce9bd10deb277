"""Loss on held-out text, by which an exported model is compared with the trained one.

The rows are cut from the validation data of the run, or from a fixed text where there is none. Each family's loss is
that of its objective, with fixed masks and spans: next tokens; every seventh token masked; the second half of a row
after the first.

B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from engine.config.schema.model import ModelConfig
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.remote import is_remote
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import CheckpointError, ConfigError, DataError
from engine.models.materialize import whole_model
from engine.serve.sample_text import TEXT
from engine.serve.source import Trained

NUM_ROWS, LONGEST_ROW = 16, 128
MASKED_EVERY = 7
Logits = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""Function from the inputs of transformers' model to its logits (B, T, V)."""
ALLOWED = {"fp32": 2e-4, "fp16": 0.01, "bf16": 0.05, "int8": 0.1}
"""Largest difference between the losses, in nats per token, by the dtype of the weights. In fp32 both sides compute
from the same weights, where no logit is off by more than 1e-4 (`read_back`) and so no loss by more than twice that;
the others leave room for the rounding of weights, 2^-12 (fp16), 2^-9 (bf16) and 2^-8 (int8, by row) of their size."""


@dataclass(frozen=True)
class HeldOutText:
    """Rows of tokens as inputs of transformers' model, and what has to be predicted."""

    inputs: dict[str, torch.Tensor]
    targets_BT: torch.Tensor
    counted_BT: torch.Tensor
    """True where a prediction counts."""
    origin: str

    @property
    def num_targets(self) -> int:
        return int(self.counted_BT.sum())

    def loss(self, logits: Logits) -> float:
        """Return the mean loss in nats per target, summed in fp64."""
        with torch.no_grad():
            logits_BTV = logits(self.inputs).double()
        return float(F.cross_entropy(logits_BTV[self.counted_BT], self.targets_BT[self.counted_BT]))


@dataclass(frozen=True)
class LossAgreement:
    """Losses of the trained model and of the exported one."""

    text: HeldOutText
    ours: float
    theirs: float
    allowed: float
    reader: str

    def __str__(self) -> str:
        return (
            f"{self.reader} agrees on held-out text ({self.text.origin}, {self.text.num_targets:,} targets): loss "
            f"{self.theirs:.6f}, ours {self.ours:.6f} (allowed difference {self.allowed:g})"
        )


def held_out_text(trained: Trained) -> HeldOutText:
    """Cut rows for a trained model from its run's validation data, or from a fixed text.

    Raises:
        ConfigError: the model predicts no tokens, so that text is no measure of it.
        DataError: the validation data cannot be read.
    """
    if trained.config.task_head is not None:
        raise ConfigError(
            f"a model with a head for {trained.config.task_head.task}, in {trained.checkpoint}",
            "a model that predicts tokens: what is written is held to its loss on text",
            "convert it --to huggingface, whose folder other exporters read",
        )
    ids, origin = _ids(trained)
    length = min(LONGEST_ROW, trained.config.max_positions, ids.size)
    count = min(NUM_ROWS, ids.size // length)
    rows_BT = torch.from_numpy(ids[: count * length].astype(np.int64)).view(count, length)
    return _with_targets(trained, rows_BT, origin)


def compare_losses(
    trained: Trained, text: HeldOutText, logits: Logits, dtype: str, reader: str, name: object
) -> LossAgreement:
    """Compare the loss of an exported model with ours; `name` is how errors call the export.

    Raises:
        CheckpointError: they differ by more than `ALLOWED` says for the dtype of the weights.
    """
    model = whole_model(trained.config, trained.weights).eval()
    found = LossAgreement(
        text,
        text.loss(lambda given: _our_logits(trained.config, model, given)),
        text.loss(logits),
        ALLOWED[dtype],
        reader,
    )
    if not abs(found.ours - found.theirs) <= found.allowed:  # so that NaN fails too
        raise CheckpointError(
            f"{name} is not the model of the run: {reader} gives a loss of {found.theirs:.6f} on held-out text, ours "
            f"is {found.ours:.6f}",
            f"a difference of at most {found.allowed:g} with weights in {dtype}",
            "the output was not kept; choose a wider --dtype, or report this with the versions of the packages",
        )
    return found


def logits_of(model: Any) -> Logits:
    """Return the function from inputs to logits of a model of transformers."""

    def logits(given: dict[str, torch.Tensor]) -> torch.Tensor:
        found = model(**given)
        return found["logits"] if "logits" in found else found["prediction_logits"]

    return logits


def _our_logits(config: ModelConfig, model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    if config.family == "t5":
        return model(tokens_BS=given["input_ids"], decoder_tokens_BT=given["decoder_input_ids"])["logits_BTV"]
    return model(tokens_BT=given["input_ids"])["logits_BTV"]


def _with_targets(trained: Trained, rows_BT: torch.Tensor, origin: str) -> HeldOutText:
    if trained.config.family == "gpt":
        # the last position of a row predicts nothing
        counted_BT = torch.ones_like(rows_BT, dtype=torch.bool)
        counted_BT[:, -1] = False
        return HeldOutText(_seen(rows_BT), rows_BT.roll(-1, dims=1), counted_BT, origin)
    known = None if trained.tokenizer is None else load_tokenizer(trained.tokenizer).vocabulary
    if trained.config.family == "bert":
        counted_BT = (torch.arange(rows_BT.shape[1]) % MASKED_EVERY == 0).expand_as(rows_BT)
        mask = 0 if known is None or known.mask is None else known.mask
        return HeldOutText(_seen(rows_BT.masked_fill(counted_BT, mask)), rows_BT, counted_BT, origin)
    read_BS, said_BT = (part.contiguous() for part in rows_BT.tensor_split(2, dim=1))
    start = 0 if known is None or known.padding is None else known.padding
    shifted_BT = F.pad(said_BT, (1, -1), value=start)
    inputs = {**_seen(read_BS), "decoder_input_ids": shifted_BT}
    return HeldOutText(inputs, said_BT, torch.ones_like(said_BT, dtype=torch.bool), origin)


def _seen(rows_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": rows_BT, "attention_mask": torch.ones_like(rows_BT)}


def _ids(trained: Trained) -> tuple[np.ndarray, str]:
    """Return token ids and where they are from."""
    if trained.tokenizer is None:
        return np.arange(NUM_ROWS * LONGEST_ROW) * 31 % trained.config.vocab_size, "made-up tokens"
    tokenizer = load_tokenizer(trained.tokenizer)
    for location in _validation(trained):
        try:
            tokens = TokenDataset(location, tokenizer.hash).shard(0).tokens[: NUM_ROWS * LONGEST_ROW]
        except (DataError, IndexError):
            continue
        if tokens.size >= LONGEST_ROW:
            return np.array(tokens), "the run's validation data"
    return tokenizer.encode([TEXT])[0], "a fixed text"


def _validation(trained: Trained) -> Iterator[str]:
    for stage in () if trained.run is None else trained.run.stages:
        yield from (str(one) for one in stage.data.validation_locations if not is_remote(one))
