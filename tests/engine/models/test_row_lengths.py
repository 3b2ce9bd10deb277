"""A row's loss and gradients do not depend on how far it is padded, with dropout, too."""

import pytest
import torch

from engine.models.dropout import KEYS
from engine.models.families import family
from engine.models.materialize import whole_model
from tests.engine.models.task_forms import with_head
from tests.engine.models.tiny import random_weights

LENGTHS, SHORT, LONG = (5, 7, 3), 8, 12


FORMS = ("gpt2", "llama", "mistral", "bert", "roberta", "modernbert", "modernbert-mean")
OF_TOKENS = [(form, task) for form in FORMS[:-1] for task in ("token_classification", "question_answering")]


def labels(task, length):
    """Labels of the rows: one of each, one of each token, or the ends of an answer; none of the padding."""
    if task == "token_classification":
        is_token_BT = torch.arange(length) < torch.tensor(LENGTHS)[:, None]
        return {
            "labels_BT": torch.arange(length).expand(3, -1) % 5 * is_token_BT,
            "label_weights_BT": is_token_BT * 0.7,
        }
    weights = {"label_weights_B": torch.ones(len(LENGTHS))}
    if task == "question_answering":
        return weights | {"label_spans_B2": torch.tensor([[1, 4], [0, 0], [2, 2]])}
    return weights | {"labels_B": torch.tensor([0, 1, 2])}


def losses(config, weights, length):
    """Loss of the rows padded to `length`, and the gradient of every parameter."""
    model = whole_model(config, weights).train().requires_grad_(True)
    generator = torch.Generator().manual_seed(3)
    tokens_BT = torch.randint(5, config.vocab_size, (len(LENGTHS), LONG), generator=generator)[:, :length]
    padding_BT = torch.arange(length) >= torch.tensor(LENGTHS)[:, None]
    tokens_BT = tokens_BT.masked_fill(padding_BT, 1)
    given = {"tokens_BT": tokens_BT, "segments_BT": padding_BT.int(), KEYS: torch.tensor([11, 12, 13])}
    given |= labels(config.task_head.task, length)
    if "last_B" in family(config).configured_head(config).inputs:
        given["last_B"] = torch.tensor(LENGTHS) - 1
    loss = model(**given)["losses_L"].sum()
    loss.backward()
    return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize(("form", "task"), [*((form, "classification") for form in FORMS), *OF_TOKENS])
def test_padding_changes_nothing(form, task):
    config = with_head(form, task, 2 if task == "question_answering" else 5, dropout=0.2, attention_dropout=0.2)
    weights = random_weights(config)
    (short, short_gradients), (long, long_gradients) = (losses(config, weights, length) for length in (SHORT, LONG))
    # fp32, and sums over the padding's zeros in another order
    assert short == pytest.approx(long, rel=2e-6)
    for name, gradient in long_gradients.items():
        torch.testing.assert_close(
            short_gradients[name], gradient, rtol=0, atol=2e-6 * (1 + gradient.abs().max().item())
        )
