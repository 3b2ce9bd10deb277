"""Model states by ZeRO stage and precision in closed form, and what activations depend on."""

from dataclasses import asdict
from typing import Any

import pytest

from engine.config.objectives import RowLengths
from engine.config.schema.model import BERTConfig
from engine.config.schema.parallel import ParallelConfig
from engine.plan import bert, gpt
from engine.plan.composition import MODERN, T5, Change, example
from engine.plan.logits import head_bytes
from engine.plan.memory import gathered_at_once, stage_memory, states_per_element
from engine.plan.parameters import model_entries, num_parameters
from engine.plan.parts import Entries
from engine.plan.plan import make_plan
from tests.engine.models.tiny import tiny


@pytest.mark.parametrize(
    ("dtype", "zero_stage", "expected"),
    [
        ("fp32", 0, 4 + 0 + 8 + 4),
        ("fp32", 1, 4 + 4 / 8 + 8 / 8 + 4 + 4 / 8),
        ("bf16", 1, 2 + 4 / 8 + 8 / 8 + 4 + 4 / 8),
        ("bf16", 2, 2 + 4 / 8 + 8 / 8 + 4 / 8),
        ("bf16", 3, (2 + 4 + 8 + 4) / 8),
    ],
)
def test_bytes_per_parameter(dtype: str, zero_stage: Any, expected: float) -> None:
    precision = example({"precision": {"dtype": dtype}}).precision
    assert float(sum(states_per_element(ParallelConfig(zero_stage=zero_stage), 8, precision))) == expected


@pytest.mark.parametrize(("zero_stage", "weights"), [(2, 2), (3, 2 / 8)])
def test_reduction_once_per_step_keeps_whole_gradients(zero_stage: Any, weights: float) -> None:
    precision = example({"precision": {"dtype": "bf16"}}).precision
    parallel = ParallelConfig(zero_stage=zero_stage, reduce="step")
    assert [float(one) for one in states_per_element(parallel, 8, precision)] == [weights, 4 / 8, 8 / 8, 4 + 4 / 8]
    assert memory(zero_stage=zero_stage, reduce="step").bucket == 0 < memory(zero_stage=zero_stage).bucket


def test_reduction_in_bf16_halves_the_gradients() -> None:
    precision = example({"precision": {"dtype": "bf16", "reduce_dtype": "bf16"}}).precision
    assert [float(one) for one in states_per_element(ParallelConfig(), 2, precision)] == [2, 2, 4, 2 + 1]


SHORT: Change = {"model": {"max_positions": 64}}
"""Else the position table, which no axis divides, would be the largest part of so small a model."""


def memory(data_size: int = 2, in_flight: int = 1, segments: bool = False, **parallel: Any):
    run = example(SHORT, {"parallel": parallel})
    return stage_memory(
        run.model,
        run.parallel,
        run.precision,
        Entries(tuple(model_entries(run.model))),
        layers=range(4),
        recomputed=range(4)[: None if run.parallel.recompute != "none" else 0],
        data_size=data_size,
        lengths=RowLengths(64, predicted=64),
        segments=segments,
        in_flight=in_flight,
        has_head=True,
        device="cpu",
    )


def test_states_are_those_of_the_parameters() -> None:
    parameters = num_parameters(example(SHORT).model, padded=True)
    assert memory(zero_stage=0).states == 16 * parameters
    assert memory(zero_stage=3).states == 20 * parameters // 2 + 4 * parameters  # and the bucket
    assert memory(zero_stage=3, tensor=2).states < memory(zero_stage=3).states / 2 * 1.1


@pytest.mark.parametrize(
    ("dtype", "zero_stage", "on_host"),
    [
        ("fp32", 1, 4 + 8 + 4 + 4),  # masters, moments, gradients, weights on their way back
        ("bf16", 2, 4 + 8 + 4 + 2),
        ("bf16", 3, 4 + 8 + 4 + 2),
        ("fp32", 3, 4 + 8 + 4),  # the masters are copied back themselves
    ],
)
def test_offload_moves_the_optimizers_state_and_nothing_else(dtype: str, zero_stage: Any, on_host: int) -> None:
    changes = {"parallel": {"zero_stage": zero_stage, "data": 8}, "precision": {"dtype": dtype}}
    plain = make_plan(example(changes), 8).stages[0]
    offloaded = make_plan(example(changes, {"parallel": {"offload": "optimizer"}}), 8).stages[0]
    assert offloaded.memory.total == plain.memory.total - plain.memory.master - plain.memory.moments
    assert offloaded.memory.host == -(-on_host * plain.parameters_per_rank // 8)
    assert offloaded.traffic == plain.traffic


def test_activations_grow_with_what_is_alive() -> None:
    """17 D per token and layer for GPT-2: 4 layers, 64 tokens, width 64, fp32."""
    assert memory().activations == 4 * 64 * 17 * 64 * 4
    assert memory(in_flight=3, micro_batch_size=2).activations == 6 * memory().activations
    assert gpt.saved(example().model, 0, RowLengths(1, predicted=1), 2) == (5 + 12 / 2) * 64


@pytest.mark.parametrize(
    ("rows", "vocab_size", "dtype", "tensor", "at_work"),
    [
        (64, 512, "fp32", 1, 64 * 512 * (4 + 4)),  # logits, softmax
        (64, 512, "fp32", 2, 64 * 256 * (4 + 4 + 4)),  # and exponentials
        (64, 512, "bf16", 1, 64 * 512 * (2 + 4 + 4)),  # logits, as fp32, softmax
        (8, 512, "bf16", 1, 8 * 512 * (4 + 2) + 2 * 512 * 64),  # gradient in both dtypes, its product with the input
        (5000, 2**18, "fp32", 1, 128 * 2**18 * 8),  # a few rows at a time
        (5000, 2**18, "fp32", 2, 256 * 2**17 * 12),
    ],
)
def test_the_loss_takes_a_few_rows_at_a_time(rows: int, vocab_size: int, dtype: Any, tensor: int, at_work: int) -> None:
    """A micro-batch alive keeps the gradients of the head's input and, in fp32, of its weight."""
    size = {"fp32": 4, "bf16": 2}[dtype]
    model = example({"model": {"vocab_size": vocab_size}}).model
    kept = rows * 64 * size + vocab_size * 64 // tensor * 4
    for alive in (1, 3):
        assert head_bytes(model, ParallelConfig(tensor=tensor), rows, size, alive) == alive * kept + at_work
    assert head_bytes(model, ParallelConfig(), 0, size, 1) == 0
    assert memory().logits == head_bytes(example().model, ParallelConfig(), 64, 4, 1)


def test_every_layer_keeps_who_sees_whom() -> None:
    """A number for each pair of tokens, on every rank that shares them; once where layers recompute."""
    pairs = 64 * 64 * 4
    assert memory(segments=True).activations - memory().activations == 4 * pairs
    assert memory(segments=True, tensor=2).activations - memory(tensor=2).activations == 4 * pairs
    assert memory(segments=True, sequence=2).activations - memory(sequence=2).activations == 4 * pairs
    full = memory(segments=True, recompute="full").activations - memory(recompute="full").activations
    assert full == pairs


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [
        ({}, False),
        ({"precision": {"dtype": "fp32"}}, True),
        ({"model": {"attention_dropout": 0.1}}, True),
        ({"model": {"head_size": 20}}, True),  # neither a multiple of 8 nor a power of 2
        ({"model": {"head_size": 24}}, False),  # flash attention
        ({"model": {"head_size": 512}}, False),  # flex attention
    ],
)
def test_a_gpu_keeps_who_sees_whom_only_where_no_kernel_does_without(changes: Change, keeps: bool) -> None:
    bf16: Change = {"precision": {"dtype": "bf16"}}
    forms = (
        example(bf16, changes),
        example(
            {"model": MODERN["model"] | changes.get("model", {})}, {"objective": {"name": "masked"}}, bf16, changes
        ),
    )
    for run in forms:
        held = [make_plan(run, 1, device).stages[0].memory.activations for device in ("cpu", "cuda")]
        if run.model.family == "gpt" or keeps:
            assert (held[0] == held[1]) == keeps
        else:  # two layers of four are local, on every device
            assert held[0] - held[1] == 2 * 64 * 64 * 2


def test_t5_adds_its_positions_to_scores_on_a_gpu_too() -> None:
    run = example(T5, {"precision": {"dtype": "bf16"}})
    assert make_plan(run, 1, "cpu").stages[0].memory == make_plan(run, 1, "cuda").stages[0].memory


def test_a_sliding_window_keeps_what_two_blocks_see() -> None:
    """A window of 9, reach 8, in rows of 64: 16 numbers per query and not 64, and a copy of keys and values."""
    model = example({"model": {"sliding_window": 9, "first_window_layer": 2}}).model
    lengths = RowLengths(64, predicted=64)
    whole, blocks = 64 * 64, 64 * 16 + 2 * 64 * 64
    assert [gpt.mask(model, layer, lengths) for layer in range(4)] == [whole, whole, blocks, blocks]
    # no mask on a GPU; without documents in the layers with a window alone
    assert [gpt.mask(model, layer, lengths, masks=False) for layer in range(4)] == [0] * 4
    assert [gpt.mask(model, layer, lengths, segments=False) for layer in range(4)] == [0, 0, blocks, blocks]
    short = RowLengths(16, predicted=16)
    assert gpt.mask(model, 3, short) == 16 * 16
    assert gpt.mask(model, 3, RowLengths(9, predicted=9), segments=False) == 0


def test_norms_of_heads_and_parallel_parts_change_what_a_layer_keeps() -> None:
    lengths = RowLengths(64, predicted=64)
    plain, normed, parallel = (
        gpt.saved(example({"model": change}).model, 0, lengths, 1)
        for change in ({}, {"qk_norm": True}, {"parallel_residual": True})
    )
    assert normed - plain == 3 * 64 * 64  # inputs of both norms, one and a half elements for each
    assert plain - parallel == 64 * 64 // 2  # one input for both norms in fp32


def test_a_local_layer_keeps_what_three_blocks_see() -> None:
    """reach 4 in rows of 64: 12 numbers per query and not 64, and keys and values three times."""
    model = example({"model": {"family": "bert", "local_attention": 8, "position": "rope"}}).model
    assert isinstance(model, BERTConfig)
    lengths = RowLengths(64, predicted=10)
    assert [bert.mask(model, layer, lengths) for layer in range(4)] == [64 * 64, 64 * 12, 64 * 12, 64 * 64]
    kept = [bert.saved(model, layer, lengths, 1) for layer in range(2)]
    assert kept[1] - kept[0] == 2 * 2 * 64 * 64
    short = RowLengths(12, predicted=2)
    assert bert.mask(model, 1, short) == 12 * 12
    assert bert.saved(model, 1, short, 1) == bert.saved(model, 0, short, 1)


def test_zero_3_gathers_two_modules_at_a_time_or_the_stage() -> None:
    model = example(SHORT).model
    layers = [entry for entry in model_entries(model) if entry.name.startswith("layers.0")]
    # feed-forward up and down, a weight and its bias together
    assert gathered_at_once(Entries(tuple(layers)), 1, recomputes=False) == (4 * 64 * 64 + 4 * 64) + (4 * 64 * 64 + 64)
    assert memory(zero_stage=3).gathered == 4 * (model.padded_vocab_size * model.hidden_size + 4 * 64 * 64 + 4 * 64)
    assert memory(zero_stage=3, gather="step").gathered == 4 * num_parameters(model, padded=True)
    assert memory(zero_stage=2).gathered == 0


def test_totals_add_up_in_a_plan() -> None:
    plan = make_plan(example({"parallel": {"pipe": 2, "zero_stage": 3}}), 4)
    for stage in plan.stages:
        assert stage.memory.host == 0
        assert stage.memory.total == sum(asdict(stage.memory).values())
    assert plan.stages[0].memory.logits == 0


def test_sequence_parallelism_divides_what_tensor_parallelism_leaves_whole() -> None:
    """5 D of GPT-2's 17 D; a layer that recomputes keeps a stretch of its input."""
    assert memory(tensor=2, sequence_parallel=True).activations == memory().activations // 2
    tokens_bytes = 4 * 64 * 64 * 4
    assert memory(tensor=2).activations - memory(tensor=2, sequence_parallel=True).activations == tokens_bytes * 5 // 2


def test_the_sequence_axis_divides_activations_and_logits() -> None:
    assert memory(sequence=2).activations == memory().activations // 2
    assert memory(sequence=2).logits - 4 * 512 * 64 == (memory().logits - 4 * 512 * 64) // 2, "all but the weight's"


@pytest.mark.parametrize(
    ("per_node", "held"),
    [(8, 2 * 4), (4, 2 * 4), (2, 2 * 2 * 2), (1, 2 * 2 * 1)],
    ids=["one node", "just one", "two nodes", "four nodes"],
)
def test_two_generations_on_two_nodes_are_four_times_what_a_node_stores(per_node: int, held: int) -> None:
    run = example(SHORT, {"parallel": {"zero_stage": 1, "data": 4}})
    plan = make_plan(run, 4)
    per_rank = -(-num_parameters(run.model, padded=True) // 4) * 12
    assert plan.stages[0].stored_bytes == per_rank
    assert plan.node_memory_bytes(per_node) == held * per_rank


MUON: Change = {"optimizer": {"name": "muon"}}


def test_muon_keeps_one_moment_of_a_matrix() -> None:
    """Four layers of 12 D x D matrix elements; everything else keeps Adam's two."""
    for parallel in ({"zero_stage": 0}, {"zero_stage": 1, "data": 2}, {"zero_stage": 3, "data": 2}):
        changes: Change = {"parallel": parallel}
        world, shards = parallel.get("data", 1), parallel.get("data", 1)
        adam, muon = (make_plan(example(SHORT, changes, form), world).stages[0] for form in ({}, MUON))
        matrices = 4 * 12 * 64 * 64 // shards
        assert adam.memory.moments - muon.memory.moments == 4 * matrices
        assert muon.updated_matrices == matrices
        assert adam.stored_bytes - muon.stored_bytes == 4 * matrices
        assert muon.memory.weights == adam.memory.weights


def test_a_tied_matrix_is_stored_by_its_first_stage_alone() -> None:
    tied, untied = (
        make_plan(example({"parallel": {"pipe": 2, "zero_stage": 1}}, {"model": {"tie_embeddings": tie}}), 2).stages
        for tie in (True, False)
    )
    matrix = 512 * 64 * 12
    assert tied[1].updated == untied[1].updated, "each stage updates its own copy"
    assert untied[1].stored_bytes - tied[1].stored_bytes == matrix
    assert tied[0].stored_bytes == untied[0].stored_bytes


def test_parts_add_up_to_what_an_accelerator_needs() -> None:
    plan = make_plan(example({"parallel": {"pipe": 2, "zero_stage": 3, "offload": "optimizer"}}), 4)
    for stage in plan.stages:
        assert sum(stage.memory.parts().values()) == stage.memory.needed
        assert "host" not in stage.memory.parts()
    shown = plan.as_json()["stages"]
    for one in shown:
        assert sum(value for name, value in one["memory"].items() if name != "total") == one["memory"]["total"]
    assert plan.memory_bytes == max(one["memory"]["total"] for one in shown)


@pytest.mark.parametrize("family", [{}, MODERN, T5], ids=["gpt", "modern", "t5"])
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_layers_of_one_kind_are_counted_as_each_by_itself(family: Change, how: Any) -> None:
    """The figures of a stage against sums over its layers, one at a time."""
    from engine.config.objectives import row_lengths
    from engine.plan.families import figures
    from engine.plan.memory import Sharing, _kept

    config = example(family, {"model": family.get("model", {}) | {"num_layers": 8}})
    one, lengths = figures(config.model), row_lengths(config.stages[0])
    layers, recomputed = range(1, 8), range(1, 8)[: 0 if how == "none" else 4]
    plain = {
        layer: one.saved(config.model, layer, lengths, 2) + one.mask(config.model, layer, lengths) for layer in layers
    }
    kept = plain | {layer: one.saved(config.model, layer, lengths, 2, 1, how) for layer in recomputed}
    spared = [plain[layer] - kept[layer] for layer in recomputed]
    found = _kept(config.model, layers, recomputed, lengths, Sharing(2, 1, 1), how, masks=True, segments=True)
    assert found == (sum(kept.values()), sum(spared), max(spared, default=0))


@pytest.mark.parametrize(("family", "form"), [(gpt, "gpt2"), (gpt, "llama"), (bert, "bert")])
def test_attention_keeps_the_keys_and_values_of_a_prefix_and_their_probabilities(family, form):
    lengths, prefix = RowLengths(20, predicted=20), {"method": "prefix", "virtual_tokens": 6}
    for dropout in (0.0, 0.1):
        plain, adapted = tiny(form, attention_dropout=dropout), tiny(form, attention_dropout=dropout, adapter=prefix)
        put_in_front = 2 * 6 * plain.num_kv_heads * plain.head_size
        # before and after dropout, and a byte of mask: 9/4 elements for each query, key and head
        probabilities = 9 * plain.num_heads * 20 * 6 // 4 if dropout else 0
        for ranks in (1, 2):
            more = family.saved(adapted, 0, lengths, ranks) - family.saved(plain, 0, lengths, ranks)
            assert more == (put_in_front + probabilities) // ranks
