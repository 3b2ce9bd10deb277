"""The stage cut against all cuts there are, and at the sizes of real models."""

import itertools

import numpy as np
import pytest

from engine.config.objectives import RowLengths
from engine.config.schema.model import GPTConfig, T5Config
from engine.errors import ConfigError
from engine.plan.cut import balance, cut_layers, stage_chunks, tied_stages
from engine.plan.operations import layer_costs

GPT2 = GPTConfig(vocab_size=50257, num_layers=12, hidden_size=768, num_heads=12)
LENGTHS = RowLengths(1024, predicted=1024)


def all_cuts(length: int, parts: int) -> list[tuple[int, ...]]:
    """Lengths of the runs of every way to cut."""
    inner = itertools.combinations(range(1, length), parts - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *ends, length))) for ends in inner]


def sums(costs: list[int], lengths: tuple[int, ...]) -> list[int]:
    ends = list(itertools.accumulate(lengths))
    return [sum(costs[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def test_balance_against_every_cut() -> None:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([2, 7])))
    for _ in range(60):
        length = int(generator.integers(1, 9))
        costs = [int(cost) for cost in generator.integers(1, 6, length)]
        for parts in range(1, length + 1):
            best = min(
                all_cuts(length, parts),
                key=lambda cut: (max(sums(costs, cut)), sum(s * s for s in sums(costs, cut)), cut),
            )
            assert tuple(len(run) for run in balance(costs, parts)) == best, (costs, parts)


@pytest.mark.parametrize("pipe", range(1, 13))
def test_stages_cover_every_layer_once_and_none_is_empty(pipe: int) -> None:
    stages = cut_layers(GPT2, pipe, LENGTHS)
    assert len(stages) == pipe
    assert all(len(layers) >= 1 for layers in stages)
    assert [layer for layers in stages for layer in layers] == list(range(12))


def test_the_head_takes_layers_from_the_last_stage() -> None:
    assert cut_layers(GPT2, 2, LENGTHS) == [range(0, 8), range(8, 12)]


def test_a_head_that_predicts_few_tokens_takes_no_layers() -> None:
    assert cut_layers(GPT2, 2, RowLengths(1024, predicted=154)) == [range(0, 6), range(6, 12)]


def test_equal_layers_without_a_heavy_head_are_shared_evenly() -> None:
    wide = GPTConfig(vocab_size=1, vocab_multiple=1, num_layers=8, hidden_size=1024, num_heads=8)
    assert [len(layers) for layers in cut_layers(wide, 4, LENGTHS)] == [2, 2, 2, 2]
    assert [len(layers) for layers in cut_layers(wide, 3, LENGTHS)] == [2, 3, 3], (
        "the first stage holds more micro-batches"
    )


def test_costs_are_those_of_the_matrices() -> None:
    costs = layer_costs(GPT2, LENGTHS)
    layer = 2 * 12 * 768 * 768 + 4 * 1024 * 768
    assert list(costs) == [1024 * cost for cost in (layer + 2 * 768, *[layer] * 10, layer + 2 * 768 * 50304)]


@pytest.mark.parametrize("pipe", [0, 13])
def test_more_stages_than_layers(pipe: int) -> None:
    with pytest.raises(ConfigError) as caught:
        cut_layers(GPT2, pipe, LENGTHS)
    assert str(caught.value) == (
        f"parallel.pipe x parallel.chunks_per_stage = {pipe} does not fit model.num_layers = 12\n  allowed: 1 to 12"
    )


@pytest.mark.parametrize(("pipe", "chunks_per_stage"), [(1, 1), (4, 1), (2, 3), (3, 2)])
def test_stages_hold_every_part_once_and_hand_them_round(pipe: int, chunks_per_stage: int) -> None:
    stages = stage_chunks(GPT2, pipe, chunks_per_stage, LENGTHS)
    round_by_round = [parts[chunk] for chunk in range(chunks_per_stage) for parts in stages]
    assert [part.layers for part in round_by_round] == cut_layers(GPT2, pipe * chunks_per_stage, LENGTHS)
    assert [part.first for part in round_by_round] == [True] + [False] * (pipe * chunks_per_stage - 1)
    assert [part.last for part in round_by_round] == [False] * (pipe * chunks_per_stage - 1) + [True]


def test_a_tie_is_between_stages_and_not_between_parts() -> None:
    assert tied_stages(GPT2, 2, 3, LENGTHS) == {"embed_tokens.weight": (0, 1)}
    assert tied_stages(GPT2, 3, 4, LENGTHS) == {"embed_tokens.weight": (0, 2)}
    assert tied_stages(GPT2, 1, 1, LENGTHS) == {}


T5 = T5Config(
    family="t5",
    vocab_size=64,
    num_layers=5,
    num_decoder_layers=3,
    hidden_size=16,
    num_heads=4,
)


def test_t5_is_cut_by_what_its_stacks_cost() -> None:
    """Encoder layers cost by the encoder's length, decoder layers by both, wherever the border is."""
    assert cut_layers(T5, 2, RowLengths(100, 100, decoder=100)) == [range(3), range(3, 5)]
    assert cut_layers(T5, 2, RowLengths(4000, 8, decoder=8)) == [range(1), range(1, 5)]
    assert cut_layers(T5, 2, RowLengths(8, 4000, decoder=4000)) == [range(4), range(4, 5)]


def test_t5_ties_the_embedding_over_three_stages_and_tables_over_those_of_their_stack() -> None:
    lengths = RowLengths(100, 100, decoder=100)
    assert cut_layers(T5, 4, lengths) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    assert tied_stages(T5, 4, 1, lengths) == {
        "embed_tokens.weight": (0, 1, 3),
        "decoder_positions.weight": (1, 2, 3),
    }
    assert cut_layers(T5, 2, lengths) == [range(3), range(3, 5)], "the border is inside a stage"
    assert tied_stages(T5, 2, 1, lengths) == {
        "embed_tokens.weight": (0, 1),
        "decoder_positions.weight": (0, 1),
    }
    untied = T5.model_copy(update={"tie_embeddings": False})
    assert tied_stages(untied, 4, 1, lengths)["embed_tokens.weight"] == (0, 1), "where each stack begins"


def test_balance_with_one_heavy_end_against_every_cut() -> None:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([2, 8])))
    for _ in range(40):
        length = int(generator.integers(2, 11))
        costs = [int(cost) for cost in generator.choice([1, 2, 3, 5, 50], length)]
        for parts in range(1, length + 1):
            best = min(
                all_cuts(length, parts),
                key=lambda cut: (max(sums(costs, cut)), sum(s * s for s in sums(costs, cut)), cut),
            )
            assert tuple(len(run) for run in balance(costs, parts)) == best, (costs, parts)


def test_ten_thousand_layers_are_cut_without_trying_every_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 runs of 156 or 157 layers: a run can end at few places, and few of them are tried."""
    tried = 0
    plain = min

    def counted(*arguments, **named):
        nonlocal tried
        if len(arguments) == 1:
            arguments = (list(arguments[0]),)
            tried += len(arguments[0])
        return plain(*arguments, **named)

    monkeypatch.setattr("builtins.min", counted)
    runs = balance([13, *[10] * 9998, 37], 64)
    assert {len(run) for run in runs} <= set(range(153, 158))
    assert tried < 100_000, "10,000 x 64 x 156 is a hundred million"
