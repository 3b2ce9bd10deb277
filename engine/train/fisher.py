"""The diagonal of the Fisher information, estimated on the data of the run stage before, on local shards.

Kirkpatrick et al. 2017 (arXiv 1612.00796), equation 3. This is the empirical Fisher information: gradients of the loss
on the data's own targets, not on targets drawn from the model (Kunstner et al. 2019, arXiv 1905.12558, on the
difference). Gradients are squared per global batch and not per sample: the gradient of a batch is the same in every
layout, while that of a micro-batch depends on the number of data ranks and on how many rows each has at a time. The
mean over B independent samples has 1 / B of a sample's variance, so

    fisher = mean over batches of B x (gradient of the batch's loss)^2

estimates the mean square of a sample's gradient, whatever B is, where the mean gradient is small: at the end of a run
stage. A sample is a row. Departures from the paper: the run stage before is the only one whose data is used.
"""

from __future__ import annotations

import torch

from engine.config.schema.regularization import FISHER
from engine.config.schema.run import RunConfig
from engine.errors import DataError
from engine.logs import logger, phase
from engine.parallel.zero import accept_finite
from engine.train.build import during
from engine.train.hooks import Run
from engine.train.stage_run import Datasets, RunData, StageRun

_log = logger(__name__)


def estimate_fisher(run: Run, number: int, batches: int) -> None:
    """Fill the moment `fisher` with the estimate at the present weights, on the first batches of run stage `number`.

    Its data is opened for this, without replay and held-out data; weights and optimizer stay as they are, bit for bit.
    Collective over the world. A request to stop waits until it is done.

    Raises:
        DataError: the data is gone, damaged, or written with another tokenizer.
        NotFinite: a gradient is not.
    """
    pipeline, engine = run.pipeline, run.pipeline.engine
    config = _data_alone(run.config, number)
    for shard in engine.parameter_shards():
        if FISHER in shard.moments:
            shard.moments[FISHER].zero_()
    with phase(f"estimating the Fisher information on {batches} batches of {config.stages[number].name}"):
        datasets = _open(run, config, number)
        # The rows of that run stage, and the frozen parameters of the present one, which the engine is made for.
        rows = config.stages[number].model_copy(update={"freeze": run.run_stage.freeze})
        present, pipeline.spec = pipeline.spec, during(pipeline.spec, config, rows)
        stage = StageRun(number, config, datasets, run.groups, engine.device, pipeline.spec, lambda: False)
        try:
            stage.feed.start()
            for batch in range(batches):
                run.heart.beat(run.state.step, "load")
                _add_squares(run, stage, batch, 1.0 / batches)
        finally:
            stage.close()
            pipeline.spec = present
    _log.info("the Fisher information is that of %d batches of run stage %s", batches, config.stages[number].name)


def _open(run: Run, config: RunConfig, number: int) -> Datasets:
    try:
        return RunData(config, run.groups).take(number, lambda: None)
    except DataError as error:
        name = config.stages[number].name
        raise DataError(
            f"stages.{number + 1}.regularization.ewc needs the training data of run stage {name}, which cannot be "
            f"read: {error.wrong}",
            error.allowed or "the data that it was trained on",
            "bring it back, or pull all weights alike with regularization.l2_sp, which needs no data",
        ) from error


def _data_alone(config: RunConfig, number: int) -> RunConfig:
    """Return the configuration with nothing of run stage `number` but its training data to open."""
    stages = [
        stage.model_copy(
            update={
                "data": stage.data.model_copy(update={"validation": None}),
                "replay": None if place == number else stage.replay,
            }
        )
        for place, stage in enumerate(config.stages)
    ]
    return config.model_copy(update={"stages": tuple(stages)})


def _add_squares(run: Run, stage: StageRun, batch: int, share: float) -> None:
    """Add `share` x samples x squared gradient of the next batch to the moment."""
    engine, feed = run.pipeline.engine, stage.feed
    inputs, weights_L, weights_KL = run.sums.of_weights(feed.step, len(feed.domains))
    scales = (run.groups.zero.size * run.sums.scales(weights_L)).float()
    run.pipeline.spec = feed.spec
    run.pipeline.train(inputs, scales, run.sums.by_domain(len(weights_KL)))
    factor = share * stage.run_stage.batches.size(batch)

    def add_and_refuse(norm: float) -> bool:
        """Read the gradient where hooks do: summed over all ranks. Refused, it is discarded and no weight moves."""
        accept_finite(norm)
        held = {shard.spec.name: shard for shard in engine.parameter_shards()}
        for spec, _, gradient in engine.gradient_shards():
            fisher = held[spec.name].moments[FISHER]
            wide = gradient.to(fisher.device, torch.float32)
            fisher.addcmul_(wide, wide, value=factor)
        return False

    engine.step(0.0, add_and_refuse)
