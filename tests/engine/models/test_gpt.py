"""The GPT family against its transformers twins, against its own cuts, and against documents on their own.

The tolerance is derived in `parity`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from engine.config.schema.model import GPTConfig
from engine.models.attention import view
from engine.models.gpt import EMBEDDING, HEAD, build, sharding, specs, ties
from engine.models.materialize import whole_model
from engine.parallel.boundary import Tensors
from engine.parallel.functions import Band, Functions
from engine.parallel.functions import attention as plain_attention
from engine.parallel.sharding import ParameterSpec, lookup
from engine.plan.cut import ModelChunk
from tests.engine.models.parity import TOLERANCE, assert_near, build_stages, gradient_of, gradients_of, their_gradients
from tests.engine.models.tiny import random_weights, twin


def weighted_loss(logits_BTV: torch.Tensor, batch) -> torch.Tensor:
    loss_N = F.cross_entropy(logits_BTV.flatten(0, 1), batch["targets_BT"].flatten(), reduction="none")
    return (loss_N * batch["weights_BT"].flatten()).sum()


def loss_of(made: Tensors) -> torch.Tensor:
    return made["losses_L"].sum()


def test_logits_loss_and_gradients_equal_those_of_the_twin(config, batch):
    weights = random_weights(config)
    ours, theirs = whole_model(config, weights), twin(config, weights)

    logits_BTV = ours(tokens_BT=batch["tokens_BT"])["logits_BTV"]
    their_logits_BTV = theirs(batch["tokens_BT"]).logits
    assert logits_BTV.shape == their_logits_BTV.shape == (2, 24, config.vocab_size)
    assert_near(logits_BTV, their_logits_BTV, "logits")

    loss, their_loss = loss_of(ours(**batch)), weighted_loss(their_logits_BTV, batch)
    assert loss.dtype == torch.float32
    assert_near(loss, their_loss, "loss")
    loss.backward()
    their_loss.backward()
    gradients, expected_gradients = dict(ours.named_parameters()), their_gradients(theirs)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        assert_near(gradient_of(gradients[name])[: len(expected)], expected, name)


def test_loss_equals_the_twins_own_mean_loss(config, batch):
    weights = random_weights(config)
    tokens_BT = batch["tokens_BT"]
    weights_BT = torch.ones(tokens_BT.shape)
    weights_BT[:, -1] = 0  # the twin has no target for the last token
    made = whole_model(config, weights)(
        tokens_BT=tokens_BT, targets_BT=tokens_BT.roll(-1, dims=1), weights_BT=weights_BT
    )
    expected = twin(config, weights)(tokens_BT, labels=tokens_BT).loss
    assert_near(loss_of(made) / weights_BT.sum(), expected)


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_stages_in_a_row_equal_the_whole(config, batch, num_stages, packed):
    weights = random_weights(config)
    whole, stages = whole_model(config, weights), build_stages(config, weights, num_stages)
    segments_BT = torch.arange(24).expand(2, 24).div(7, rounding_mode="floor").int() if packed else None
    expected = loss_of(whole(**batch, segments_BT=segments_BT))
    expected.backward()

    made = stages[0](tokens_BT=batch["tokens_BT"], segments_BT=segments_BT)
    for stage in stages[1:-1]:
        made = stage(**made, segments_BT=segments_BT)
    made = stages[-1](
        **made,
        segments_BT=segments_BT,
        targets_BT=batch["targets_BT"],
        weights_BT=batch["weights_BT"],
    )
    loss = loss_of(made)
    loss.backward()

    assert torch.equal(loss, expected)
    gradients = gradients_of(stages, config)
    expected_gradients = dict(whole.named_parameters())
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_near(gradient, gradient_of(expected_gradients[name]), name)


def test_packed_documents_have_the_loss_they_have_alone(config):
    model = whole_model(config, random_weights(config))
    generator = torch.Generator().manual_seed(3)
    tokens_BT = torch.randint(0, 500, (1, 41), generator=generator)
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    lengths = (17, 1, 22)
    segments_BT = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    for number in range(3):
        inside = segments_BT[0] == number
        made = model(
            tokens_BT=inputs_BT[:, inside],
            targets_BT=targets_BT[:, inside],
            weights_BT=torch.ones(1, lengths[number]),
        )
        alone = loss_of(made)
        packed = {"tokens_BT": inputs_BT, "targets_BT": targets_BT, "weights_BT": inside[None].float()}
        assert abs(loss_of(model(**packed, segments_BT=segments_BT)) - alone) / lengths[number] < 1e-5
        if number > 0:  # without segments a later document does see the earlier one
            assert abs(loss_of(model(**packed)) - alone) / lengths[number] > 1e-3


def test_padded_vocabulary_changes_nothing(config, batch):
    weights = random_weights(config)
    exact = config.model_copy(update={"vocab_multiple": 1})
    assert (exact.padded_vocab_size, config.padded_vocab_size) == (500, 512)
    padded, unpadded = whole_model(config, weights), whole_model(exact, weights)
    loss = loss_of(padded(**batch))
    assert torch.allclose(loss, loss_of(unpadded(**batch)), rtol=TOLERANCE, atol=0)
    loss.backward()
    for name in {EMBEDDING, HEAD} & set(dict(padded.named_parameters())):
        parameter = padded.get_parameter(name)
        assert not gradient_of(parameter)[500:].any()
        # whatever stands in padded rows, the loss does not see it
        parameter.data[500:] = 100.0
    assert torch.equal(loss_of(padded(**batch)), loss)


def test_every_parameter_has_a_spec_and_every_pattern_a_parameter(config):
    found = specs(config)
    names = [spec.name for spec in found]
    with torch.device("meta"):
        model = build(config)
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == [(s.name, s.shape) for s in found]
    assert all(p.device.type == "meta" for p in model.parameters())
    assert not list(model.buffers()), "a buffer would not survive construction on the meta device"
    assert (HEAD in names) == (not config.tie_embeddings)
    table = sharding(config)
    for pattern in table.keys() - {HEAD}:
        assert any(lookup({pattern: table[pattern]}, name) is table[pattern] for name in names), pattern
    for spec in found:
        assert spec.sharding.dim is None or sum(spec.blocks()) == spec.shape[spec.sharding.dim]
        assert spec.real_rows == (500 if spec.name in (EMBEDDING, HEAD) else None)


def test_a_tied_head_is_one_parameter_on_one_stage_and_a_named_copy_on_two():
    config = GPTConfig(vocab_size=10, num_layers=2, hidden_size=8, num_heads=2, max_positions=4)
    whole = build(config)
    assert whole.get_parameter(HEAD) is whole.embed_tokens.weight
    assert HEAD not in dict(whole.named_parameters())
    last = build(config, ModelChunk(range(1, 2), first=False, last=True))
    assert HEAD in dict(last.named_parameters())
    assert ties(config) == {HEAD: EMBEDDING}
    assert ties(config.model_copy(update={"tie_embeddings": False})) == {}
    assert "layers.1.attention.qkv_proj.weight" in dict(last.named_parameters()), "layers keep their global index"


def test_tensor_parallel_parts_add_up_to_the_whole_attention(config):
    """The same modules work on some of the heads: what two ranks would compute, summed, is the whole."""
    model = whole_model(config, random_weights(config))
    whole = model.get_submodule("layers.1.attention")
    by_name: dict[str, ParameterSpec] = {spec.name: spec for spec in specs(config)}
    x_BTD = torch.randn(2, 9, config.hidden_size, generator=torch.Generator().manual_seed(4))
    seen = view(config, x_BTD, None)
    expected = whole(x_BTD, seen)
    total = torch.zeros(())
    for tensor_rank in range(2):
        part = copy.deepcopy(whole)
        for name, parameter in part.named_parameters():
            value = by_name[f"layers.1.attention.{name}"].part(parameter.detach(), tensor_rank, 2)
            # a row-parallel bias is added once
            parameter.data = value * (tensor_rank == 0) if name == "out_proj.bias" else value
        total = total + part(x_BTD, seen)
    assert_near(total, expected)


def test_attention_and_loss_come_from_the_functions_that_it_was_built_with(config, batch):
    calls = []

    def attention(q_BTHK, k_BTGK, v_BTGK, mask_B1TT, scale=None, drop=None):
        calls.append((q_BTHK.shape[2:], k_BTGK.shape[2:], mask_B1TT))
        return plain_attention(q_BTHK, k_BTGK, v_BTGK, mask_B1TT, scale, drop)

    def linear_cross_entropy(hidden_BTD, weight_VD, bias_V, targets_BT, weights_BT, vocab_size):
        assert weight_VD.shape == (config.padded_vocab_size, hidden_BTD.shape[-1])
        assert bias_V is None
        return hidden_BTD.float().sum() * 0 + vocab_size

    model = whole_model(config, random_weights(config), Functions(attention, linear_cross_entropy=linear_cross_entropy))
    assert loss_of(model(**batch)).item() == config.vocab_size
    expected_shapes = ((4, config.head_size), (config.num_kv_heads, config.head_size))
    assert [call[:2] for call in calls] == [expected_shapes] * config.num_layers
    # 24 tokens in blocks of less than 12: only windows that are as wide have a mask of pairs
    kind = torch.Tensor if (config.sliding_window or 0) > 12 else Band
    expected = [None if config.reach(layer) is None else kind for layer in range(config.num_layers)]
    assert [None if mask is None else type(mask) for _, _, mask in calls] == expected


def test_bf16_stays_near_fp32(config, batch):
    """bf16 keeps 8 bits (2**-9 per rounding); the loss of 48 tokens averages their errors out to about 1 %."""
    weights = random_weights(config)
    expected = loss_of(whole_model(config, weights)(**batch))
    loss = loss_of(whole_model(config, weights).bfloat16()(**batch))
    assert loss.dtype == torch.float32
    assert loss != expected
    assert abs(loss / expected - 1) < 0.02
