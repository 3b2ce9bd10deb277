"""The iteration against singular value decomposition, blocks by themselves, and who computes what."""

import numpy as np
import pytest
import torch

from engine.config.schema.model import GPTConfig
from engine.config.schema.optimizer import OptimizerConfig
from engine.models import gpt
from engine.optim.groups import make_optimizer, parameter_groups
from engine.optim.muon import COEFFICIENTS, Owners, cost, orthogonal, scaled_orthogonal
from engine.parallel.groups import Group
from engine.parallel.sharding import ROW, ParameterSpec, column


def polynomial(values: np.ndarray) -> np.ndarray:
    """What five iterations do to the singular values of a matrix of norm 1."""
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5)])
def test_the_iteration_moves_singular_values_and_keeps_their_vectors(shape):
    """An odd polynomial of a matrix acts on its singular values alone; fp32 rounding, five times amplified 3.4-fold."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    expected = left @ np.diag(polynomial(values / np.linalg.norm(values))) @ right
    np.testing.assert_allclose(orthogonal(matrix).numpy(), expected, atol=2e-4)


def test_singular_values_come_near_one():
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_fused_blocks_are_orthogonalised_by_themselves_and_scaled():
    spec = ParameterSpec("qkv", (12, 5), column(6, 3, 3))
    update = torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
    found = scaled_orthogonal(spec, update)
    for first, end, longest in ((0, 6, 6), (6, 9, 5), (9, 12, 5)):
        torch.testing.assert_close(found[first:end], orthogonal(update[first:end]) * 0.2 * longest**0.5)
    row = ParameterSpec("out", (5, 12), ROW)
    torch.testing.assert_close(scaled_orthogonal(row, update.T), orthogonal(update.T) * 0.2 * 12**0.5)


def test_the_work_is_balanced_and_everyone_finds_the_same_owners():
    costs = [7, 1, 9, 3, 3, 8, 2, 2]
    found = [Owners(costs, [[1] * 3] * 8, Group((0, 1, 2), position)) for position in range(3)]
    assert found[0].owners == found[1].owners == found[2].owners
    loads = [sum(costs[index] for index in owners.mine) for owners in found]
    assert sum(loads) == sum(costs)
    assert max(loads) <= sum(costs) / 3 + max(costs) / 3, "no further from the mean than one tensor of it"


def test_a_block_costs_what_its_own_shape_costs():
    assert cost(ParameterSpec("qkv", (12, 5), column(6, 3, 3))) == 6 * 5 * 5 + 2 * 3 * 5 * 3
    assert cost(ParameterSpec("out", (5, 12), ROW)) == 5 * 12 * 5


def test_linear_layers_alone_are_matrices():
    model = GPTConfig(vocab_size=50, num_layers=2, hidden_size=8, num_heads=2, tie_embeddings=False)
    groups = parameter_groups(gpt.specs(model), OptimizerConfig(name="muon"))
    names = {spec.name for group in groups if group.matrices for spec in group.specs}
    parts = ("attention.qkv_proj", "attention.out_proj", "ffn.up_proj", "ffn.down_proj")
    assert names == {f"layers.{layer}.{part}.weight" for layer in (0, 1) for part in parts}
    assert {group.moments for group in groups if group.matrices} == {("momentum_buffer",)}
    assert not any(group.matrices for group in parameter_groups(gpt.specs(model), OptimizerConfig()))


def test_adamw_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(3))
    assert type(make_optimizer([{"params": [parameter]}], OptimizerConfig())) is torch.optim.AdamW


def test_join_is_the_inverse_of_part():
    for sharding in (column(4, 8), ROW):
        spec = ParameterSpec("x", (12, 4), sharding)
        whole = torch.arange(48.0).view(12, 4)
        assert torch.equal(spec.join([spec.part(whole, rank, 2) for rank in range(2)]), whole)
