"""The GPU benchmark at toy size, on whatever device there is, and what it says when something is wrong."""

import json
import time
from dataclasses import replace

import pytest
import torch

from bench import correctness, gpu
from bench.contest import ContestFailed, Finished
from bench.correctness import BF16_LOSS, REFERENCE, STEPS, verdict, verdicts
from bench.ours import Ours, micro_batches, tokens_of_step
from bench.plain import plain_contestant
from bench.speed import MODELS, peak_operations
from engine.plan.parameters import num_parameters

GOOD = {"losses": [8.0] * STEPS, "gradient_norms": [1.0] * STEPS, "saved": ["a", 8.0], "wiped": ["b", 9.0]}
GOOD = {**GOOD, "loaded": ["a", 8.0]}


@pytest.mark.parametrize(
    ("only", "checked", "measured"),
    [
        ("packed|toy.*3", 2, ["toy bf16 ZeRO-3"]),
        pytest.param("", 5, ["toy bf16 ZeRO-1", "toy bf16 ZeRO-3"], marks=pytest.mark.matrix),
    ],
    ids=["some", "all"],
)
def test_toy_run_checks_and_measures(tmp_path, only, checked, measured):
    path = tmp_path / "toy.json"
    gpu.main(minutes=4.0, toy=True, only=only, profile=True, output=path)
    result = json.loads(path.read_text())
    assert len(result["correctness"]) == checked
    assert "attention by mask" in result["verdicts"]["device bf16 ZeRO-1, packed"]
    assert all(text.startswith("ok") for text in result["verdicts"].values())
    assert result["verdicts"].keys() == result["correctness"].keys()
    for case in result["correctness"].values():
        assert case["losses"][0] != case["losses"][-1]
    assert list(result["speed"]) == measured
    for case in result["speed"].values():
        best = case["best"]
        assert best == case[f"micro-batch {best['micro_rows']}"]
        assert best["tokens_per_second"]["median"] > 0
        # 3 x (2 layers x (2 x 12 x 32^2 + 4 x 32 x 32) + 2 x 32 x 250): forward and backward of one token
        assert best["operations_per_token"] == 3 * (2 * (24 * 32**2 + 4 * 32 * 32) + 2 * 32 * 250)
        assert case["hotspots"]["top"]


def test_without_time_cases_are_left_out_and_named(tmp_path):
    found = {}
    gpu.run_case("any", {"type": "cpu"}, print, (), time.monotonic() + 1.0, 60.0, found)
    assert found == {"failed": "left out: no time left"}


def explode(connection, end):
    """A case that runs out of memory half way."""
    connection.send({"half": 1})
    raise MemoryError("all gone")


def test_a_case_that_fails_keeps_what_it_found():
    found = {}
    gpu.run_case("any", {"type": "cpu"}, explode, (), time.monotonic() + 100.0, 60.0, found)
    assert found["half"] == 1
    assert "all gone" in found["failed"]
    assert gpu.short(found) == "MemoryError: all gone"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_toy_is_named():
    with pytest.raises(ContestFailed, match=r"no GPU that torch can use(?s:.*)--toy"):
        gpu.find_device(toy=False)


def test_verdicts_tell_right_from_wrong():
    assert verdict(GOOD, GOOD, is_bf16=False).startswith("ok")
    off = {**GOOD, "losses": [8.0 + 2e-4] * STEPS}
    assert "losses off by 2.0e-04" in verdict(off, GOOD, is_bf16=False)
    assert verdict(off, GOOD, is_bf16=True).startswith("ok")
    far = {**GOOD, "losses": [8.0 + 9.0 * BF16_LOSS] * STEPS}
    assert "losses off" in verdict(far, GOOD, is_bf16=True)
    assert "losses off by nan" in verdict({**GOOD, "losses": [float("nan")] * STEPS}, GOOD, is_bf16=True)
    assert "gradient norms off" in verdict({**GOOD, "gradient_norms": [1.1] * STEPS}, GOOD, is_bf16=True)
    assert "after save and load" in verdict({**GOOD, "loaded": ["c", 8.0]}, GOOD, is_bf16=False)
    assert "proves nothing" in verdict({**GOOD, "wiped": GOOD["saved"]}, GOOD, is_bf16=False)
    assert verdict({**GOOD, "failed": "Traceback\nboom"}, GOOD, is_bf16=False) == "failed: boom"
    assert verdicts({}) == {}
    assert verdicts({REFERENCE: GOOD, "cuda bf16 ZeRO-1": off})["cuda bf16 ZeRO-1"].startswith("ok")


def test_a_wrong_device_ends_the_command_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "cases", lambda *_: [("correctness", REFERENCE, print, ())])
    monkeypatch.setattr(gpu, "run_case", lambda *arguments: arguments[-1].update({**GOOD, "loaded": ["c", 8.0]}))
    with pytest.raises(ContestFailed, match="does not compute what the CPU does"):
        gpu.main(minutes=1.0, toy=True, only="", profile=False, output=tmp_path / "wrong.json")
    assert "after save and load" in json.loads((tmp_path / "wrong.json").read_text())["verdicts"][REFERENCE]


def test_peaks_go_by_the_whole_name():
    assert peak_operations("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_operations("NVIDIA H100 PCIe") == 756e12
    assert peak_operations("NVIDIA H200") == 989e12
    assert peak_operations("a toaster") is None


def test_models_are_the_sizes_that_they_are_called():
    assert {name: round(num_parameters(model) / 1e6) for name, (model, _, _) in MODELS.items()} == {
        "124M": 124,
        "355M": 355,
        "1.5B": 1558,
    }


def train_in_changing_splits(connection, end, zero_stage):
    """Three steps of an engine that was built for micro-batches of one row, fed other ones."""
    toy = correctness.shape(toy=True)
    ours = Ours(replace(toy, micro_rows=1), zero_stage, "fp32")
    losses = []
    for number, rows in enumerate((2, 4, 1)):
        inputs = micro_batches(tokens_of_step(toy, 0, number), rows)
        losses.append(ours.step(inputs, toy.num_targets)[0])
    connection.send({"losses": losses})
    connection.send(None)


class ThreeSteps:
    """Stands for the parent's end of a contest of three steps."""

    def __init__(self):
        self.losses, self.left = [], 3

    def begin_step(self):
        self.left -= 1
        if self.left < 0:
            raise Finished

    def loss(self, value):
        self.losses.append(value)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_one_engine_takes_every_micro_batch_size(zero_stage):
    found = {}
    gpu.run_case("cpu", {"type": "cpu"}, train_in_changing_splits, (zero_stage,), time.monotonic() + 200, 200, found)
    plain, threads = ThreeSteps(), torch.get_num_threads()
    with pytest.raises(Finished):
        plain_contestant(plain, correctness.shape(toy=True), "fp32", threads)  # type: ignore[arg-type]
    # fp32: some thousand roundings of 2**-24 to a loss of 5.5, in another order
    assert found["losses"] == pytest.approx(plain.losses, abs=1e-5)


def test_targets_are_the_next_tokens_in_every_split():
    tokens_BT = torch.arange(12).view(4, 3)
    whole, halves = micro_batches(tokens_BT, 4), micro_batches(tokens_BT, 2)
    assert whole[0]["targets_BT"][0, :2].tolist() == [1, 2]
    assert whole[0]["weights_BT"].sum() == 8
    assert all((whole[0][name] == torch.cat([half[name] for half in halves])).all() for name in whole[0])
    assert gpu.default_path("NVIDIA H100 80GB HBM3", "2026-01-02T03").name == "nvidia-h100-80gb-hbm3-2026-01-02.json"
