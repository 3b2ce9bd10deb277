"""Operation counts against the published approximation and a count of every multiplication that torch does."""

import pytest

from engine.config.objectives import RowLengths
from engine.config.schema.adapter import PrefixConfig
from engine.config.schema.model import GPTConfig
from engine.plan.operations import training_operations

GPT2 = GPTConfig(vocab_size=50257, num_layers=12, hidden_size=768, num_heads=12)


def test_six_times_parameters_and_attention() -> None:
    """6 N + 12 L D T, where N are the parameters without position table, norms and biases (they multiply nothing)."""
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert training_operations(GPT2, RowLengths(1024, 1024)) == 1024 * (6 * matrices + 12 * 12 * 768 * 1024)


@pytest.mark.parametrize("form", ["gpt2", "llama", "prefix"])
def test_a_forward_pass_multiplies_as_often_as_counted(form: str) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from engine.models import gpt

    model = GPTConfig(vocab_size=128, num_layers=2, hidden_size=32, num_heads=4, max_positions=16)
    if form == "llama":
        model = model.model_copy(
            update={
                "num_kv_heads": 2,
                "feed_forward_size": 48,
                "position": "rope",
                "norm": "rmsnorm",
                "activation": "swiglu",
            }
        )
    if form == "prefix":  # its keys and values are seen by all queries, and multiplied by nothing else
        model = model.model_copy(
            update={"max_positions": 32, "adapter": PrefixConfig(method="prefix", virtual_tokens=5)}
        )
    stage = gpt.build(model)
    tokens_BT = torch.zeros((2, 16), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        stage(tokens_BT=tokens_BT)
    forward = training_operations(model, RowLengths(16, predicted=16)) // 3
    assert counter.get_total_flops() == 2 * forward


def test_a_sliding_window_counts_its_tokens() -> None:
    from engine.plan.families import figures

    windowed = GPT2.model_copy(update={"sliding_window": 100, "first_window_layer": 3})
    lengths = RowLengths(1024, predicted=1024)
    counts = [figures(windowed).layer_operations(windowed, layer, lengths) for layer in range(12)]
    plain = figures(GPT2).layer_operations(GPT2, 0, lengths)
    assert counts == [plain] * 3 + [plain - 4 * 1024 * (1024 - 100) * 768] * 9
    short = RowLengths(64, predicted=64)
    assert figures(windowed).layer_operations(windowed, 5, short) == figures(GPT2).layer_operations(GPT2, 5, short)


@pytest.mark.parametrize("length", [24, 12])
def test_a_local_layer_multiplies_what_its_window_has(length: int) -> None:
    """reach 4: 9 tokens of a window are counted, 12 of three blocks multiplied, as in a row that is no longer."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from engine.models.families import family
    from engine.plan.families import figures
    from tests.engine.models.tiny import BERT_FORMS

    model = BERT_FORMS["modernbert"]
    lengths = RowLengths(length, predicted=length)
    scores = 4 * length * model.hidden_size
    layers = [figures(model).layer_operations(model, layer, lengths) for layer in range(4)]
    assert layers[0] - layers[1] == scores * (length - 9)
    assert layers[0] == layers[3]
    stage = family(model).build(model)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        stage(tokens_BT=torch.zeros((2, length), dtype=torch.int64))
    head = 2 * model.hidden_size * length * (model.hidden_size + model.padded_vocab_size)
    assert counter.get_total_flops() == 2 * (sum(layers) + 2 * scores * (12 - 9) + head)


def test_a_forward_pass_of_t5_multiplies_as_often_as_counted() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from engine.models.families import family
    from tests.engine.models.tiny import T5_FORMS

    model = T5_FORMS["t5"].model_copy(update={"vocab_multiple": 1})
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        family(model).build(model)(
            tokens_BS=torch.zeros((2, 16), dtype=torch.int64), decoder_tokens_BT=torch.zeros((2, 7), dtype=torch.int64)
        )
    forward = training_operations(model, RowLengths(16, predicted=7, decoder=7)) // 3
    assert counter.get_total_flops() == 2 * forward
