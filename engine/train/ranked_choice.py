"""Questions ranked by likelihood while a run goes on (`evaluation.tasks`), in any layout, without generation.

Answers go through the pipeline as validation rows do; the sum of the losses of each row comes back by domain
(`engine.data.choices`), equal on every rank.
"""

from __future__ import annotations

from engine.data.choices import ChoiceSamples, Questions, read_questions
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import DataError
from engine.parallel.agreement import on_all
from engine.train.feed import EVALUATION_CHUNK
from engine.train.hooks import Run
from engine.train.records import Record


class RankedChoice:
    """The questions of a run."""

    def __init__(self) -> None:
        self._questions: list[Questions] = []
        self._eos_id = 0

    def open(self, run: Run) -> None:
        """Read the files, and see that every answer fits every run stage. Collective over the world.

        Raises:
            DataError: a file is not what it has to be; on every rank.
        """
        on_all(lambda: self._open(run), run.groups.world, DataError)

    def _open(self, run: Run) -> None:
        config = run.config
        if not config.evaluation.tasks:
            return
        tokenizer = load_tokenizer(config.tokenizer)
        self._eos_id = tokenizer.eos_id
        self._questions = [read_questions(name, path, tokenizer) for name, path in config.evaluation.tasks.items()]
        shortest = min(config.stages, key=lambda run_stage: run_stage.sequence_length)
        for questions in self._questions:
            ChoiceSamples(questions, shortest.sequence_length, shortest.data.attention, self._eos_id, 1)

    def evaluate(self, run: Run) -> Record | None:
        """Return the measures of all files, or None where a stop was requested on any rank. Collective over the
        world."""
        record: Record = {}
        for questions in self._questions:
            nats = self._nats(run, questions)
            if nats is None:
                return None
            record |= {f"validation_{key}/{questions.name}": value for key, value in questions.measures(nats).items()}
        return record

    def _nats(self, run: Run, questions: Questions) -> list[float] | None:
        """Return the negative log likelihood of each answer; None where a stop was requested on any rank."""
        feed, sums = run.feed, run.sums
        rows = run.groups.layout.data * feed.parallel.micro_batch_size * EVALUATION_CHUNK
        run_stage = run.run_stage
        samples = ChoiceSamples(questions, run_stage.sequence_length, run_stage.data.attention, self._eos_id, rows)
        chunks = feed.validation_chunks(samples)
        loss = sums.names.index("causal")
        nats: list[float] = []
        for _ in range(feed.num_validation_chunks(samples)):
            run.heart.beat(run.state.step, "evaluation")
            inputs, _, _ = sums.of_weights(lambda: next(chunks), rows)
            by_domain = sums.by_domain(rows)
            sums_L = run.pipeline.evaluate(inputs, by_domain)
            _, (stop,), found_KL = sums.of_losses(sums_L, (float(run.requests.stop_requested),), by_domain)
            if stop:
                return None
            nats += found_KL[:, loss].tolist()
        # the last chunk may be short
        return nats[: samples.num_samples]
