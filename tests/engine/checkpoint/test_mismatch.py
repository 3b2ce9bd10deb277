import pytest

from engine.checkpoint.mismatch import check_tensors
from engine.errors import CheckpointError

WANTED = {"a.weight": (2, 3), "b.bias": (3,)}


def test_equal_names_and_shapes_pass():
    check_tensors({"b.bias": (3,), "a.weight": (2, 3)}, WANTED, "the checkpoint")


def test_every_tensor_that_differs_is_named():
    with pytest.raises(CheckpointError) as caught:
        check_tensors({"a.weight": (3, 2), "c": ()}, WANTED, "the checkpoint")
    assert caught.value.wrong.splitlines() == [
        "the tensors in the checkpoint are those of another model:",
        "  a.weight: (3, 2) in the checkpoint, (2, 3) in the model",
        "  b.bias: not in the checkpoint",
        "  c: not in the model",
    ]
    assert caught.value.allowed
    assert caught.value.remedy


def test_many_are_counted():
    with pytest.raises(CheckpointError, match=r"\.\.\. and 80 more") as caught:
        check_tensors({}, {f"layers.{number}.weight": (1,) for number in range(100)}, "the checkpoint")
    assert len(caught.value.wrong.splitlines()) == 22
