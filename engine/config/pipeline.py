"""Rules of the pipeline: what its stages, chunks and schedule ask of each other and of the model."""

from __future__ import annotations

from engine.config.schema import ModelConfig, ParallelConfig
from engine.errors import ConfigError, PalimpsestError


def check_pipeline(model: ModelConfig, parallel: ParallelConfig, problems: list[PalimpsestError]) -> None:
    """Adds every rule of the pipeline that the configuration breaks."""
    pipe, virtual_stages, num_layers = parallel.pipe, parallel.virtual_stages, model.num_layers
    if pipe > num_layers:
        problems.append(
            ConfigError(f"parallel.pipe = {pipe} is more than model.num_layers = {num_layers}", f"1 to {num_layers}")
        )
    if virtual_stages == 1:
        return
    if pipe == 1:
        problems.append(
            ConfigError(
                f"parallel.virtual_stages = {virtual_stages} with parallel.pipe = 1",
                "virtual_stages 1 without a pipeline",
                "leave it out, or set parallel.pipe to 2 or more",
            )
        )
    elif pipe <= num_layers < pipe * virtual_stages:
        problems.append(
            ConfigError(
                f"parallel.pipe = {pipe} x parallel.virtual_stages = {virtual_stages} are more parts than "
                f"model.num_layers = {num_layers}",
                f"virtual_stages 1 to {num_layers // pipe} with this pipe",
            )
        )
    if parallel.schedule != "1f1b":
        problems.append(
            ConfigError(
                f"parallel.virtual_stages = {virtual_stages} with parallel.schedule = {parallel.schedule}",
                "schedule 1f1b, which interleaves the chunks",
                "set parallel.schedule=1f1b or parallel.virtual_stages=1",
            )
        )
