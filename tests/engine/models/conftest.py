"""Fixtures over the forms of `tiny`."""

from __future__ import annotations

import pytest
import torch

from engine.config.schema.model import ModelConfig
from tests.engine.models.tiny import FORMS


@pytest.fixture(params=FORMS)
def config(request) -> ModelConfig:
    return FORMS[request.param]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of 24 tokens with uneven weights."""
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens_BT": torch.randint(0, 500, (2, 24), generator=generator),
        "targets_BT": torch.randint(0, 500, (2, 24), generator=generator),
        "weights_BT": torch.rand(2, 24, generator=generator).round(decimals=1),
    }
