"""Hook of what a run stage keeps beside its weights against forgetting: penalties, the average, the meta-step.

The values are moments that are added to the engine (`StageEngine.keep_moments`): sharded, saved and loaded into other
layouts as the optimizer's moments are. They begin where the run stage does; after that everything is a function of them
and of the step, so that a run which was stopped goes on exactly.
"""

from __future__ import annotations

import torch

from engine.config.schema.regularization import EMA, FIRST_WEIGHTS, FISHER, REPTILE
from engine.config.schema.stage import RunStage
from engine.models.dropout import KEYS
from engine.parallel.boundary import Tensors
from engine.parallel.collectives import all_reduce
from engine.parallel.zero.other_weights import average, copy_weights, step_back, weights_from
from engine.parallel.zero.penalties import Penalty
from engine.train.fisher import estimate_fisher
from engine.train.hooks import Hook, Run
from engine.train.records import Record


class Regularization(Hook):
    """Hook that begins the added values of a run stage, sets its penalties, and moves average and weights."""

    def begin_run_stage(self, run: Run) -> None:
        """Begin the values at the weights of a run stage's beginning, and give the engine its penalties."""
        engine, run_stage = run.pipeline.engine, run.run_stage
        engine.penalties = ()  # the Fisher information is that of the loss alone
        if run.state.stage_step == 0 and run_stage.added_moments:
            run.checkpoints.hold_update()  # a save of the run stage before may still copy a value of the same name
            for name in run_stage.added_moments:
                if name != FISHER:
                    copy_weights(engine, name)
            if ewc := run_stage.regularization.ewc:
                estimate_fisher(run, run.state.run_stage - 1, ewc.batches)
        engine.penalties = penalties_of(run_stage)

    def after_rollback(self, run: Run) -> None:
        """Do the same where the checkpoint stands, which may be in another run stage."""
        self.begin_run_stage(run)

    def __init__(self) -> None:
        self._scale = torch.zeros(())
        """Factor of the sum of the divergences in the step's loss."""

    def before_forward(self, run: Run, inputs: list[Tensors], weights_L: torch.Tensor) -> None:
        """Run the teacher of distillation, the first weights of the run stage, on the inputs of the step."""
        distillation, engine = run.run_stage.regularization.distillation, run.pipeline.engine
        if distillation is None:
            return
        assert engine.distilled is not None, "built where some run stage distils"
        # that of tokens and labels; pairs, where they are a second loss, are not distilled
        self._scale = run.sums.scales(weights_L)[0]
        run.checkpoints.hold_update()  # a save may still copy the weights, which change places
        # no dropout: a teacher predicts as well as it can
        given = [{name: tensor for name, tensor in one.items() if name != KEYS} for one in inputs]
        with_labels = run.config.distils_labels(run.state.run_stage)
        asked = engine.distilled.teaching(distillation.top_k, distillation.strength, with_labels)
        with weights_from(engine, FIRST_WEIGHTS), asked:
            run.pipeline.evaluate(given)

    def after_step(self, run: Run) -> Record:
        """Take a meta-step and update the average where they are due; return the term of distillation.

        The step's update has waited for the save in flight, and none has begun since.
        """
        engine, run_stage, step = run.pipeline.engine, run.run_stage, run.state.stage_step
        if (reptile := run_stage.reptile) and step % reptile.every_steps == 0:
            step_back(engine, REPTILE, reptile.step_size)
        # after the meta-step: of the weights that the run goes on with
        if (ema := run_stage.ema) and step % ema.every_steps == 0:
            average(engine, EMA, ema.decay)
        return self._divergence(run)

    def _divergence(self, run: Run) -> Record:
        """Return the term of distillation in the step's loss. Collective over the world."""
        distillation, engine = run.run_stage.regularization.distillation, run.pipeline.engine
        if distillation is None or engine.distilled is None:
            return {}
        own = engine.distilled.take_divergence().to(engine.device)
        # Tensor ranks have the same divergence; those of the sequence axis have that of their own slice.
        total = all_reduce(own * (run.groups.tensor.position == 0), run.groups.world)
        return {"regularization/distillation": (distillation.strength * total * self._scale).item()}


def penalties_of(run_stage: RunStage) -> tuple[Penalty, ...]:
    """Return the penalties of a run stage, in a fixed order."""
    l2_sp, ewc = run_stage.regularization.l2_sp, run_stage.regularization.ewc
    found = []
    if l2_sp is not None:
        found.append(Penalty("l2_sp", l2_sp.strength, FIRST_WEIGHTS))
    if ewc is not None:
        found.append(Penalty("ewc", ewc.strength, FIRST_WEIGHTS, FISHER))
    return tuple(found)
