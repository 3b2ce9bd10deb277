"""Parts that a stage engine is made of: parameters by group, the optimizer over them, and DeepSpeed's engine."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import deepspeed
import torch

from engine.config.schema.parallel import ParallelConfig
from engine.parallel.groups import Group
from engine.parallel.stage import StageModule
from engine.parallel.state import ParameterGroup, Placement, ShardRange
from engine.parallel.zero.adapter import Engine, Topology
from engine.parallel.zero.optimizers import Named, require
from engine.parallel.zero.stage3 import no_barrier

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@runtime_checkable
class ShardOptimizer(Protocol):
    """An optimizer that needs to know which parameters its tensors hold, and which ranks hold the rest of them."""

    def attach(
        self,
        ranges: Iterable[tuple[torch.Tensor, list[ShardRange]]],
        placements: list[Placement],
        zero: Group,
        tensor: Group,
    ) -> None: ...


def mark_frozen(module: StageModule, parameter_groups: Iterable[ParameterGroup]) -> None:
    """Mark the parameters of frozen groups as such, before DeepSpeed sees them."""
    frozen = {spec.name for group in parameter_groups if group.trained_since is None for spec in group.specs}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(module.logical_names[name] not in frozen)


def optimizer_over(
    named: Named, parameter_groups: Iterable[ParameterGroup], make_optimizer: MakeOptimizer
) -> torch.optim.Optimizer:
    """Make the optimizer of trained parameters, one parameter group of torch per group of ours."""
    return make_optimizer(
        [
            {
                "params": [parameter for _, parameter in group],
                "weight_decay": described.weight_decay,
                "matrices": described.matrices,
                "moments": described.moments,
            }
            for group, described in zip(named, parameter_groups, strict=True)
        ]
    )


def parameters_by_group(module: StageModule, parameter_groups: Iterable[ParameterGroup]) -> Named:
    """Return the module's parameters in the order of the groups."""
    # `named_parameters` gives a shared parameter once, under the first of its names.
    by_name = {module.logical_names[name]: parameter for name, parameter in module.named_parameters()}
    return [[(spec, by_name[spec.name]) for spec in group.specs] for group in parameter_groups]


def adapt_config(config: dict[str, Any], parallel: ParallelConfig, trains: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a stage, of which `trains` says whether it has trained parameters."""
    stage = config["zero_optimization"]["stage"]
    if stage == 0 or parallel.offload == "optimizer":
        # Clipped in `StageEngine.step` instead: without ZeRO the norm of DeepSpeed would miss other pipeline stages,
        # and offloaded gradients would be clipped on the host.
        config = config | {"gradient_clipping": 0.0}
    if not trains and stage < 3:
        config = config | {"zero_optimization": {"stage": 0}}  # there is nothing to cut into shards
    return config


def make_deepspeed_engine(
    module: StageModule, optimizer: torch.optim.Optimizer | None, topology: Topology, config: dict[str, Any]
) -> Any:
    """Make DeepSpeed's engine of one pipeline stage. Collective over the world."""
    # The class itself, not `deepspeed.initialize`, which would choose DeepSpeed's own engine class.
    with no_barrier():
        return Engine(
            args=None,
            model=module,
            optimizer=optimizer,
            mpu=topology,
            dist_init_required=False,
            config=config,
            config_class=deepspeed.DeepSpeedConfig(config, topology),
        )


def replace_norm(engine: Any, trains: bool, zero_stage: int, norm: Callable[[], torch.Tensor]) -> None:
    """Have DeepSpeed's step read `norm()` in place of its own, which knows no pipeline stages and no tied weights.

    An engine that trains nothing is kept from preparing its optimizer for backward passes.
    """
    if not trains:
        # DeepSpeed prepares an optimizer for a backward pass, and scales its gradients: here are neither.
        require(engine, "_backward_prologue", "_backward_prologue_per_tensor")
        engine._backward_prologue = lambda: None
        engine._backward_prologue_per_tensor = lambda grad: grad
    elif zero_stage in (1, 2):
        engine.optimizer.scaled_global_norm = lambda norm_type=2: norm()
        # Over all stages, of which some may have no optimizer; it is asked where the norm, which decides, is known.
        require(engine.optimizer, "_model_parallel_all_reduce")
        engine.optimizer._model_parallel_all_reduce = lambda tensor, op: None
    elif zero_stage == 3:
        engine.optimizer._get_norm_groups = lambda: [norm()]
