"""A further moment beside the optimizer's: through save, load, verify, fingerprint, compare and exports."""

import itertools
import json
import logging

import numpy as np
import pytest

from engine.checkpoint import manifest_checks, manifest_json
from engine.checkpoint.compare import Opened, compare
from engine.checkpoint.fingerprint import combine, fingerprint_of_checkpoint, partial_sum
from engine.checkpoint.interchange.initial import own_weights
from engine.checkpoint.interchange.sinks.dcp import write_dcp
from engine.checkpoint.interchange.sinks.outgoing import Outgoing
from engine.checkpoint.interchange.sinks.universal import write_universal
from engine.checkpoint.load import files_needed, load, load_shards, open_checkpoint
from engine.checkpoint.verify import verify
from engine.errors import CheckpointError
from engine.logs import ROOT
from engine.parallel.state import MOMENTS
from tests.engine.checkpoint.threads import ThreadedRanks
from tests.engine.checkpoint.worlds import World, fake_groups, layout_of, random_state, small_model, some_state

THREE = (*MOMENTS, "ema")
CASES = [((1, 1, 1), 0), ((2, 2, 1), 1), ((1, 3, 2), 3), ((2, 1, 2), 3)]


@pytest.fixture
def whole():
    return random_state(small_model(), 3, THREE)


def filled(case, moments, whole):
    layout, zero_stage = case
    world = World(layout_of(*layout), zero_stage, small_model(), moments)
    world.fill(whole)
    return world


def empty(case, moments):
    layout, zero_stage = case
    return World(layout_of(*layout), zero_stage, small_model(), moments)


def load_world(path, world, zero_moments=()):
    manifest = open_checkpoint(path)
    for writer, shards in zip(world.writers, world.shards, strict=True):
        load_shards(path, manifest, shards, writer.tensor_rank, world.layout.tensor, zero_moments)


def fingerprint_of(world):
    ranks = zip(world.writers, world.shards, strict=True)
    return combine([partial_sum(p, world.placements[w.stage], w, world.layout.tensor) for w, p in ranks])


@pytest.mark.parametrize(("before", "after"), itertools.permutations(CASES, 2))
def test_it_goes_from_one_layout_into_another_bit_for_bit(tmp_path, whole, before, after):
    saved = filled(before, THREE, whole)
    path = saved.save(tmp_path, some_state())
    world = empty(after, THREE)
    load_world(path, world)
    world.check(whole)
    assert verify(path) == []
    assert open_checkpoint(path).moments == ("ema", *MOMENTS)
    assert fingerprint_of(world) == fingerprint_of(saved) == fingerprint_of_checkpoint(path, open_checkpoint(path))


def test_without_it_in_the_file_it_begins_at_zero_where_that_is_allowed(tmp_path, whole):
    path = filled(CASES[1], MOMENTS, whole).save(tmp_path, some_state())
    world = empty(CASES[2], THREE)
    with pytest.raises(CheckpointError, match="the checkpoint holds no ema") as caught:
        load_world(path, world)
    assert caught.value.allowed == "moments among ['exp_avg', 'exp_avg_sq']"
    load_world(path, world, {"ema"})
    zeros = {name: np.zeros_like(values) for name, values in whole.items() if name.startswith("optim.ema.")}
    world.check(whole | zeros)
    with pytest.raises(CheckpointError, match="holds no exp_avg, exp_avg_sq"):  # allowed for one is not for others
        load_world(filled(CASES[0], (), whole).save(tmp_path / "bare", some_state()), world, {"ema"})


def test_which_files_a_rank_needs_does_not_depend_on_it(tmp_path, whole):
    manifest = open_checkpoint(filled(CASES[1], MOMENTS, whole).save(tmp_path, some_state()))
    world = empty(CASES[1], THREE)
    with pytest.raises(CheckpointError, match="the checkpoint holds no ema"):
        files_needed(manifest, world.shards[0], 0, 1)
    assert files_needed(manifest, world.shards[0], 0, 1, {"ema"}) == {world.writers[0].file_name}


@pytest.mark.parametrize(
    ("in_file", "in_run", "said"),
    [
        (THREE, MOMENTS, "holds moments that this run does not keep: ema; they are left out"),
        (MOMENTS, THREE, "holds no ema of the parameters: it begins at zero"),
        (THREE, THREE, None),
    ],
)
def test_what_only_one_side_has_is_told_once(tmp_path, whole, monkeypatch, caplog, in_file, in_run, said):
    monkeypatch.setattr(logging.getLogger(ROOT), "propagate", True)
    path = filled(CASES[1], in_file, whole).save(tmp_path, some_state())
    world = empty(CASES[3], in_run)

    def run(rank):
        groups = fake_groups(world.layout, rank)
        return load(path, groups, world.shards[rank], world.placements_of(rank), zero_moments={"ema"})

    assert {manifest.state.step for manifest in ThreadedRanks(monkeypatch).run(4, run)} == {1}
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == ([] if said is None else [f"{path} {said}"])


def test_a_comparison_names_it(tmp_path, whole):
    left = filled(CASES[1], THREE, whole).save(tmp_path / "left", some_state())
    other = whole | {"optim.ema.final_norm.weight": whole["optim.ema.final_norm.weight"] + 1}
    right = filled(CASES[2], THREE, other).save(tmp_path / "right", some_state())
    (different,) = [one for one in compare(Opened(left), Opened(right)) if one.num_different]
    assert (different.key, different.num_different) == ("optim.ema.final_norm.weight", 6)
    without = filled(CASES[0], MOMENTS, whole).save(tmp_path / "without", some_state())
    problems = {one.key: one.problem for one in compare(Opened(left), Opened(without)) if one.problem}
    assert problems == {f"optim.ema.{spec.name}": "only in the first" for spec in small_model()}


def test_exports_carry_it_or_say_that_they_do_not(tmp_path, whole):
    path = filled(CASES[1], THREE, whole).save(tmp_path / "checkpoints", some_state())
    opened = own_weights(path)
    assert write_dcp(Outgoing(opened, opened.own_map, with_moments=True), tmp_path / "dcp") == 4 * len(small_model())
    assert write_universal(Outgoing(opened, opened.own_map), tmp_path / "universal") == (len(small_model()), ["ema"])
    assert {file.name for file in (tmp_path / "universal").rglob("zero/*/*.pt")} == {
        "fp32.pt",
        "exp_avg.pt",
        "exp_avg_sq.pt",
        "step.pt",
    }


def test_a_name_that_would_run_into_a_parameters_is_refused(tmp_path, whole):
    path = filled(CASES[0], THREE, whole).save(tmp_path, some_state())
    text = manifest_json.render(open_checkpoint(path))
    content = json.loads(text.replace('"ema"', '"e.ma"'))
    with pytest.raises(ValueError, match=r"moments \('e\.ma'"):
        manifest_checks.parse(content)
