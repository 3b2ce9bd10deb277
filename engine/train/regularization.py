"""Hook of what a run stage keeps beside its weights against forgetting: penalties, the average, the meta-step.

The values are moments that are added to the engine (`StageEngine.keep_moments`): sharded, saved and loaded into other
layouts as the optimizer's moments are. They begin where the run stage does; after that everything is a function of them
and of the step, so that a run which was stopped goes on exactly.
"""

from __future__ import annotations

from engine.config.schema.regularization import EMA, FIRST_WEIGHTS, FISHER, REPTILE
from engine.config.schema.stage import RunStage
from engine.parallel.zero.other_weights import average, copy_weights, step_back
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

    def after_step(self, run: Run) -> Record:
        """Take a meta-step and update the average where they are due.

        The step's update has waited for the save in flight, and none has begun since.
        """
        engine, run_stage, step = run.pipeline.engine, run.run_stage, run.state.stage_step
        if (reptile := run_stage.reptile) and step % reptile.every_steps == 0:
            step_back(engine, REPTILE, reptile.step_size)
        # after the meta-step: of the weights that the run goes on with
        if (ema := run_stage.ema) and step % ema.every_steps == 0:
            average(engine, EMA, ema.decay)
        return {}


def penalties_of(run_stage: RunStage) -> tuple[Penalty, ...]:
    """Return the penalties of a run stage, in a fixed order."""
    l2_sp, ewc = run_stage.regularization.l2_sp, run_stage.regularization.ewc
    found = []
    if l2_sp is not None:
        found.append(Penalty("l2_sp", l2_sp.strength, FIRST_WEIGHTS))
    if ewc is not None:
        found.append(Penalty("ewc", ewc.strength, FIRST_WEIGHTS, FISHER))
    return tuple(found)
