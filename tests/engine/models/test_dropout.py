"""Masks against the hash written out with Python's integers, their statistics, and their independence of layout."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from engine.config.schema.model import ModelConfig, make_model
from engine.data.objectives.draws import dropout_keys
from engine.models.attention import view
from engine.models.dropout import ATTENTION, FFN_OUTPUT, KEYS, NUM_SITES, Dropout, drops, make
from engine.models.materialize import whole_model
from engine.parallel.functions import attention
from engine.parallel.recompute import recompute
from tests.engine.models.parity import assert_near, gradient_of
from tests.engine.models.tiny import BERT_FORMS, FORMS, T5_FORMS, random_weights

RATE = 0.3
CONFIG = make_model(
    vocab_size=500, num_layers=4, hidden_size=64, num_heads=4, max_positions=128, dropout=RATE, attention_dropout=RATE
)
ROWS = 6
KEYS_B = torch.tensor([3, -7, 2**62 + 5, -(2**63), 11, 12])
MASK64, MASK32 = 2**64 - 1, 2**32 - 1


def expected_to_stay(key: int, layer: int, site: int, place: int) -> bool:
    """The definition, in unbounded integers."""
    z = (key + ((layer + 1) * NUM_SITES + site) * 0x9E3779B97F4A7C15) & MASK64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK64
    z ^= z >> 31

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B & MASK32
        x = (x ^ x >> 13) * 0xC2B2AE35 & MASK32
        return x ^ x >> 16

    return mix(mix(place ^ z & MASK32) ^ z >> 32) & 0x7FFFFFFF >= int(RATE * 2**31)


def hidden(layer: int = 2, site: int = FFN_OUTPUT, keys_B: torch.Tensor = KEYS_B, length: int = 50) -> torch.Tensor:
    ones_BTD = torch.ones(len(keys_B), length, CONFIG.hidden_size)
    return Dropout(CONFIG, keys_B).hidden(ones_BTD, layer, site)


def probabilities(ones_BHQS: torch.Tensor, called_with: int = 0, **given: int) -> torch.Tensor:
    drop = Dropout(CONFIG, KEYS_B).probabilities(layer=1, first_head=called_with)
    assert drop is not None
    return drop(ones_BHQS, **given)


def test_masks_are_those_of_the_definition():
    kept_BTD, kept_BHQS = hidden() > 0, probabilities(torch.ones(ROWS, 4, 9, 7)) > 0
    for row, key in enumerate(KEYS_B.tolist()):
        for position, feature in ((0, 0), (1, 0), (17, 33), (49, 63)):
            place = position * 64 + feature
            assert kept_BTD[row, position, feature] == expected_to_stay(key, 2, FFN_OUTPUT, place)
        for head, query, other in ((0, 0, 0), (0, 0, 6), (2, 8, 3), (3, 8, 6)):
            place = (head * 128 + query) * 128 + other  # whatever the length of the row
            assert kept_BHQS[row, head, query, other] == expected_to_stay(key, 1, ATTENTION, place)


def test_the_rate_is_kept_and_the_mean_stays():
    """n draws: five standard errors."""
    dropped = hidden() == 0
    error = 5 * math.sqrt(RATE * (1 - RATE) / dropped.numel())
    assert abs(dropped.double().mean() - RATE) < error
    assert abs(hidden().double().mean() - 1) < error / (1 - RATE)
    assert hidden()[~dropped].unique().tolist() == pytest.approx([1 / (1 - RATE)])
    per_row = dropped.double().mean((1, 2))
    assert (per_row - RATE).abs().max() < error * math.sqrt(ROWS)
    along = dropped.double().mean((0, 1))  # each feature by itself
    assert (along - RATE).abs().max() < error * math.sqrt(CONFIG.hidden_size)


@pytest.mark.parametrize(
    "other",
    [
        lambda: hidden(layer=3),
        lambda: hidden(site=ATTENTION),
        lambda: hidden(keys_B=KEYS_B.roll(1)),
        lambda: hidden(keys_B=KEYS_B ^ 1),
        lambda: hidden(keys_B=KEYS_B + 1),
        lambda: hidden().roll(1, 1),
        lambda: hidden().roll(1, 2),
    ],
    ids=["layer", "site", "row", "key's last bit", "next key", "position", "feature"],
)
def test_masks_are_independent_of_one_another(other):
    """The correlation of n pairs of independent draws is within 5 / sqrt(n)."""
    first, second = ((x > 0).double().flatten() for x in (hidden(), other()))
    assert abs(torch.corrcoef(torch.stack((first, second)))[0, 1]) < 5 / math.sqrt(first.numel())


def test_keys_of_steps_and_samples_give_independent_masks():
    samples_B3 = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).numpy()
    keys = [torch.from_numpy(dropout_keys(1, step, samples_B3)) for step in (0, 1)]
    kept = torch.stack([(hidden(keys_B=key_B) > 0).double().flatten(1) for key_B in keys]).flatten(0, 1)
    correlations = torch.corrcoef(kept) - torch.eye(48)
    assert correlations.abs().max() < 6 / math.sqrt(kept.size(1))  # 1128 pairs


def test_a_part_of_a_row_or_of_the_heads_has_the_part_of_the_mask():
    whole = hidden()
    part = Dropout(CONFIG, KEYS_B, first_position=20).hidden(torch.ones(ROWS, 10, 64), 2, FFN_OUTPUT)
    assert torch.equal(part, whole[:, 20:30])
    assert torch.equal(hidden(length=30), whole[:, :30])
    assert torch.equal(hidden(keys_B=KEYS_B[2:3]), whole[2:3])
    heads = probabilities(torch.ones(ROWS, 4, 9, 9))
    assert torch.equal(probabilities(torch.ones(ROWS, 2, 9, 9), called_with=2), heads[:, 2:])
    assert torch.equal(probabilities(torch.ones(ROWS, 1, 9, 9), called_with=2, first_head=1), heads[:, 3:])


def test_backward_drops_what_forward_dropped():
    x_BTD = torch.randn(ROWS, 50, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    Dropout(CONFIG, KEYS_B).hidden(x_BTD, 2, FFN_OUTPUT).sum().backward()
    assert torch.equal(gradient_of(x_BTD), hidden())


@pytest.mark.parametrize("causal", [True, False])
def test_written_out_attention_is_the_kernel_s_where_nothing_is_dropped(causal):
    generator = torch.Generator().manual_seed(1)
    q_BTHK, (k_BTGK, v_BTGK) = torch.randn(2, 9, 4, 8, generator=generator), torch.randn(2, 2, 9, 2, 8)
    mask = None if causal else torch.rand(2, 1, 9, 9, generator=generator) > 0.3
    if mask is not None:
        mask |= torch.eye(9, dtype=torch.bool)
    added = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    for seen, scale in ((mask, None), (mask, 0.7), (added, None)):
        expected = attention(q_BTHK, k_BTGK, v_BTGK, seen, scale)
        assert_near(attention(q_BTHK, k_BTGK, v_BTGK, seen, scale, lambda probabilities: probabilities), expected)


def test_the_feed_forward_part_of_a_tensor_rank_has_its_features_masks():
    config = make_model(**(CONFIG.model_dump(include=set(ModelConfig.model_fields)) | {"family": "t5"}))
    ones_BTF = torch.ones(ROWS, 9, 256)
    assert Dropout(CONFIG, KEYS_B).inner(ones_BTF, 0) is ones_BTF, "GPT and BERT drop what it makes alone"
    whole_BTF = Dropout(config, KEYS_B).inner(ones_BTF, 3)
    assert not torch.equal(whole_BTF, ones_BTF)
    part_BTF = Dropout(config, KEYS_B, first_given=4, tensor_rank=2).inner(torch.ones(ROWS, 3, 64), 3)
    assert torch.equal(part_BTF, whole_BTF[:, 4:7, 128:192])


ALL_FORMS = FORMS | BERT_FORMS | T5_FORMS


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_model_drops_with_keys_alone_and_the_same_where_it_recomputes(form):
    config = ALL_FORMS[form].model_copy(update={"dropout": 0.2, "attention_dropout": 0.1})
    weights = random_weights(config)
    tokens_BT = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(2))
    inputs = {"tokens_BT": tokens_BT}
    if config.family == "t5":
        inputs = {"tokens_BS": tokens_BT, "decoder_tokens_BT": tokens_BT[:, :9]}
    keys_B = torch.tensor([5, 6])
    models = [whole_model(config, weights) for _ in range(2)]
    recompute(models[1].get_submodule("layers").children(), "full")
    without, plain, again = (
        model(**inputs, **given)["logits_BTV"]
        for model, given in ((models[0], {}), (models[0], {KEYS: keys_B}), (models[1], {KEYS: keys_B}))
    )
    assert torch.equal(plain, again)
    assert (plain - without).abs().max() > 0.01
    dropless = whole_model(config.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0}), weights)
    assert torch.equal(dropless(**inputs)["logits_BTV"], without)
    plain.square().sum().backward()
    again.square().sum().backward()
    for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if first.grad is not None:
            assert torch.equal(first.grad, gradient_of(second)), name


def test_each_rate_is_used_by_itself():
    assert not drops(CONFIG.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0}))
    only_hidden = CONFIG.model_copy(update={"attention_dropout": 0.0})
    ones_BTD = torch.ones(ROWS, 9, 64)
    seen = view(only_hidden, ones_BTD, None, dropout=make(only_hidden, KEYS_B, ones_BTD))
    assert seen.dropout is not None
    assert seen.probability_drop(0, 0) is None
    only_attention = CONFIG.model_copy(update={"dropout": 0.0})
    assert replace(seen.dropout, config=only_attention).hidden(ones_BTD, 0, 0) is ones_BTD
