"""Mixtures and replay over a run stage: tables of shares, changes of them on a resume, loss weights, and refusals."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config.schema.stage import RunStage
from engine.data.loader import Loader
from engine.data.shards.writer import ShardWriter
from engine.data.stage import open_parts, stage_stream
from engine.data.stream import Stream
from engine.errors import DataError
from tests.engine.data.corpus import EOS, VOCABULARY, made_up_documents, write_shards

LENGTH = 16
NAMES = ("web", "code", "books")
TABLE = [
    {"from_step": 0, "weights": {"web": 3, "code": 1, "books": 0}},
    {"from_step": 5, "weights": {"web": 1, "code": 1, "books": 0.5}},
    {"from_tokens": 14 * 8 * LENGTH, "weights": {"web": 0, "code": 2, "books": 5}},
]
RAMP = [{"size": 8, "until_step": 7}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shares")
    for seed, name in enumerate((*NAMES, "old")):
        write_shards(folder / name, made_up_documents(80, seed=seed), shard_tokens=600)
    return folder


def stage(folder: Path, *, steps: int = 20, sources: Sequence[str] = NAMES, **keys: Any) -> RunStage:
    """A run stage over sources, or over one of them as `train`; `keys` are of the stage, or of its data."""
    data: dict[str, Any] = {"window_shards": 2}
    named = [{"name": name, "path": str(folder / name)} | keys.pop(name, {}) for name in sources]
    data |= {"sources": named} if len(sources) > 1 else {"train": str(folder / sources[0])}
    data |= {key: keys.pop(key) for key in ("weights_table", "cache") if key in keys}
    tree = {"data": data, "sequence_length": LENGTH, "global_batch_size": 16, "duration": {"steps": steps}, **keys}
    return RunStage.model_validate(tree)


def opened(run_stage: RunStage) -> Stream:
    return stage_stream(run_stage, open_parts(run_stage, None, VOCABULARY), 0)


def rows_of(stream: Stream, steps: int, data_size: int = 1, micro_batch: int = 4) -> list[tuple[int, str]]:
    """Source, and shard and row, of the samples of the next steps, in the order of the global batches."""
    found, start = [], stream.progress
    loaders = [Loader(stream.clone()) for _ in range(data_size)]
    for _ in range(steps):
        ranks = [loader.step(rank, data_size, micro_batch) for rank, loader in enumerate(loaders)]
        for batches in zip(*ranks, strict=True):
            for batch in batches:
                found += [item for item in zip(batch.domains_B.tolist(), batch.sources, strict=True) if item[1]]
    assert stream.progress == start
    stream.advance_to(loaders[0].stream.progress)
    return found


def exact(run_stage: RunStage, rows: Sequence[tuple[int, Sequence[float]]], steps: int) -> np.ndarray:
    """Samples of each source by the weights of `rows` (first step, weights), summed step by step."""
    found = np.zeros(len(rows[0][1]))
    for step in range(steps):
        [*_, weights] = [weights for first, weights in rows if first <= step]
        found += run_stage.batches.size(step) * np.array(weights) / sum(weights)
    return found


def test_a_table_follows_the_steps_of_a_ramp_in_any_layout_and_over_restarts(folder):
    run_stage = stage(folder, weights_table=TABLE, batch_ramp=RAMP)
    rows = [(0, (3, 1, 0)), (5, (2, 2, 1)), (11, (0, 2, 5))]  # 7 x 8 and 4 x 16 samples are 14 x 8 x 16 tokens
    stream = opened(run_stage)
    for steps in range(21):
        counts = stream.mix(run_stage.batches.samples(steps))
        assert np.abs(np.array(counts) - exact(run_stage, rows, steps)).max() < 1
    whole = rows_of(stream, 20)
    assert np.bincount([source for source, _ in whole], minlength=3).tolist() == stream.mix(stream.position)
    assert rows_of(opened(run_stage), 20, data_size=2, micro_batch=2) == whole
    resumed, found = opened(run_stage), []
    for steps in (4, 3, 6, 7):
        state = resumed.state()
        resumed = opened(run_stage)
        resumed.restore(state)
        found += rows_of(resumed, steps)
    assert found == whole


def test_sources_keep_their_own_order_whatever_their_weights(folder):
    plain, table = opened(stage(folder)), opened(stage(folder, weights_table=TABLE))
    found = [rows_of(stream, 15) for stream in (plain, table)]
    for source in range(3):
        one, other = ([name for number, name in rows if number == source] for rows in found)
        length = min(len(one), len(other))
        assert one[:length] == other[:length]
        assert length > 5


def weighing(*weights: float) -> dict[str, Any]:
    return {name: {"weight": weight} for name, weight in zip(NAMES, weights, strict=True)}


def test_weights_that_change_on_a_resume_move_nothing_that_was_drawn(folder):
    first, second = weighing(5, 3, 1), weighing(1, 1, 4)
    stream = opened(stage(folder, **first))
    before, drawn = rows_of(stream, 7), stream.drawn()
    changed = opened(stage(folder, **second))
    changed.restore(stream.state())
    assert (changed.drawn(), changed.trained()) == (drawn, drawn)
    start = changed.position
    after = rows_of(changed, 6)
    # each source goes on at its next sample, as it would have with the weights that it had
    went_on = rows_of(stream, 60)
    for source in range(3):
        mine = [name for number, name in after if number == source]
        assert mine == [name for number, name in went_on if number == source][: len(mine)]
    for count in range(len(after)):
        counts = np.bincount([source for source, _ in after[:count]], minlength=3)
        assert np.abs(counts - count * np.array([1, 1, 4]) / 6).max() < 1
        assert changed.mix(start + count) == (np.array(list(drawn.values())) + counts).tolist()
    # a restart with the same weights is the run that was not interrupted
    again = opened(stage(folder, **second))
    again.restore(changed.state())
    assert again.drawn() == changed.drawn()
    assert rows_of(again, 5) == rows_of(changed, 5)
    assert again.state() == changed.state()
    assert sum(again.trained().values()) == again.samples
    assert len(before) == start


def test_counts_of_what_was_trained_on_stay_right_over_a_change_with_samples_left_out(folder):
    stream = opened(stage(folder))
    rows_of(stream, 3)
    stream.leave_out(20, 60)  # reaches back: what was trained on stays counted
    rows_of(stream, 2)
    state, trained = stream.state(), stream.trained()
    assert sum(trained.values()) == stream.samples == 80
    changed = opened(stage(folder, weights_table=TABLE))
    changed.restore(state)
    assert changed.trained() == trained
    changed.leave_out(changed.position + 5, changed.position + 11)
    rows_of(changed, 4)
    assert sum(changed.trained().values()) == changed.samples == 144
    assert sum(changed.drawn().values()) == changed.position == 144 + 12 + 6


def test_damaged_counts_of_a_state_are_refused(folder):
    stream = opened(stage(folder))
    rows_of(stream, 2)
    state = stream.state()
    for wrong in ({"drawn": "1 2"}, {"drawn": "0 0 1"}, {"drawn": 7}, {"begun": [3]}):
        with pytest.raises(DataError, match="the saved loader state is damaged"):
            opened(stage(folder)).restore(state | wrong)


REPLAY = {"ratio": [{"from_step": 0, "ratio": 0.25}, {"from_step": 6, "ratio": 0.1}], "loss_weight": 0.5}


@pytest.mark.parametrize("sources", [("web",), NAMES])
def test_replay_is_one_more_source_and_the_new_samples_keep_their_order(folder, sources):
    run_stage = stage(folder, sources=sources, replay=REPLAY | {"source": str(folder / "old")})
    stream, plain = opened(run_stage), opened(stage(folder, sources=sources))
    found, without = rows_of(stream, 20), rows_of(plain, 20)
    last = len(sources)
    new = [row for row in found if row[0] < last]
    assert new == without[: len(new)]
    replayed = [int(source == last) for source, _ in found]
    by_step = np.array(replayed).reshape(20, 16)
    assert by_step.sum(axis=1).tolist()[:6] == [4] * 6
    exact_N = np.cumsum([0.1 * 16] * 14)
    assert np.abs(np.cumsum(by_step[6:].sum(axis=1)) - exact_N).max() < 1
    # two ranks with micro-batches of two: both have the same share of each step, to within one row
    by_rank = by_step.reshape(20, 4, 2, 2).sum(axis=(1, 3))
    assert np.abs(np.diff(by_rank, axis=1)).max() <= 1
    assert list(stream.trained()) == [*(sources if last > 1 else ["new"]), "replay"]
    resumed = opened(run_stage)
    rows_of(resumed, 9)
    other = opened(run_stage)
    other.restore(resumed.state())
    assert rows_of(other, 11) == found[9 * 16 :]


def test_a_ratio_that_changes_on_a_resume_keeps_the_count_within_a_sample(folder):
    before = stage(folder, replay={"ratio": 0.3, "source": str(folder / "old")})
    after = stage(folder, replay={"ratio": 0.07, "source": str(folder / "old")})
    stream = opened(before)
    rows_of(stream, 3)
    changed = opened(after)
    changed.restore(stream.state())
    for steps in range(1, 15):
        rows_of(changed, 1)
        assert abs(changed.trained()["replay"] - 0.3 * 48 - 0.07 * 16 * steps) < 1


def test_targets_of_a_source_weigh_as_it_is_told(folder):
    run_stage = stage(folder, code={"loss_weight": 2.5}, replay=REPLAY | {"source": str(folder / "old")})
    plain = stage(folder, replay={"ratio": 0.25, "source": str(folder / "old")})
    weighed, same = (Loader(opened(each)).step(0, 1, 16)[0] for each in (run_stage, plain))
    factors = np.array([1, 2.5, 1, 0.5], np.float32)[weighed.domains_B.numpy()]
    assert set(weighed.domains_B.tolist()) == {0, 1, 2, 3}
    assert weighed.row_weights_B.tolist() == factors.tolist()
    expected = same.inputs["weights_BT"].numpy() * factors[:, None]
    assert np.array_equal(weighed.inputs["weights_BT"].numpy(), expected)
    assert weighed.weights["causal"] == pytest.approx(expected.astype(np.float64).sum(), rel=1e-12)
    for name in same.inputs.keys() - {"weights_BT"}:
        assert weighed.inputs[name].equal(same.inputs[name])


def write(folder: Path, documents: int, tokenizer: str = "tokenizer-hash") -> str:
    with ShardWriter(folder, VOCABULARY, EOS, tokenizer, 4000) as writer:
        for document in made_up_documents(documents):
            writer.add(document)
    return str(folder)


def test_replay_that_its_data_cannot_serve_is_refused_with_figures(folder, tmp_path, caplog):
    def run(source: str, ratio: float = 0.25, steps: int = 4) -> RunStage:
        return stage(folder, steps=steps, replay={"ratio": ratio, "source": source})

    with pytest.raises(DataError, match="holds no sample: 0 documents"):
        opened(run(write(tmp_path / "empty", 0)))
    few = write(tmp_path / "few", 1)
    with pytest.raises(DataError, match=r"replays 32 samples of \d in .*few: .* epochs, and up to 8 in one step"):
        opened(run(few, 0.5))
    small = write(tmp_path / "small", 6)
    rows = opened(run(small)).replay_rows
    steps = 41 * rows // 4
    with pytest.raises(DataError, match=rf"replays {4 * steps:,} samples of {rows} in .*: 4[01]\.\d epochs") as caught:
        opened(run(small, steps=steps))
    assert "lower replay.ratio" in (caught.value.remedy or "")
    with caplog.at_level(logging.WARNING):
        opened(run(small, steps=2 * rows))
    assert "8.0 epochs; beyond 4 epochs repetition serves less" in caplog.text
    with pytest.raises(DataError, match="was written with tokenizer another"):
        opened(run(write(tmp_path / "other", 9, "another")))
    with pytest.raises(DataError, match="gone"):
        opened(run(str(tmp_path / "gone")))
