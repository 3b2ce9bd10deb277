"""A family is built with the head that it is given: here one that scores each row, in the place of the vocabulary's."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from engine.models.families import family
from engine.models.initial import initial_value
from engine.models.materialize import fill
from engine.parallel.functions import Functions
from engine.parallel.sharding import Table
from engine.plan.cut import ModelChunk
from tests.distributed.batches import GLOBAL_BATCH, global_batch
from tests.distributed.cases import Case, config_of

TARGETS = torch.arange(GLOBAL_BATCH) % 3


@dataclass(frozen=True)
class RowClassifier:
    """Three classes of rows, read from the first position."""

    width: int
    losses: tuple[str, ...] = ("classes",)
    inputs: frozenset[str] = frozenset({"classes_B"})
    sharding: Table = field(default_factory=dict)

    def modules(self, functions: Functions) -> dict[str, nn.Module]:
        return {"classifier": nn.Linear(self.width, 3)}

    def outputs(self, chunk, hidden_BTD, given, by_row, dropout=None):
        logits_BC = chunk.classifier(hidden_BTD[:, 0])
        if "classes_B" not in given:
            return {"logits_BC": logits_BC}
        return {"losses_L": nn.functional.cross_entropy(logits_BC, given["classes_B"], reduction="sum").reshape(1)}


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_another_head_takes_the_place_of_the_vocabulary_s(name):
    config = config_of(Case(name)).model
    kind, head = family(config), RowClassifier(config.hidden_size)
    specs = {spec.name: spec for spec in kind.specs(config, head)}
    own = {spec.name for spec in kind.specs(config)}
    assert specs.keys() - own == {"classifier.weight", "classifier.bias"}
    assert not {name for name in specs if name.startswith(("lm_head", "head_", "pooler", "pair_head"))}
    last = ModelChunk(range(config.num_layers - 1, config.num_layers), first=False, last=True)
    assert "classes_B" in kind.inputs(config, last, head)
    assert not {name for name in kind.inputs(config, last, head) if name.startswith(("targets", "weights", "masked"))}

    model = kind.build(config, head=head)
    fill(model, lambda local: initial_value(specs[local], config, 3))
    body = kind.inputs(config, ModelChunk(range(config.num_layers), first=True, last=False))
    given = {key: tensor for key, tensor in global_batch(0, "document", name).items() if key in body}
    logits_BC = model(**given)["logits_BC"]
    loss = model(**given, classes_B=TARGETS)["losses_L"].sum()
    expected = -torch.log_softmax(logits_BC, 1)[torch.arange(GLOBAL_BATCH), TARGETS].sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
