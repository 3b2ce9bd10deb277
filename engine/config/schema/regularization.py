"""The sections of a run stage against forgetting: penalties on the weights, their average, the Reptile meta-step.

Each needs fp32 values beside the trained weights (`RunStage.added_moments` names them), which ranks hold as they hold
the optimizer's moments. Frozen parameters have none of them, and no penalty.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from engine.config.schema.section import KeyKind, Section

FIRST_WEIGHTS = "first_weights"
"""Added moment: weights at the beginning of the run stage."""
FISHER = "fisher"
"""Added moment: diagonal of the Fisher information at those weights."""
EMA = "ema"
"""Added moment: exponential moving average of the weights."""
REPTILE = "reptile"
"""Added moment: weights after the last meta-step."""


class L2SPConfig(Section):
    """L2-SP (Li et al. 2018, arXiv 1802.01483): strength / 2 x squared distance to the run stage's first weights."""

    strength: PositiveFloat
    """Factor of half the squared distance, which is added to the loss."""


class EWCConfig(Section):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796): strength / 2 x squared distance to the
    run stage's first weights, each element weighed by its Fisher information on the data of the run stage before."""

    strength: PositiveFloat
    """Factor of half the weighted squared distance, which is added to the loss."""
    batches: PositiveInt = 32
    """Number of batches of the run stage before (its first ones, without replay) from whose gradients the Fisher
    information is estimated when the run stage begins. Each costs as much as a step."""


class DistillationConfig(Section):
    """Distillation (Hinton et al. 2015, arXiv 1503.02531) from the run stage's first weights: strength x divergence of
    the model's predictions from those that these weights make of the same rows: of tokens (beside a task, those of the
    text that is replayed; Li and Hoiem 2016, arXiv 1606.09282) the likeliest alone, of labels all."""

    strength: PositiveFloat
    """Factor of the Kullback-Leibler divergence, which is added to the loss of each predicted token or label."""
    top_k: PositiveInt = 64
    """Number of the likeliest tokens that are kept of each prediction; their probabilities are scaled to a sum of 1."""


class AdversarialConfig(Section):
    """Adversarial training (Miyato et al. 2017, arXiv 1605.07725, equation 5): each step also learns from its samples
    with their token embeddings moved by `epsilon` in the direction in which the loss grows fastest."""

    epsilon: PositiveFloat = 0.1
    """Length of the step away from the embeddings of a row, over all of its tokens. A token's embedding is about 1.4
    long in BERT; the authors' code has 5.0 for embeddings scaled to a length of 16. Too long a step makes a row
    another one: a small encoder learned nothing with 1.0."""


class MixoutConfig(Section):
    """Mixout (Lee et al. 2020, arXiv 1909.11299): in each step some weights, drawn anew, are those of the run stage's
    beginning, and the others are moved so that the mean over all draws is the present weight."""

    share: float = Field(gt=0.0, lt=1.0)
    """Share of the elements of each trained parameter that are those of the beginning."""


class RegularizationConfig(Section):
    """Terms that are added to the loss of a run stage, so that it forgets less of the earlier ones or learns what is
    common to more than its samples."""

    l2_sp: L2SPConfig | None = None
    """Pull of all trained weights towards the run stage's first weights. None means none."""
    ewc: EWCConfig | None = None
    """Pull of those weights that mattered for the run stage before. None means none."""
    distillation: DistillationConfig | None = None
    """Pull of the predictions to those of the run stage's first weights. It costs a forward pass more per step. None
    means none."""
    adversarial: AdversarialConfig | None = None
    """Loss at the worst step away from the token embeddings, beside that at the embeddings. It doubles the cost of a
    step. None means none."""
    mixout: MixoutConfig | None = None
    """Mixture of the weights with the run stage's first ones, in place of dropout. None means none."""


class EMAConfig(Section):
    """Exponential moving average of the weights, beside the training, from the run stage's first weights on."""

    kind: ClassVar[KeyKind] = "schedule"

    decay: float = Field(gt=0.0, lt=1.0)
    """Share of the average that stays at each update of it; the rest comes from the present weights."""
    every_steps: PositiveInt = 1
    """Number of steps from one update of the average to the next."""


class ReptileConfig(Section):
    """Meta-steps of Reptile (Nichol et al. 2018, arXiv 1803.02999) as in the meta-experience replay of Abbes et al.
    2025 (arXiv 2508.01908): every few steps the weights go back to a part of the way that they came since the last
    meta-step, which favours updates whose gradients agree."""

    every_steps: PositiveInt
    """Number of steps from one meta-step to the next, counted from the beginning of the run stage."""
    step_size: float = Field(gt=0.0, lt=1.0)
    """Share of the way that is kept."""
