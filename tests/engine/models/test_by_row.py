"""A last stage that is asked `by_row` tells each row's part of the losses, and its losses are the same bits."""

import pytest
import torch

from engine.models.families import family
from engine.models.initial import initial_value
from engine.models.materialize import fill
from tests.distributed.batches import GLOBAL_BATCH, global_batch
from tests.distributed.cases import Case, config_of


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "modernbert", "t5"])
def test_a_row_s_part_is_the_loss_that_it_has_alone(name):
    config = config_of(Case(name)).model
    kind = family(config)
    specs, ties = {spec.name: spec for spec in kind.specs(config)}, kind.ties(config)
    model = kind.build(config)
    fill(model, lambda local: initial_value(specs[ties.get(local, local)], config, 3))
    batch = global_batch(0, "document", name)
    plain, told = model(**batch), model(**batch, by_row=True)
    assert plain.keys() | {"row_losses_BL"} == told.keys()
    assert torch.equal(plain["losses_L"], told["losses_L"])
    rows_BL = told["row_losses_BL"]
    assert not rows_BL.requires_grad
    assert rows_BL.shape == (GLOBAL_BATCH, len(kind.configured_head(config).losses))
    for b in range(GLOBAL_BATCH):
        alone_L = model(**{key: held[b : b + 1] for key, held in batch.items()})["losses_L"]
        # a dozen terms of about ln 61 in fp32, each of a matrix product that is cut elsewhere
        torch.testing.assert_close(rows_BL[b], alone_L.detach(), rtol=2e-6, atol=2e-6)
