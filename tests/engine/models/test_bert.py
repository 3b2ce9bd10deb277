"""The BERT family against its transformers twins, against its own cuts, and against documents on their own.

The tolerance is derived in `parity`.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from engine.config.schema.model import ModelConfig
from engine.models.bert import EMBEDDING, HEAD, build, configured_head, inputs, sharding, specs, ties
from engine.models.embedding_shift import SHIFT
from engine.models.families import family
from engine.models.initial import initial_value
from engine.models.materialize import whole_model
from engine.parallel.sharding import lookup
from engine.plan.cut import ModelChunk
from tests.engine.models.parity import assert_near, build_stages, cut, gradient_of, gradients_of, their_gradients
from tests.engine.models.tiny import BERT_FORMS, random_weights, twin

PADDING_ID = 1
"""RoBERTa's; in no row but where there is padding."""
Batch = dict[str, torch.Tensor]


@pytest.fixture(params=BERT_FORMS)
def config(request) -> ModelConfig:
    return BERT_FORMS[request.param]


@pytest.fixture
def batch(config) -> Batch:
    """Two rows of 24 places, the second with 5 of padding, uneven weights, unused places of masked tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(2, 500, (2, 24), generator=generator)
    tokens_BT[1, 19:] = PADDING_ID
    made = {
        "tokens_BT": tokens_BT,
        "segments_BT": (tokens_BT == PADDING_ID).int(),
        "masked_BM": torch.tensor([[3, 7, 8, 21], [2, 11, 0, 0]]),
        "targets_BM": torch.randint(0, 500, (2, 4), generator=generator),
        "weights_BM": torch.tensor([[1.0, 0.5, 2.0, 1.0], [1.0, 0.25, 0.0, 0.0]]),
    }
    if config.token_types > 1:
        made["token_types_BT"] = (torch.arange(24) > 10).long().expand(2, 24).contiguous()
    if config.pair_head:
        made |= {"pair_targets_B": torch.tensor([1, 0]), "pair_weights_B": torch.tensor([0.5, 2.0])}
    return made


def theirs_of(theirs, batch: Batch):
    types = {"token_type_ids": batch["token_types_BT"]} if "token_types_BT" in batch else {}
    return theirs(batch["tokens_BT"], attention_mask=1 - batch["segments_BT"], **types)


def their_losses(output, batch: Batch) -> torch.Tensor:
    logits_BTV = output["prediction_logits"] if "prediction_logits" in output else output["logits"]
    logits_BMV = torch.stack([row[places] for row, places in zip(logits_BTV, batch["masked_BM"], strict=True)])
    loss_N = F.cross_entropy(logits_BMV.flatten(0, 1), batch["targets_BM"].flatten(), reduction="none")
    found = [(loss_N * batch["weights_BM"].flatten()).sum()]
    if "pair_targets_B" in batch:
        loss_B = F.cross_entropy(output["seq_relationship_logits"], batch["pair_targets_B"], reduction="none")
        found.append((loss_B * batch["pair_weights_B"]).sum())
    return torch.stack(found)


def test_logits_losses_and_gradients_equal_those_of_the_twin(config, batch):
    weights = random_weights(config)
    ours, theirs = whole_model(config, weights), twin(config, weights)
    given = {name: batch[name] for name in ("tokens_BT", "token_types_BT", "segments_BT") if name in batch}
    made, output = ours(**given), theirs_of(theirs, batch)
    real_BT = batch["segments_BT"] == 0
    their_logits_BTV = output["prediction_logits" if config.pair_head else "logits"]
    assert made["logits_BTV"].shape == their_logits_BTV.shape == (2, 24, config.vocab_size)
    assert_near(made["logits_BTV"][real_BT], their_logits_BTV[real_BT], "logits")
    if config.pair_head:
        assert_near(made["pair_logits_BC"], output["seq_relationship_logits"], "pair logits")

    losses_L, expected_L = ours(**batch)["losses_L"], their_losses(output, batch)
    assert losses_L.dtype == torch.float32
    assert len(losses_L) == len(configured_head(config).losses)
    assert_near(losses_L, expected_L, "losses")
    scales_L = torch.tensor([1.0, 3.0])[: len(losses_L)]  # each loss has a denominator of its own
    (losses_L * scales_L).sum().backward()
    (expected_L * scales_L).sum().backward()
    gradients, expected_gradients = dict(ours.named_parameters()), their_gradients(theirs)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        found = gradient_of(gradients[name])[: len(expected)]
        if name == EMBEDDING or name.startswith("embed_positions"):
            # theirs keep the padding token's rows from learning, and give padding other positions; no loss sees either
            found, expected = found[2:], expected[2:]
        assert_near(found, expected, name)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_stages_in_a_row_equal_the_whole(config, batch, num_stages):
    weights = random_weights(config)
    whole, stages = whole_model(config, weights), build_stages(config, weights, num_stages)
    expected_L = whole(**batch)["losses_L"]
    expected_L.sum().backward()
    chunks = cut(config, num_stages)
    made: Batch = {}
    for stage, chunk in zip(stages, chunks, strict=True):
        own = {name: value for name, value in batch.items() if name in inputs(config, chunk)}
        made = stage(**(made | own | {"segments_BT": batch["segments_BT"]}))
    assert torch.equal(made["losses_L"], expected_L)
    assert set.union(*(set(inputs(config, chunk)) for chunk in chunks)) == batch.keys() | {SHIFT}
    assert inputs(config, ModelChunk(range(1, 2), first=False, last=False)) == frozenset()
    made["losses_L"].sum().backward()
    gradients, expected = gradients_of(stages, config), dict(whole.named_parameters())
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_near(gradient, gradient_of(expected[name]), name)


def test_packed_documents_have_the_loss_they_have_alone():
    config = BERT_FORMS["modernbert"]
    model = whole_model(config, random_weights(config))
    tokens_BT = torch.randint(0, 500, (1, 40), generator=torch.Generator().manual_seed(3))
    segments_BT = torch.repeat_interleave(torch.arange(3), torch.tensor((17, 2, 21)))[None].int()
    packed = model(tokens_BT=tokens_BT, segments_BT=segments_BT)["logits_BTV"]
    for number in range(3):
        inside = segments_BT[0] == number
        alone = model(tokens_BT=tokens_BT[:, inside])["logits_BTV"]
        assert_near(packed[:, inside], alone)
    together = model(tokens_BT=tokens_BT)["logits_BTV"]
    assert (together - packed).abs().max() > 0.1, "without segments documents see each other"


def test_layers_are_local_but_for_the_first_of_every_so_many():
    """What a token of a layer sees is what moves it: 4 layers, of which the first and the fourth are global."""
    config = BERT_FORMS["modernbert"]
    assert [config.reach(layer) for layer in range(4)] == [None, 4, 4, None]
    assert [BERT_FORMS["modernbert-wide"].reach(layer) for layer in range(4)] == [None, 9, None, 9]
    assert BERT_FORMS["modernbert-global"].reach(1) is None
    weights = random_weights(config)
    stages = build_stages(config, weights, 4)
    hidden_BTD = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(4))
    changed = hidden_BTD.clone()
    changed[0, 10] += 1.0
    moved = [
        ((stage(hidden_BTD=hidden_BTD)["hidden_BTD"] - stage(hidden_BTD=changed)["hidden_BTD"]).abs().amax(-1) > 0)[0]
        for stage in stages[:3]
    ]
    assert moved[0].all()
    for near in moved[1:]:
        assert near.nonzero().flatten().tolist() == list(range(6, 15))


def test_a_token_sees_what_comes_behind_it_and_no_padding(config, batch):
    model = whole_model(config, random_weights(config))
    given = {name: batch[name] for name in ("tokens_BT", "segments_BT")}
    before = model(**given)["logits_BTV"]
    changed = batch["tokens_BT"].clone()
    changed[0, 23], changed[1, 23] = 7, 7  # a token, and padding
    after = model(tokens_BT=changed, segments_BT=batch["segments_BT"])["logits_BTV"]
    assert (after[0, 0] - before[0, 0]).abs().max() > 1e-4
    assert torch.equal(after[1, :19], before[1, :19])


def test_masked_rows_alone_reach_the_head(config, batch):
    shapes = []
    model = whole_model(config, random_weights(config))
    model.get_submodule("head_transform").register_forward_hook(lambda module, given, out: shapes.append(out.shape))
    model(**batch)
    assert shapes == [(2, 4, config.hidden_size)]


def test_every_parameter_has_a_spec_and_every_pattern_a_parameter(config):
    found = specs(config)
    names = [spec.name for spec in found]
    with torch.device("meta"):
        model = build(config)
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == [(s.name, s.shape) for s in found]
    assert not list(model.buffers()), "a buffer would not survive construction on the meta device"
    assert (HEAD in names) == (not config.tie_embeddings)
    assert ties(config) == ({HEAD: EMBEDDING} if config.tie_embeddings else {})
    for pattern, expected in sharding(config).items():
        assert any(lookup({pattern: expected}, name) is expected for name in names), pattern
    for spec in found:
        assert spec.sharding.dim is None or sum(spec.blocks()) == spec.shape[spec.sharding.dim]
        assert spec.real_rows == (500 if spec.name in (EMBEDDING, HEAD, "lm_head.bias") else None)


def test_padded_vocabulary_changes_nothing(config, batch):
    weights = random_weights(config)
    model = whole_model(config, weights)
    expected = model(**batch)["losses_L"]
    expected.sum().backward()
    for name in {EMBEDDING, HEAD, "lm_head.bias"} & set(dict(model.named_parameters())):
        parameter = model.get_parameter(name)
        assert not gradient_of(parameter)[500:].any()
        parameter.data[500:] = 100.0
    assert torch.equal(model(**batch)["losses_L"], expected)


def test_no_projection_is_scaled_down_where_every_sum_is_normalised():
    for form, std in (("bert", 0.02), ("modernbert", 0.02 / 8**0.5)):
        by_name = {spec.name: spec for spec in family(BERT_FORMS[form]).specs(BERT_FORMS[form])}
        value = initial_value(by_name["layers.1.attention.out_proj.weight"], BERT_FORMS[form], seed=0)
        assert abs(value.std().item() / std - 1) < 5 / (2 * value.numel()) ** 0.5


def test_bf16_stays_near_fp32(config, batch):
    """bf16 keeps 8 bits (2**-9 per rounding); the losses of six tokens and two pairs average out to a few percent."""
    weights = random_weights(config)
    expected_L = whole_model(config, weights)(**batch)["losses_L"]
    losses_L = whole_model(config, weights).bfloat16()(**batch)["losses_L"]
    assert losses_L.dtype == torch.float32
    assert not torch.equal(losses_L, expected_L)
    torch.testing.assert_close(losses_L, expected_L, rtol=0.05, atol=0.02)
