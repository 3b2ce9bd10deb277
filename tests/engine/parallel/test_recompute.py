"""What a layer keeps for its backward pass, by the storages alive after its forward pass, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config.objectives import RowLengths
from engine.config.schema.model import ModelConfig, make_model
from engine.config.schema.parallel import Recompute
from engine.models import gpt
from engine.models.attention import view
from engine.models.materialize import fill
from engine.parallel.recompute import KEPT, recompute
from engine.plan import gpt as figures

FORMS = {
    "gpt2": {"num_layers": 1, "hidden_size": 64, "num_heads": 4},
    "llama": {
        "num_layers": 1,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
    },
}
NUM_ROWS, LENGTH = 2, 32


class Storages(TorchDispatchMode):
    """Every storage that an operation made while this is on, with its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.made[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        return out

    def alive_bytes(self, without: list[torch.Tensor]) -> int:
        """Of the storages still there, but those of the given tensors."""
        known = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(size for key, (one, size) in self.made.items() if key not in known and not one.expired())


def make(form: str, how: Recompute, dtype: torch.dtype) -> tuple[ModelConfig, torch.nn.Module]:
    config = make_model(vocab_size=64, max_positions=LENGTH, **FORMS[form])
    stage = gpt.build(config)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in stage.named_parameters()}
    fill(stage, lambda name: torch.randn(shapes[name], generator=generator).mul_(0.1).to(dtype))
    layer = stage.get_submodule("layers.0")
    if how != "none":
        recompute([layer], how)
    return config, layer


def run(form: str, how: Recompute, dtype: torch.dtype) -> tuple[int, list[torch.Tensor]]:
    """Bytes kept beside the layer's input, and the results: output, gradients of input and parameters."""
    config, layer = make(form, how, dtype)
    x_BTD = torch.randn(NUM_ROWS, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    x_BTD.requires_grad_(True)
    seen = view(config, x_BTD, None)
    shared = [x_BTD, *layer.parameters(), *(t for t in (seen.cos_TR, seen.sin_TR) if t is not None)]
    with Storages() as storages:
        y_BTD = layer(x_BTD, seen)
    kept = storages.alive_bytes([*shared, y_BTD])
    y_BTD.square().sum().backward()
    grads = [tensor.grad for tensor in (x_BTD, *layer.parameters())]
    return kept, [y_BTD.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_keeps_what_the_plan_says(form: str, dtype: torch.dtype) -> None:
    """To the byte, but for the softmax's normaliser: one fp32 number per head and token."""
    config = make_model(vocab_size=64, **FORMS[form])
    lengths = RowLengths(LENGTH, LENGTH)
    own = NUM_ROWS * LENGTH * config.hidden_size * dtype.itemsize
    normaliser = NUM_ROWS * LENGTH * config.num_heads * 4
    kept: dict[str, int] = {how: run(form, how, dtype)[0] for how in ("none", "selective", "full")}
    planned = {
        how: NUM_ROWS * dtype.itemsize * figures.saved(config, 0, lengths, 1, recompute=how) - own
        for how in ("selective", "full")
    }
    assert kept["full"] == planned["full"] == 0, "the input alone, which is what the layer before made"
    assert kept["selective"] == planned["selective"] + normaliser
    assert kept["none"] > 1.3 * kept["selective"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["selective", "full"])
def test_gradients_are_the_same_bit_for_bit(form: str, how: Recompute) -> None:
    for plain, again in zip(run(form, "none", torch.float32)[1], run(form, how, torch.float32)[1], strict=True):
        assert torch.equal(plain, again)


def test_a_second_run_ends_before_the_last_product() -> None:
    """What the last product makes is wanted by no backward pass, so its module is entered and not left."""
    config, layer = make("gpt2", "full", torch.float32)
    left: list[str] = []
    for name in ("attention.out_proj", "ffn.up_proj", "ffn.down_proj"):
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: left.append(name))
    x_BTD = torch.randn(1, LENGTH, config.hidden_size, requires_grad=True)
    y_BTD = layer(x_BTD, view(config, x_BTD, None))
    assert left == ["attention.out_proj", "ffn.up_proj", "ffn.down_proj"]
    left.clear()
    y_BTD.sum().backward()
    assert left == ["attention.out_proj", "ffn.up_proj"]


def test_an_evaluation_runs_once_and_keeps_nothing() -> None:
    config, layer = make("gpt2", "selective", torch.float32)
    calls: list[None] = []
    layer.get_submodule("ffn").register_forward_hook(lambda *_: calls.append(None))
    x_BTD = torch.ones(1, LENGTH, config.hidden_size)
    with torch.no_grad(), Storages() as storages:
        y_BTD = layer(x_BTD, view(config, x_BTD, None))
    assert storages.alive_bytes([y_BTD, *layer.parameters()]) == 0
    assert len(calls) == 1


def test_what_is_kept_are_names_that_torch_knows() -> None:
    """Attention inside documents is one of a GPU, so no layer here meets it: a name that torch gave up would keep
    nothing, and say nothing."""
    pytest.importorskip("torch.nn.attention.varlen")
    for name in KEPT:
        space, operation = name.split("::")
        assert getattr(getattr(torch.ops, space), operation).default.name() == name


def test_the_second_run_may_do_what_the_first_did_not() -> None:
    """As under ZeRO-3, which gathers weights in the run that finds them cut, and ahead of their use."""

    def gradients(extra: bool) -> list[torch.Tensor]:
        config, layer = make("gpt2", "selective", torch.float32)
        calls: list[None] = []

        def gather(*_: Any) -> None:
            calls.append(None)
            with torch.no_grad():
                for _call in calls:
                    torch.zeros(8).narrow(0, 0, 4).view(2, 2).clone()

        if extra:
            layer.get_submodule("ffn.up_proj").register_forward_pre_hook(gather)
        x_BTD = torch.randn(1, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(1))
        layer(x_BTD, view(config, x_BTD, None)).square().sum().backward()
        assert len(calls) == 2 * extra
        return [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]

    for plain, among_others in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, among_others)
