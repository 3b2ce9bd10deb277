"""The mean of checkpoints against numpy's over whole weights, and WSM's coefficients against scaled updates."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoint import container, merge
from engine.checkpoint.load import read_weights
from engine.checkpoint.manifest_json import read
from engine.checkpoint.merge import Sources, check_weights, wsm_coefficients
from engine.checkpoint.verify import verify
from engine.errors import CheckpointError, ConfigError
from engine.parallel.sharding import ParameterSpec
from tests.engine.checkpoint.memory import Alive
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state

LAYOUTS = [((1, 1, 1), 0), ((2, 3, 1), 3), ((1, 2, 2), 1)]
"""(pipe, data, tensor) and ZeRO stage of three runs."""


@pytest.fixture
def saved(tmp_path) -> tuple[list[Path], list[dict[str, np.ndarray]]]:
    """A checkpoint of each layout with random weights, and these."""
    specs, paths, wholes = small_model(), [], []
    for number, (shape, zero_stage) in enumerate(LAYOUTS):
        world = World(layout_of(*shape), zero_stage, specs)
        wholes.append(random_state(specs, number))
        world.fill(wholes[-1])
        paths.append(world.save(tmp_path / f"{number}", some_state(10 * (number + 1))))
    return paths, wholes


def mean_of(wholes, weights) -> dict[str, np.ndarray]:
    keys = [key for key in wholes[0] if key.startswith("model.")]
    return {
        key.removeprefix("model."): np.asarray(
            sum(weight * whole[key].astype(np.float64) for weight, whole in zip(weights, wholes, strict=True)),
            np.float32,
        )
        for key in keys
    }


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.5, 0.25, 0.25], [1.5, -1.0, 0.5], [0.0, 0.0, 1.0]])
@pytest.mark.parametrize("block", [merge.BLOCK_NUMEL, 7])
def test_the_mean_is_numpys_whatever_the_layouts(saved, tmp_path, monkeypatch, weights, block):
    paths, wholes = saved
    monkeypatch.setattr(merge, "BLOCK_NUMEL", block)
    path = merge.merge(Sources(paths), weights, tmp_path / "out" / "checkpoints")
    assert not verify(path)
    expected = mean_of(wholes, weights)
    found = read_weights(path)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert np.array_equal(values.numpy(), expected[name]), name
    manifest = read(path)
    assert (manifest.state.step, manifest.moments) == (30, ())
    assert manifest.state.sections["merge"] == [[10, weights[0]], [20, weights[1]], [30, weights[2]]]


def test_memory_is_some_blocks_and_not_the_model(saved, tmp_path, monkeypatch):
    paths, wholes = saved
    monkeypatch.setattr(merge, "BLOCK_NUMEL", 8)
    sources = Sources(paths)
    with Alive() as alive:
        merge.merge(sources, [1 / 3] * 3, tmp_path / "out")
    # sum and product in fp64, a part and the mean in fp32, and what is not collected yet of the block before
    assert alive.peak <= 2 * 8 * (8 + 8 + 4 + 4)
    assert alive.peak < sum(whole.nbytes for key, whole in wholes[0].items() if key.startswith("model.")) / 2


@pytest.mark.parametrize(
    ("shape", "closed"),
    [
        ("linear", lambda j, n: 1 / n),
        ("1-sqrt", lambda j, n: np.sqrt((j + 1) / n) - np.sqrt(j / n)),
        ("cosine", lambda j, n: 0.5 * (np.cos(np.pi * j / n) - np.cos(np.pi * (j + 1) / n))),
    ],
)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_coefficients_are_the_closed_form_and_scale_the_updates_as_the_decay(shape, closed, count):
    steps = [100 + 50 * j for j in range(count)]
    found = np.array(wsm_coefficients(steps, shape))
    assert np.allclose(found, [closed(j, count) for j in range(count)], rtol=0, atol=1e-15)
    assert abs(found.sum() - 1) < 1e-15 * count
    # weights after each interval of a constant rate, and the same updates, each with the factor of a decay
    updates = np.random.default_rng(0).normal(size=(count - 1, 5))
    constant = np.concatenate([np.zeros((1, 5)), np.cumsum(updates, axis=0)])
    decay = {
        "linear": lambda x: 1 - x,
        "1-sqrt": lambda x: 1 - np.sqrt(x),
        "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    }
    factors = decay[shape](np.arange(1, count) / count)
    assert np.allclose(found @ constant, factors @ updates, rtol=0, atol=1e-14)


def test_uneven_steps_weigh_the_updates_by_their_share():
    # intervals of 1 and 3 steps, mean 2: the decay would end 2 behind the last, at 6
    assert np.allclose(wsm_coefficients([0, 1, 4], "linear"), [1 / 6, 3 / 6, 2 / 6])


@pytest.mark.parametrize("steps", [[5], [5, 5], [7, 5]])
def test_coefficients_need_steps_that_rise(steps):
    with pytest.raises(ConfigError, match="of different steps"):
        wsm_coefficients(steps, "linear")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.5], "1 numbers for 2"),
        ([0.6, 0.5], "add up to 1.1"),
        ([float("nan"), 0.5], "add up to nan"),
        ([float("inf"), float("-inf")], "add up to nan"),
    ],
)
def test_weights_that_do_not_add_up_are_refused(weights, said):
    check_weights([0.7, 0.3], 2)
    with pytest.raises(ConfigError, match=said):
        check_weights(weights, 2)


def test_what_is_of_another_model_or_tokenizer_is_named(tmp_path):
    def with_state(name: str, specs: list[ParameterSpec] | None = None, **changes: Any) -> Path:
        specs = specs or small_model()
        world = World(layout_of(1, 1, 1), 0, specs)
        world.fill(random_state(specs, 7))
        return world.save(tmp_path / name, replace(some_state(40), **changes))

    tokenizer = with_state("t", sections={"tokenizer": {"hash": "one"}})
    models = [with_state(f"m{n}", config={"model": {"family": "gpt", "num_layers": n}}) for n in range(2)]
    for first, second, said in (
        (tokenizer, with_state("u", sections={"tokenizer": {"hash": "two"}}), "another tokenizer.*'two', not 'one'"),
        (*models, "another model.*num_layers = 1, not 0"),
    ):
        with pytest.raises(CheckpointError, match=said):
            Sources([first, second])
    with pytest.raises(CheckpointError, match="those of another model"):
        Sources([with_state("p", sections={}), with_state("q", small_model(num_layers=3), sections={})])


def test_weights_that_are_not_finite_and_a_full_disk_leave_nothing(saved, tmp_path, monkeypatch):
    paths, wholes = saved
    wholes[1]["model.final_norm.weight"][2] = np.nan
    world = World(layout_of(1, 1, 1), 0, small_model())
    world.fill(wholes[1])
    bad = world.save(tmp_path / "bad", some_state(20))
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"final_norm\.weight in .*bad.* NaN or infinite"):
        merge.merge(Sources([paths[0], bad]), [0.5, 0.5], out)

    def full(write, chunk):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(container, "_write_all", full)
    with pytest.raises(CheckpointError, match="no space left"):
        merge.merge(Sources(paths), [1 / 3] * 3, out)
    assert not [path for path in out.iterdir() if path.name.startswith("step-")]
