"""The only writer of DeepSpeed's configuration.

DeepSpeed accepts a misspelt top-level key in silence, clips at 1.0 unless told otherwise and averages gradients
over data ranks, so the whole dictionary is written here and nowhere else. What it is used for, and why each value
is what it is, stands in `engine.parallel.zero`.
"""

from __future__ import annotations

from typing import Any

from engine.config.schema.optimizer import OptimizerConfig, PrecisionConfig
from engine.config.schema.parallel import ParallelConfig

EVERYTHING = 10**12
"""Value of thresholds that must never be reached: more elements than any stage holds, more steps than any run."""

LARGEST_BUCKET = 500_000_000
"""Elements of DeepSpeed's own default bucket."""


def reduce_bucket_elements(num_elements: int) -> int:
    """Return the gradient elements that ZeRO reduces at a time, for a stage of `num_elements` on this tensor rank.

    ZeRO-2 and 3 keep a buffer of this size: DeepSpeed's own default would take 2 GB of the smallest model.
    """
    return min(LARGEST_BUCKET, num_elements)


def deepspeed_config(
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    optimizer: OptimizerConfig,
    num_micro_batches: int,
    num_elements: int,
) -> dict[str, Any]:
    """Return DeepSpeed's dictionary for the engine of a stage that trains `num_elements` on this tensor rank."""
    # reduced by us, or in buckets; DeepSpeed wants one also where nothing is trained
    bucket = 1 if parallel.reduces_per_step else max(reduce_bucket_elements(num_elements), 1)
    zero: dict[str, Any] = {"stage": parallel.zero_stage, "reduce_bucket_size": bucket}
    if parallel.zero_stage in (1, 2):
        zero |= {
            "reduce_scatter": True,
            "overlap_comm": False,
            # ZeRO-1 reduces once per step, outside of DeepSpeed's buckets, which this setting is about.
            "contiguous_gradients": parallel.zero_stage == 2,
            "round_robin_gradients": False,
        }
    if parallel.zero_stage == 3:
        zero |= {
            "overlap_comm": False,
            "contiguous_gradients": True,
            # No prefetch and no reuse: both follow a trace of one forward and backward pass, which a pipeline has not
            # (`engine.parallel.zero.stage3`). Nothing persists, so that every parameter is sharded alike.
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": EVERYTHING,
            "stage3_max_reuse_distance": 0,
            # it would take the place of the product whose weight gradient the schedule puts off, in silence
            "memory_efficient_linear": parallel.schedule != "zb-h1",
            "zero_hpz_partition_size": parallel.gather_within or 1,
        }
    if parallel.offload == "optimizer":
        # Pinned memory: copies between host and device run at the link's speed, and beside computation.
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        # DeepSpeed derives its batch size from these two; the schedule here decides when a step ends.
        "train_micro_batch_size_per_gpu": parallel.micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": optimizer.clip_norm,
        "zero_optimization": zero,
        # Muon and AdamW here are no classes of DeepSpeed's, and for offload it would demand its own CPU Adam.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Metrics are written by `engine.train`.
        "steps_per_print": EVERYTHING,
        "wall_clock_breakdown": False,
        "data_types": {"grad_accum_dtype": precision.reduce_dtype},
        "communication_data_type": precision.reduce_dtype,
    }
    if precision.dtype == "bf16":
        # every gradient would be scanned once more; `StageEngine.step` refuses a norm that is not finite anyway
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    return config
