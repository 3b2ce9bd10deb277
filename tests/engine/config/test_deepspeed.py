"""DeepSpeed's dictionary: what must be in it, and that no key is one that DeepSpeed does not know."""

from typing import Any

import pytest

from engine.config.deepspeed import deepspeed_config
from tests.engine.config.run_config import config


def written(*overrides: str, num_micro_batches: int = 4, num_elements: int = 1000) -> dict[str, Any]:
    run = config(*overrides)
    return deepspeed_config(run.parallel, run.precision, run.optimizer, num_micro_batches, num_elements)


@pytest.mark.parametrize("zero_stage", range(4))
def test_clipping_is_always_written(zero_stage: int) -> None:
    """DeepSpeed clips at 1.0 unless it is told otherwise."""
    for clip_norm in (0.0, 0.5):
        tree = written(f"parallel.zero_stage={zero_stage}", f"optimizer.clip_norm={clip_norm}")
        assert tree["gradient_clipping"] == clip_norm
        assert tree["zero_optimization"]["stage"] == zero_stage


def test_the_reduce_bucket_is_no_larger_than_the_stage() -> None:
    for num_elements, expected in ((1000, 1000), (10**9, 500_000_000)):
        zero = written("parallel.zero_stage=2", num_elements=num_elements)["zero_optimization"]
        assert zero["reduce_bucket_size"] == expected


@pytest.mark.parametrize("overrides", [("parallel.zero_stage=1",), ("parallel.zero_stage=3", "parallel.reduce=step")])
def test_no_bucket_where_we_reduce(overrides: tuple[str, ...]) -> None:
    assert written(*overrides)["zero_optimization"]["reduce_bucket_size"] == 1


def test_products_are_torch_s_own_where_their_weight_gradients_are_put_off() -> None:
    """ZeRO-3's product would be none that `engine.parallel.deferral` knows."""
    zero = ("parallel.zero_stage=3", "parallel.reduce=step", "parallel.pipe=2")
    assert written(*zero)["zero_optimization"]["memory_efficient_linear"]
    assert not written(*zero, "parallel.schedule=zb-h1")["zero_optimization"]["memory_efficient_linear"]


def test_offload_is_page_locked_and_absent_by_default() -> None:
    assert "offload_optimizer" not in written()["zero_optimization"]
    offloaded = written("parallel.offload=optimizer")["zero_optimization"]["offload_optimizer"]
    assert offloaded == {"device": "cpu", "pin_memory": True}


def test_batch_and_precision() -> None:
    tree = written("parallel.micro_batch_size=3", "precision.dtype=bf16", num_micro_batches=5)
    assert (tree["train_micro_batch_size_per_gpu"], tree["gradient_accumulation_steps"]) == (3, 5)
    assert tree["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert tree["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "bf16" not in written("precision.dtype=fp32")


@pytest.mark.parametrize("zero_stage", range(4))
def test_deepspeed_knows_every_key(zero_stage: int) -> None:
    """A misspelt top-level key would be accepted in silence: each must stand in DeepSpeed's own list of names."""
    constants = pytest.importorskip("deepspeed.runtime.constants")
    names = {value for value in vars(constants).values() if isinstance(value, str)}
    names |= {"zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"}
    assert set(written(f"parallel.zero_stage={zero_stage}")) <= names
