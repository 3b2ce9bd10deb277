"""GPUs counted from the environment and nvidia-smi's list."""

import pytest

from launcher.devices import num_gpus, nvidia_smi

FOUR = "\n".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i})" for i in range(4))


@pytest.mark.parametrize(
    ("environ", "listed", "expected"),
    [
        ({}, FOUR, 4),
        ({}, "", 0),
        ({}, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 0),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, FOUR, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, FOUR, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, FOUR, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, FOUR, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, FOUR, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "", 0),
    ],
)
def test_num_gpus(environ: dict[str, str], listed: str, expected: int) -> None:
    assert num_gpus(environ, lambda: listed) == expected


def test_a_node_without_a_driver_lists_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert nvidia_smi() == ""
