"""The run that every layout must equal, in one plain torch loop in fp64: the whole batch at once, `clip_grad_norm_`,
unfused AdamW, and Muon as its authors write it, over matrices that are whole.

fp64, so that a layout answers for its own rounding only. The same loop in fp32, and in bf16 with masters in fp32, says
how far rounding leads a model that is in no layout at all: see `parity`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from engine.config.parameter_patterns import matches
from engine.config.schema.model import ModelConfig
from engine.models.families import family
from engine.models.initial import initial_value
from engine.models.materialize import fill
from engine.optim.groups import weight_decay
from tests.distributed.batches import global_batch, weights
from tests.distributed.cases import CLIP_NORM, LEARNING_RATE, NUM_STEPS, Case, Result, config_of


def reference(case: Case, dtype: torch.dtype = torch.float64) -> Result:
    """The run of a case, whatever its layout."""
    config = config_of(case)
    kind = family(config.model)
    model = kind.build(config.model)
    specs = {spec.name: spec for spec in kind.specs(config.model)}
    ties = kind.ties(config.model)
    fill(model, lambda name: initial_value(specs[ties.get(name, name)], config.model, config.seed))
    summed = torch.promote_types(dtype, torch.float32)
    masters = {name: torch.nn.Parameter(p.detach().to(summed, copy=True)) for name, p in model.named_parameters()}
    named = dict(model.to(dtype).named_parameters())
    frozen = {name: masters.pop(name) for name in named if matches(name, case.freeze)}
    for name in frozen:
        named[name].requires_grad_(False)
    matrices = {name: p for name, p in masters.items() if case.optimizer == "muon" and is_matrix_of_a_layer(name, p)}
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter], "weight_decay": weight_decay(name, config.optimizer)}
            for name, parameter in masters.items()
            if name not in matrices
        ],
        lr=LEARNING_RATE,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.epsilon,
        fused=False,
        foreach=False,
    )
    muon = PlainMuon(config.model, matrices, config.optimizer.weight_decay)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        batch = global_batch(step, case.attention, case.model)
        batch = {name: held.to(summed) if held.is_floating_point() else held for name, held in batch.items()}
        with nothing_rounded_below(summed):
            loss = (model(**batch)["losses_L"] / weights(batch)).sum()
            loss.backward()
        for name, master in masters.items():
            grad = named[name].grad
            assert grad is not None
            master.grad = grad.to(summed)
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), CLIP_NORM)))
        optimizer.step()
        muon.step()
        model.zero_grad()
        with torch.no_grad():
            for name, master in masters.items():
                named[name].copy_(master)
        losses.append(loss.item())
    assert case.freeze or min(norms) > CLIP_NORM, "clipping has to be active in every step"
    return Result(losses, norms, {name: p.detach().numpy() for name, p in (masters | frozen).items()})


@contextmanager
def nothing_rounded_below(dtype: torch.dtype) -> Iterator[None]:
    """In fp64 what asks for fp32 (norms, rotations) keeps fp64."""
    real = torch.Tensor.float
    keep = lambda tensor: tensor if tensor.dtype == dtype else real(tensor)  # noqa: E731
    with patch.object(torch.Tensor, "float", keep):
        yield


def is_matrix_of_a_layer(name: str, parameter: torch.Tensor) -> bool:
    """What Muon updates: not embeddings, heads, norms or biases."""
    return name.startswith("layers.") and parameter.dim() == 2


class PlainMuon:
    """Jordan et al. 2024, with updates scaled to the size of AdamW's (Liu et al. 2025, section 2.2)."""

    def __init__(self, model: ModelConfig, matrices: dict[str, torch.nn.Parameter], decay: float) -> None:
        self.matrices, self.decay = matrices, decay
        self.momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}
        heads, pairs = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
        self.fused = {
            "qkv_proj": [heads, pairs, pairs],
            "kv_proj": [heads, heads],
            "gate_up_proj": [model.feed_forward_size, model.feed_forward_size],
        }
        """Rows of the projections that one matrix holds, each orthogonalised by itself."""

    @torch.no_grad()
    def step(self) -> None:
        for name, p in self.matrices.items():
            assert p.grad is not None
            self.momenta[name] = 0.95 * self.momenta[name] + p.grad
            parts = (p.grad + 0.95 * self.momenta[name]).split(self.fused.get(name.split(".")[-2], [len(p)]))
            update = torch.cat([newton_schulz(part) * 0.2 * max(part.shape) ** 0.5 for part in parts])
            p.mul_(1 - LEARNING_RATE * self.decay).sub_(LEARNING_RATE * update)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """As the authors write it: wide matrices, five steps, their coefficients."""
    x = matrix / (matrix.norm() + 1e-7)
    if matrix.size(0) > matrix.size(1):
        x = x.T
    for _ in range(5):
        a = x @ x.T
        b = -4.7750 * a + 2.0315 * a @ a
        x = 3.4445 * x + b @ x
    return x.T if matrix.size(0) > matrix.size(1) else x
