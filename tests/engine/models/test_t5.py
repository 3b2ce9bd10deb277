"""The T5 family against its transformers twin, against its own cuts, and against documents on their own.

Tolerance as in test_gpt (about 20 products of at most 256 terms after one another, forward and backward); scores are
not scaled here, so that softmax and what follows see errors of scores of size 10: a factor of 4.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F

from engine.checkpoint.interchange.huggingface import from_huggingface, to_huggingface
from engine.config.schema.model import T5Config
from engine.errors import ConfigError
from engine.models.dropout import (
    ATTENTION,
    ATTENTION_OUTPUT,
    CROSS_ATTENTION,
    CROSS_ATTENTION_OUTPUT,
    EMBEDDING_OUTPUT,
    FFN_INNER,
    FFN_OUTPUT,
    STACK_OUTPUT,
    Dropout,
)
from engine.models.heads import SMOOTHING
from engine.models.materialize import fill, whole_model
from engine.models.t5 import EMBEDDING, HEAD, T5Chunk, boundary, build, inputs, sharding, specs, ties
from engine.parallel.boundary import MicroBatchShape, Tensors
from engine.parallel.sharding import lookup
from engine.plan.cut import ModelChunk
from tests.engine.models.tiny import T5_FORMS, random_weights, twin

TOLERANCE = 4 * 40**0.5 * 256**0.5 * 2**-24
S, T = 24, 13


@pytest.fixture(params=T5_FORMS)
def config(request):
    return T5_FORMS[request.param]


@pytest.fixture
def batch() -> Tensors:
    """Two rows of uneven weights; the second one's encoder ends in padding, a segment of its own."""
    generator = torch.Generator().manual_seed(1)
    segments_BS = torch.zeros(2, S, dtype=torch.int32)
    segments_BS[1, 17:] = 1
    return {
        "tokens_BS": torch.randint(0, 500, (2, S), generator=generator),
        "decoder_tokens_BT": torch.randint(0, 500, (2, T), generator=generator),
        "segments_BS": segments_BS,
        "decoder_segments_BT": torch.zeros(2, T, dtype=torch.int32),
        "targets_BT": torch.randint(0, 500, (2, T), generator=generator),
        "weights_BT": torch.rand(2, T, generator=generator).round(decimals=1),
    }


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    bound = TOLERANCE * expected.abs().max().item()
    distance = (found - expected).abs().max().item()
    assert distance <= bound, f"{what}: {distance:.2e} > {bound:.2e}"


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_logits_loss_and_gradients_equal_those_of_the_twin(config, batch):
    weights = random_weights(config)
    ours, theirs = whole_model(config, weights), twin(config, weights)
    seen = {name: value for name, value in batch.items() if name not in ("targets_BT", "weights_BT")}
    logits_BTV = ours(**seen)["logits_BTV"]
    their_logits_BTV = theirs(
        input_ids=batch["tokens_BS"],
        attention_mask=1 - batch["segments_BS"],
        decoder_input_ids=batch["decoder_tokens_BT"],
    ).logits
    assert logits_BTV.shape == their_logits_BTV.shape == (2, T, config.vocab_size)
    assert_near(logits_BTV, their_logits_BTV, "logits")

    loss = ours(**batch)["losses_L"].sum()
    loss_N = F.cross_entropy(their_logits_BTV.flatten(0, 1), batch["targets_BT"].flatten(), reduction="none")
    their_loss = (loss_N * batch["weights_BT"].flatten()).sum()
    assert loss.dtype == torch.float32
    assert_near(loss, their_loss, "loss")
    loss.backward()
    their_loss.backward()
    as_gradients = copy.deepcopy(theirs)
    for target, source in zip(as_gradients.parameters(), theirs.parameters(), strict=True):
        target.data = gradient_of(source)
    _, their_gradients = from_huggingface(as_gradients)
    gradients = dict(ours.named_parameters())
    assert gradients.keys() == their_gradients.keys()
    for name, expected in their_gradients.items():
        assert expected.any()
        assert_near(gradient_of(gradients[name])[: len(expected)], expected, name)


def test_dropout_is_where_the_twin_has_it(config, batch, monkeypatch):
    """In training theirs asks for a mask at each of its places in turn; given ours, logits and gradients are equal."""
    rates = {"dropout": 0.2, "attention_dropout": 0.2}
    config, keys_B = config.model_copy(update=rates), torch.tensor([5, -6])
    weights = random_weights(config)
    ours, theirs, dropout = whole_model(config, weights), twin(config, weights).train(), Dropout(config, keys_B)
    for module in theirs.modules():
        if hasattr(module, "dropout"):
            rate = module.dropout
            module.dropout = 0.2 if isinstance(rate, float) else torch.nn.Dropout(0.2)
    theirs.set_attn_implementation("eager")
    places = iter(their_places(config))

    def masked_as_ours(x: torch.Tensor, p: float, training: bool = True, inplace: bool = False) -> torch.Tensor:
        assert (p, training) == (0.2, True)
        layer, site = next(places)
        if site in (ATTENTION, CROSS_ATTENTION):
            drop = dropout.probabilities(layer, 0, site)
        elif site == FFN_INNER:
            return dropout.inner(x, layer)
        else:
            return dropout.hidden(x, layer, site)
        assert drop is not None
        return drop(x)

    monkeypatch.setattr(F, "dropout", masked_as_ours)
    their_logits_BTV = theirs(
        input_ids=batch["tokens_BS"],
        attention_mask=1 - batch["segments_BS"],
        decoder_input_ids=batch["decoder_tokens_BT"],
    ).logits
    assert next(places, None) is None, "it has fewer places"
    seen = {name: value for name, value in batch.items() if name not in ("targets_BT", "weights_BT")}
    logits_BTV = ours(**seen, dropout_keys_B=keys_B)["logits_BTV"]
    assert_near(logits_BTV, their_logits_BTV, "logits")
    assert (logits_BTV - ours(**seen)["logits_BTV"]).abs().max() > 0.01


def their_places(config: T5Config) -> list[tuple[int, int]]:
    """(layer, site) of each of theirs, in the order in which a forward pass comes by."""
    border = config.num_encoder_layers
    places = [(-1, EMBEDDING_OUTPUT)]
    for layer in range(border):
        places += [(layer, site) for site in (ATTENTION, ATTENTION_OUTPUT, FFN_INNER, FFN_OUTPUT)]
    places += [(border - 1, STACK_OUTPUT), (border - 1, EMBEDDING_OUTPUT)]
    cross = (CROSS_ATTENTION, CROSS_ATTENTION_OUTPUT)
    for layer in range(border, config.num_layers):
        places += [(layer, site) for site in (ATTENTION, ATTENTION_OUTPUT, *cross, FFN_INNER, FFN_OUTPUT)]
    return [*places, (config.num_layers - 1, STACK_OUTPUT)]


def test_ours_to_theirs_and_back_is_bitwise_equal(config, batch, tmp_path):
    weights = random_weights(config)
    theirs = twin(config, weights)
    theirs.save_pretrained(tmp_path)
    for source in (theirs, tmp_path):
        found_config, found = from_huggingface(source)
        assert found_config == config
        assert found.keys() == weights.keys()
        for name, value in weights.items():
            assert torch.equal(found[name], value), name


def test_a_head_that_differs_from_the_embedding_is_not_called_tied():
    config = T5_FORMS["t5"]
    theirs = twin(config, random_weights(config))
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight + 1)
    with pytest.raises(ConfigError, match=r"lm_head.weight is not shared.weight, although config.json ties them"):
        from_huggingface(theirs)


def test_configurations_carry_over():
    theirs, _ = to_huggingface(T5_FORMS["t5-v1.1"], random_weights(T5_FORMS["t5-v1.1"]))
    assert (theirs.num_layers, theirs.num_decoder_layers, theirs.d_kv, theirs.d_ff) == (3, 2, 24, 160)
    assert theirs.feed_forward_proj == "gated-gelu"
    assert theirs.dense_act_fn == "gelu_new"
    assert not theirs.scale_decoder_outputs


def cuts(num_layers: int, num_stages: int) -> list[list[ModelChunk]]:
    """Every way to cut."""
    ends = [(0, *inner, num_layers) for inner in itertools.combinations(range(1, num_layers), num_stages - 1)]
    return [
        [ModelChunk(range(a, b), first=a == 0, last=b == num_layers) for a, b in itertools.pairwise(bounds)]
        for bounds in ends
    ]


def build_stages(config: T5Config, whole: torch.nn.Module, chunks: list[ModelChunk]) -> list[T5Chunk]:
    values = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    renamed, stages = ties(config), []
    for chunk in chunks:
        with torch.device("meta"):
            stage = build(config, chunk)
        fill(stage, lambda name: values[renamed.get(name, name)].clone())
        stages.append(stage)
    return stages


@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_stages_in_a_row_equal_the_whole_wherever_they_are_cut(config, batch, num_stages):
    whole = whole_model(config, random_weights(config))
    expected = whole(**batch)["losses_L"]
    expected.backward()
    rows = MicroBatchShape(2, S, torch.float32, segments=True, decoder_length=T)
    for chunks in cuts(config.num_layers, num_stages):
        stages = build_stages(config, whole, chunks)
        handed_on: Tensors = {}
        for stage, chunk in zip(stages, chunks, strict=True):
            if not chunk.first:
                fields = boundary(config, chunk.layers.start, rows)
                assert fields.keys() == handed_on.keys() & fields.keys(), "all that a boundary names is there"
                handed_on = {name: handed_on[name] for name in fields}
                for name, field in fields.items():
                    assert (field.shape, field.dtype) == (tuple(handed_on[name].shape), handed_on[name].dtype), name
                    assert field.differentiable == handed_on[name].is_floating_point()
            handed_on |= {name: batch[name] for name in inputs(config, chunk) - {SMOOTHING}}
            handed_on |= stage(**handed_on)
        assert torch.equal(handed_on["losses_L"], expected)
        handed_on["losses_L"].backward()
        gradients: dict[str, torch.Tensor] = {}
        for stage in stages:
            for name, parameter in stage.named_parameters():
                logical = ties(config).get(name, name)
                gradients[logical] = gradients.get(logical, torch.zeros(())) + gradient_of(parameter)
        whole_gradients = dict(whole.named_parameters())
        assert gradients.keys() == whole_gradients.keys()
        for name, gradient in gradients.items():
            assert_near(gradient, gradient_of(whole_gradients[name]), f"{chunks}: {name}")


def test_packed_documents_have_the_loss_they_have_alone(config):
    model = whole_model(config, random_weights(config))
    generator = torch.Generator().manual_seed(3)
    lengths, decoder_lengths = (17, 4, 22), (9, 5, 2)
    tokens_BS = torch.randint(0, 500, (1, sum(lengths)), generator=generator)
    decoder_tokens_BT, targets_BT = torch.randint(0, 500, (2, 1, sum(decoder_lengths)), generator=generator)
    segments_BS = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    decoder_segments_BT = torch.repeat_interleave(torch.arange(3), torch.tensor(decoder_lengths))[None].int()
    for number in range(3):
        inside, decoder_inside = segments_BS[0] == number, decoder_segments_BT[0] == number
        alone = model(
            tokens_BS=tokens_BS[:, inside],
            decoder_tokens_BT=decoder_tokens_BT[:, decoder_inside],
            targets_BT=targets_BT[:, decoder_inside],
            weights_BT=torch.ones(1, decoder_lengths[number]),
        )["losses_L"]
        packed = {
            "tokens_BS": tokens_BS,
            "decoder_tokens_BT": decoder_tokens_BT,
            "targets_BT": targets_BT,
            "weights_BT": decoder_inside[None].float(),
        }
        segments = {"segments_BS": segments_BS, "decoder_segments_BT": decoder_segments_BT}
        assert_near(model(**packed, **segments)["losses_L"], alone, f"document {number}")
        assert abs(model(**packed)["losses_L"] - alone).item() > 1e-3, "without segments they see each other"


def test_padded_vocabulary_changes_nothing(config, batch):
    weights = random_weights(config)
    exact = config.model_copy(update={"vocab_multiple": 1})
    padded, unpadded = whole_model(config, weights), whole_model(exact, weights)
    loss = padded(**batch)["losses_L"]
    assert_near(loss, unpadded(**batch)["losses_L"])
    loss.backward()
    for name in {EMBEDDING, HEAD} & set(dict(padded.named_parameters())):
        parameter = padded.get_parameter(name)
        assert not gradient_of(parameter)[500:].any()
        parameter.data[500:] = 100.0
    assert torch.equal(padded(**batch)["losses_L"], loss)


def test_every_parameter_has_a_spec_and_every_pattern_a_parameter(config):
    found = specs(config)
    names = [spec.name for spec in found]
    with torch.device("meta"):
        model = build(config)
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == [(s.name, s.shape) for s in found]
    assert not list(model.buffers()), "a buffer would not survive construction on the meta device"
    assert (HEAD in names) == (not config.tie_embeddings)
    table = sharding(config)
    for pattern in table.keys() - {HEAD}:
        assert any(lookup({pattern: table[pattern]}, name) is table[pattern] for name in names), pattern
    for spec in found:
        assert spec.sharding.dim is None or sum(spec.blocks()) == spec.shape[spec.sharding.dim]


def test_bf16_stays_near_fp32(config, batch):
    """bf16 keeps 8 bits (2**-9 per rounding), of scores of size 10 that is 0.02; the loss averages over 26 tokens."""
    weights = random_weights(config)
    expected = whole_model(config, weights)(**batch)["losses_L"]
    loss = whole_model(config, weights).bfloat16()(**batch)["losses_L"]
    assert loss.dtype == torch.float32
    assert loss != expected
    assert abs(loss / expected - 1) < 0.05
