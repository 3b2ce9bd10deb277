"""Heads of tasks: logits, losses and gradients of transformers' classes, and dropout around the head."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from engine.checkpoint.interchange.huggingface import from_huggingface
from engine.errors import ConfigError
from engine.models.dropout import make
from engine.models.families import family
from engine.models.materialize import whole_model
from engine.plan.families import figures
from tests.engine.models.task_forms import FORMS, NUM_LABELS, with_head
from tests.engine.models.tiny import random_weights, twin

LENGTHS = (7, 12, 3)
TASKS = {"classification": NUM_LABELS, "token_classification": NUM_LABELS, "question_answering": 2}
MEANS = ("modernbert-mean", "modernbert-biased-mean")
OF_TOKENS = ("token_classification", "question_answering")


def rows(config):
    """Rows of different lengths, as ours and as theirs take them."""
    generator = torch.Generator().manual_seed(3)
    tokens_BT = torch.randint(5, config.vocab_size, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask_BT = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    tokens_BT[~mask_BT] = 1  # RoBERTa's padding token, from which theirs count positions
    ours = {"tokens_BT": tokens_BT, "segments_BT": (~mask_BT).int(), "last_B": torch.tensor(LENGTHS) - 1}
    return ours, {"input_ids": tokens_BT, "attention_mask": mask_BT.long()}


@pytest.mark.parametrize("form", [*FORMS, *MEANS])
def test_logits_are_those_of_the_class_for_sequences(form):
    config = with_head(form)
    weights = random_weights(config)
    theirs, model = twin(config, weights), whole_model(config, weights)
    assert type(theirs).__name__.endswith("ForSequenceClassification")
    theirs.config.pad_token_id = 1
    ours, inputs = rows(config)
    with torch.inference_mode():
        expected_BC, found_BC = theirs(**inputs).logits, model(**ours)["logits_BC"]
    assert expected_BC.shape == (len(LENGTHS), NUM_LABELS)
    # fp32 and other orders of sums: some units in the last place of the largest logit
    torch.testing.assert_close(found_BC, expected_BC, rtol=0, atol=2e-5 * expected_BC.abs().max().item())


@pytest.mark.parametrize("task", OF_TOKENS)
@pytest.mark.parametrize("form", FORMS)
def test_logits_of_tokens_and_their_losses_are_those_of_theirs(form, task):
    config = with_head(form, task, TASKS[task])
    weights = random_weights(config)
    theirs, model = twin(config, weights), whole_model(config, weights)
    ending = {"token_classification": "ForTokenClassification", "question_answering": "ForQuestionAnswering"}[task]
    assert type(theirs).__name__.endswith(ending)
    theirs.config.pad_token_id = 1
    ours, inputs = rows(config)
    last_B = ours.pop("last_B")
    with torch.inference_mode():
        found_BTC = model(**ours)["logits_BTC"]
        if task == "token_classification":
            labels_BT = torch.arange(found_BTC.size(1)).expand(len(LENGTHS), -1) % NUM_LABELS
            weights_BT = ((labels_BT != 3) & (inputs["attention_mask"] == 1)).float()
            output = theirs(**inputs, labels=labels_BT.masked_fill(weights_BT == 0, -100))
            expected_BTC, expected = output.logits, output.loss * weights_BT.sum()
            given = {"labels_BT": labels_BT, "label_weights_BT": weights_BT}
        else:
            spans_B2 = torch.tensor([[2, 6], [0, 0], [1, 2]])
            output = theirs(**inputs)
            expected_BTC = torch.stack([output.start_logits, output.end_logits], dim=-1)
            # Theirs of each row alone: in a batch their softmax has the padding in it.
            expected = torch.stack(
                [
                    theirs(
                        **{name: tensor[row : row + 1, :length] for name, tensor in inputs.items()},
                        start_positions=spans_B2[row : row + 1, 0],
                        end_positions=spans_B2[row : row + 1, 1],
                    ).loss
                    for row, length in enumerate(LENGTHS)
                ]
            ).sum()
            given = {"label_spans_B2": spans_B2, "label_weights_B": torch.ones(len(LENGTHS)), "last_B": last_B}
        made = model(**ours, **given, by_row=True)
    real_BT = inputs["attention_mask"].bool()
    tolerance = 2e-5 * expected_BTC.abs().max().item()
    torch.testing.assert_close(found_BTC[real_BT], expected_BTC[real_BT], rtol=0, atol=tolerance)
    torch.testing.assert_close(made["losses_L"], expected.reshape(1))
    torch.testing.assert_close(made["row_losses_BL"].sum(0), made["losses_L"])


def test_a_padding_row_of_answers_has_no_loss():
    config = with_head("bert", "question_answering", 2)
    model = whole_model(config, random_weights(config))
    ours, _ = rows(config)
    zeros_B = torch.zeros(len(LENGTHS), dtype=torch.int64)
    given = {"label_spans_B2": torch.zeros(3, 2, dtype=torch.int64), "label_weights_B": zeros_B.float()}
    found = model(**(ours | {"last_B": zeros_B}), **given)["losses_L"]
    assert found.tolist() == [0.0]


@pytest.mark.parametrize("form", ["bert", "llama", "modernbert", "modernbert-mean"])
def test_losses_are_sums_over_rows_and_weigh_as_told(form):
    config = with_head(form)
    model = whole_model(config, random_weights(config))
    ours, _ = rows(config)
    logits_BC = model(**ours)["logits_BC"]
    labels_B, weights_B = torch.tensor([4, 0, 2]), torch.tensor([1.0, 0.0, 2.5])
    found = model(**ours, labels_B=labels_B, label_weights_B=weights_B, by_row=True)
    expected_B = F.cross_entropy(logits_BC, labels_B, reduction="none") * weights_B
    torch.testing.assert_close(found["losses_L"], expected_B.sum().reshape(1))
    torch.testing.assert_close(found["row_losses_BL"], expected_B.unsqueeze(1))


def test_a_regression_has_the_squared_error():
    config = with_head("bert", "regression", 1)
    model = whole_model(config, random_weights(config))
    ours, _ = rows(config)
    numbers_BC, weights_B = torch.tensor([[0.5], [-2.0], [1.0]]), torch.tensor([1.0, 1.0, 0.0])
    found = model(**ours, labels_BC=numbers_BC, label_weights_B=weights_B)["losses_L"]
    expected = F.mse_loss(model(**ours)["logits_BC"][:2], numbers_BC[:2], reduction="sum")
    torch.testing.assert_close(found, expected.reshape(1))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", FORMS)
def test_the_plan_has_the_parameters_of_the_model(form, task):
    config = with_head(form, task, TASKS[task])
    built = {spec.name: spec.shape for spec in family(config).specs(config)}
    planned = figures(config).entries(config, range(config.num_layers), is_first=True, is_last=True)
    assert {entry.name: entry.shape for entry in planned} == built


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_fine_tuned_model_of_theirs_comes_in_as_it_went_out(form, task):
    config = with_head(form, task, TASKS[task])
    weights = random_weights(config)
    back, found = from_huggingface(twin(config, weights))
    assert back.task_head == config.task_head
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize("form", MEANS)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_pooling_comes_in_as_it_went_out(form, task):
    config = with_head(form, task, TASKS.get(task, 1))
    theirs = twin(config, random_weights(config))
    assert theirs.config.classifier_pooling == "mean"
    assert from_huggingface(theirs)[0].task_head == config.task_head
    theirs.config.__dict__["classifier_pooling"] = "max"  # which newer releases of theirs do not take
    with pytest.raises(ConfigError, match="classifier_pooling = 'max'"):
        from_huggingface(theirs)


@pytest.mark.parametrize(("form", "drops"), [("bert", True), ("roberta", True), ("modernbert", False), ("gpt2", False)])
def test_only_berts_head_drops_out_and_not_like_any_layer(form, drops):
    config = with_head(form, dropout=0.5)
    model: Any = whole_model(config, random_weights(config))
    hidden_BTD = torch.randn(2, 4, config.hidden_size, generator=torch.Generator().manual_seed(1))
    dropout = make(config, torch.tensor([11, 12]), hidden_BTD)
    quiet = model.head.outputs(model, hidden_BTD, {}, by_row=False)["logits_BC"]
    loud = model.head.outputs(model, hidden_BTD, {}, by_row=False, dropout=dropout)["logits_BC"]
    assert torch.equal(quiet, loud) != drops


@pytest.mark.parametrize(("form", "drops"), [("bert", True), ("gpt2", True), ("modernbert", False)])
def test_tokens_are_dropped_before_they_are_classified(form, drops):
    config = with_head(form, "token_classification", dropout=0.5)
    model: Any = whole_model(config, random_weights(config))
    hidden_BTD = torch.randn(2, 4, config.hidden_size, generator=torch.Generator().manual_seed(1))
    dropout = make(config, torch.tensor([11, 12]), hidden_BTD)
    quiet = model.head.outputs(model, hidden_BTD, {}, by_row=False)["logits_BTC"]
    loud = model.head.outputs(model, hidden_BTD, {}, by_row=False, dropout=dropout)["logits_BTC"]
    assert torch.equal(quiet, loud) != drops
    assert dropout is not None
    # A rank that is given the second half of the row drops what the whole row does there.
    second = replace(dropout, first_position=2, first_given=2)
    half = model.head.outputs(model, hidden_BTD[:, 2:], {}, by_row=False, dropout=second)["logits_BTC"]
    torch.testing.assert_close(half, loud[:, 2:])
