"""GPUs counted from the environment and nvidia-smi's list."""

import pytest

from engine.errors import EnvironmentProblem
from launcher import devices
from launcher.devices import multiplies_bf16, num_gpus, numbers, nvidia_smi

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


@pytest.mark.parametrize(
    ("listed", "kind"),
    [
        ("GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)\n", "h100-80gb"),
        ("GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1)\n", "a100-40gb"),
        ("GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1)\n", "a100-80gb"),
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)\n", "h200-141gb"),
        ("GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-1)\n", None),
        ("", None),
    ],
)
def test_the_kind_of_gpu_that_the_plan_knows(listed: str, kind: str | None) -> None:
    found = devices.accelerator(lambda: listed)
    assert (found and found.name) == kind


@pytest.mark.parametrize(
    ("environ", "found"), [({}, ("0", "1")), ({"CUDA_VISIBLE_DEVICES": "4, GPU-8,2"}, ("4", "GPU-8"))]
)
def test_names_of_the_gpus_to_use(environ: dict[str, str], found: tuple[str, ...]) -> None:
    assert devices.names(environ, 2) == found


@pytest.mark.parametrize(("given", "found"), [(("3", "2"), (2, 3)), (("GPU-3", "1"), (1, 3)), ((), ())])
def test_numbers_of_gpus_by_name(given: tuple[str, ...], found: tuple[int, ...]) -> None:
    assert numbers(given, lambda: FOUR) == found


@pytest.mark.parametrize("name", ["MIG-1", "GPU-", "GPU-9"])
def test_what_is_no_whole_gpu_has_no_number(name: str) -> None:
    with pytest.raises(EnvironmentProblem, match=f"names {name}, which deepspeed cannot be told"):
        numbers(("0", name), lambda: FOUR)


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f\nmodel name: bf16", False),
        ("", False),
    ],
)
def test_bf16_is_native_where_the_processor_says_so(cpuinfo, native):
    assert multiplies_bf16(cpuinfo) is native
