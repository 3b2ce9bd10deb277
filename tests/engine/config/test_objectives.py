"""Lengths of span corruption against brute force and against T5's own figures."""

from typing import get_args

import pytest

from engine.config.objectives import (
    OBJECTIVES,
    RowLengths,
    has_segments,
    held_lengths,
    noise,
    num_masked,
    row_lengths,
    span_lengths,
)
from engine.config.schema.data import DataConfig
from engine.config.schema.model import FamilyName
from engine.config.schema.objective import ObjectiveConfig, ObjectiveName
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.stage import Duration, RunStage


def filled(read, rate, mean):
    """Encoder and decoder of a row of `read` tokens: kept or noise, sentinels, end of text."""
    tokens, spans = noise(read, rate, mean)
    return read - tokens + spans + 1, tokens + spans + 1


@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0), (0.9, 10.0), (0.01, 5.0)])
def test_the_encoder_is_filled_by_as_many_tokens_as_fit(rate, mean):
    for length in (*range(3, 40), 127, 128, 512):
        found = span_lengths(length, rate, mean)
        most = max(read for read in range(2, 12 * length + 20) if filled(read, rate, mean)[0] <= length)
        assert found == (most, length, filled(most, rate, mean)[1])


def test_t5s_own_figures():
    """Raffel et al. 2020: 512 tokens of input come from 568, with 114 of targets."""
    assert span_lengths(512, 0.15, 3.0) == (568, 512, 114)


def test_noise_always_leaves_room_between_spans():
    for total in range(2, 200):
        for rate in (0.05, 0.15, 0.5, 0.95):
            for mean in (1.0, 3.0):
                tokens, spans = noise(total, rate, mean)
                assert 1 <= spans <= min(tokens, total - tokens)


def test_most_masked_tokens_are_those_of_a_full_row():
    assert [num_masked(n, 0.15) for n in (1, 10, 128, 512)] == [1, 2, 19, 77]
    assert all(num_masked(n, 0.15) <= num_masked(n + 1, 0.15) for n in range(1, 5000))


def stage(objective):
    return RunStage(
        data=DataConfig.model_validate({"train": "x"}),
        sequence_length=512,
        global_batch_size=1,
        duration=Duration(steps=1),
        objective=objective,
    )


def test_only_span_corruption_has_a_decoder_and_only_causal_rows_can_do_without_segments():
    assert row_lengths(stage(ObjectiveConfig(name="span_corruption"))) == RowLengths(512, predicted=114, decoder=114)
    assert row_lengths(stage(ObjectiveConfig(name="masked"))) == RowLengths(512, predicted=77, decoder=0)
    assert row_lengths(stage(ObjectiveConfig(name="fill_in_the_middle"))) == RowLengths(512, predicted=512, decoder=0)
    assert has_segments("document", ObjectiveConfig())
    assert not has_segments("row", ObjectiveConfig())
    assert has_segments("row", ObjectiveConfig(name="masked"))


def test_a_decoder_s_rows_are_filled_up_for_those_who_share_their_time():
    """114 tokens: two ranks share them as they are, four share 116; nothing else changes."""
    corruption, masked = stage(ObjectiveConfig(name="span_corruption")), stage(ObjectiveConfig(name="masked"))
    for parallel, decoder in (({"sequence": 2}, 114), ({"tensor": 2, "sequence_parallel": True, "sequence": 2}, 116)):
        assert held_lengths(corruption, ParallelConfig.model_validate(parallel)) == RowLengths(512, decoder, decoder)
        assert held_lengths(masked, ParallelConfig.model_validate(parallel)) == row_lengths(masked)
    assert held_lengths(corruption, ParallelConfig(tensor=4)) == row_lengths(corruption)


def test_an_objective_may_be_written_as_its_name_alone():
    whole = {"data": {"train": "x"}, "sequence_length": 8, "global_batch_size": 1, "duration": {"steps": 1}}
    assert RunStage.model_validate(whole | {"objective": "masked"}).objective == ObjectiveConfig(name="masked")


def test_every_name_has_an_entry_whose_keys_exist_and_a_family_that_exists():
    assert tuple(OBJECTIVES) == get_args(ObjectiveName)
    for name, entry in OBJECTIVES.items():
        assert {*entry.keys} <= ObjectiveConfig.model_fields.keys(), name
    assert {family for entry in OBJECTIVES.values() for family in entry.families} == {*get_args(FamilyName)}
    used = {key for entry in OBJECTIVES.values() for key in entry.keys}
    assert ObjectiveConfig.model_fields.keys() - used == {"name"}, "a key that no objective uses"
