"""A task's head with the head over the vocabulary beside it: both alone, summed; and the plan knows its parameters."""

import pytest
import torch

from engine.config.objectives import REPLAYED
from engine.config.schema.model import TaskHead, without_vocabulary
from engine.models.families import family
from engine.models.kept_head import HeadWithVocabulary
from engine.models.materialize import whole_model
from engine.plan.parameters import model_entries
from tests.engine.models.task_forms import FORMS, with_head
from tests.engine.models.tiny import random_weights

TOLERANCE = 1e-6
"""The same products, whose sums may be taken in another order."""


def kept(form, task="classification"):
    config = with_head(form, task, 2 if task == "question_answering" else 5)
    assert config.task_head is not None
    return config.model_copy(update={"task_head": config.task_head.model_copy(update={"keeps_vocabulary": True})})


@pytest.mark.parametrize("task", ["classification", "token_classification", "question_answering"])
@pytest.mark.parametrize("form", FORMS)
def test_the_plan_has_all_parameters(form, task):
    config = kept(form, task)
    entries = {entry.name: entry.numel - entry.padding for entry in model_entries(config)}
    specs = {spec.name: torch.Size(spec.stored_shape).numel() for spec in family(config).specs(config)}
    assert entries == specs


def given_for(config, task):
    B, T = 2, 6
    gen = torch.Generator().manual_seed(1)
    inputs = {
        "tokens_BT": torch.randint(4, 30, (B, T), generator=gen),
        "segments_BT": torch.zeros(B, T, dtype=torch.int32),
    }
    labels = {
        "classification": {"labels_B": torch.tensor([1, 0]), "label_weights_B": torch.tensor([1.0, 0.0])},
        "token_classification": {
            "labels_BT": torch.ones(B, T, dtype=torch.int64),
            "label_weights_BT": torch.tensor([[1.0], [0.0]]).expand(B, T),
        },
        "question_answering": {
            "label_spans_B2": torch.tensor([[1, 3], [0, 0]]),
            "label_weights_B": torch.tensor([1.0, 0.0]),
        },
    }[task]
    if config.family == "gpt" or task == "question_answering":
        labels["last_B"] = torch.tensor([T - 1, 0])
    text = {"targets_BT": torch.ones(B, T, dtype=torch.int64), "weights_BT": torch.tensor([[0.0], [1.0]]).expand(B, T)}
    if config.family == "bert":
        text = {
            "masked_BM": torch.tensor([[0, 0], [2, 4]]),
            "targets_BM": torch.tensor([[0, 0], [7, 9]]),
            "weights_BM": torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
        }
    return inputs, labels, text


@pytest.mark.parametrize("task", ["classification", "token_classification", "question_answering"])
@pytest.mark.parametrize("form", ["gpt2", "llama", "bert", "modernbert"])
def test_the_loss_is_the_sum_of_both(form, task):
    config = kept(form, task)
    weights = random_weights(config)
    both = whole_model(config, weights).eval()
    inputs, labels, text = given_for(config, task)
    replayed = {REPLAYED + name: one for name, one in text.items()}
    losses = both(**inputs, **labels, **replayed, by_row=True)

    def alone(model, given):
        names = {spec.name for spec in family(model).specs(model)}
        return whole_model(model, {name: one for name, one in weights.items() if name in names}).eval()(
            **inputs, **given, by_row=True
        )

    of_task = alone(without_vocabulary(config), labels)
    no_pairs = {"pair_head": False} if config.family == "bert" else {}
    of_text = alone(config.model_copy(update={"task_head": None} | no_pairs), text)
    expected = of_task["losses_L"] + of_text["losses_L"]
    assert losses["losses_L"].item() == pytest.approx(expected.item(), rel=TOLERANCE)
    rows = torch.cat([of_task["row_losses_BL"][:1], of_text["row_losses_BL"][1:]])
    torch.testing.assert_close(losses["row_losses_BL"], rows, rtol=TOLERANCE, atol=TOLERANCE)
    # an evaluation has rows of one kind
    with torch.no_grad():
        torch.testing.assert_close(both(**inputs, **labels)["losses_L"], of_task["losses_L"])
        torch.testing.assert_close(both(**inputs, **replayed)["losses_L"], of_text["losses_L"])
        assert "losses_L" not in both(**inputs)


def test_every_rank_runs_both_heads_also_where_rows_are_of_one_kind():
    config = kept("bert")
    head = family(config).configured_head(config)
    assert isinstance(head, HeadWithVocabulary)
    model = whole_model(config, random_weights(config)).eval()
    ran: list[str] = []
    for name in ("lm_head", "classifier"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    inputs, labels, text = given_for(config, "classification")
    for given in (labels, {REPLAYED + name: one for name, one in text.items()}):
        ran.clear()
        with torch.no_grad():
            model(**inputs, **given)
        assert sorted(ran) == ["classifier", "lm_head"]


def test_a_head_of_a_task_keeps_no_vocabulary_by_itself():
    assert not TaskHead(task="classification", num_labels=2).keeps_vocabulary
