"""The section of an adapter: few parameters that are trained in place of a pretrained model's own.

A `model.adapter` section is one of these classes, told apart by its key `method`; `engine.models.adapters` has the
modules. Targets are names of the matrices of a layer (`engine.config.adapter_targets`).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PositiveFloat, model_validator

from engine.config.schema.section import Section

AdapterMethod = Literal["lora", "adalora", "ia3", "bottleneck", "prompt", "prefix"]


class Adapter(Section):
    """The keys that every method has."""

    told_apart_by: ClassVar[str] = "method"
    merges: ClassVar[bool] = True
    """True if the adapter can be added into the weights of the model, so that nothing of it is left."""
    is_peft: ClassVar[bool] = True
    """True if peft has the method, so that the adapter is saved in its format."""
    generates: ClassVar[bool] = True
    """True if text can be generated with it, by Hugging Face's class or by peft's around it."""
    learning_rate: ClassVar[float] = 5e-4
    """Peak learning rate of a task file that names none."""

    method: AdapterMethod
    """Method by which the model is adapted."""

    @property
    def drop_rate(self) -> float:
        """Share of what the adapter reads that training sets to 0."""
        return 0.0


class TargetedAdapter(Adapter):
    """The keys of the methods that change matrices or parts of each layer."""

    default_targets: ClassVar[tuple[str, ...]] = ()
    """Targets where the section names none; those that a model does not have are left out."""

    targets: tuple[str, ...] = ()
    """Name patterns (shell style) of the matrices of each layer that are adapted: `query`, `key`, `value`, `output`,
    `gate`, `up`, `down`, or with the part of the layer before it, `attention.query` or `ffn.*`. Forms whose files have
    queries, keys and values in one matrix have `qkv`, and ModernBERT has `gate_up`. Of bottleneck adapters they are
    names of parts: `attention`, `cross_attention`, `ffn`. Empty means those of the paper."""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, given: Any) -> Any:
        # Behind a validator of the section around it a list counts as Python's, which a strict reader takes for none.
        if isinstance(given, dict) and isinstance(targets := given.get("targets"), list):
            return given | {"targets": tuple(targets)}
        return given


class LoRAConfig(TargetedAdapter):
    """LoRA (Hu et al. 2021, arXiv 2106.09685): adds alpha / rank x B A to a matrix, of two narrow matrices."""

    default_targets: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value", "attention.qkv")

    method: Literal["lora"]
    """Method: LoRA."""
    rank: int = Field(default=8, ge=1, le=2**16)
    """Number of rows of A and of columns of B."""
    alpha: PositiveFloat = 16.0
    """Factor of the product, which is divided by the rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the input of A that training sets to 0. Keyed as `model.dropout`, so it is equal in every layout."""

    @property
    def drop_rate(self) -> float:
        return self.dropout


class AdaLoRAConfig(TargetedAdapter):
    """AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): adds alpha / rank x B E A to a matrix, with a diagonal E whose
    least important elements are set to zero on the way, over all matrices together."""

    default_targets: ClassVar[tuple[str, ...]] = ("*",)  # theirs, section 4.1: all matrices

    method: Literal["adalora"]
    """Method: AdaLoRA."""
    rank: int = Field(default=8, ge=1, le=2**16)
    """Mean number of elements of E that are left in a matrix at the end."""
    initial_rank: int = Field(default=12, ge=1, le=2**16)
    """Number of elements of E at the beginning: of the rows of A and of the columns of B."""
    alpha: PositiveFloat = 16.0
    """Factor of the product, which is divided by the initial rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the input of A that training sets to 0. Keyed as `model.dropout`, so it is equal in every layout."""
    orthogonality: float = Field(default=0.5, ge=0.0)
    """Strength of the penalty on rows of A, and columns of B, that are not orthonormal: that of the mean over all A and
    B of the norm of A A' - I, or of B' B - I."""
    warmup_share: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the run's steps before the first elements of E are set to zero."""
    final_share: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Share of the run's steps, at its end, in which the same elements stay zero."""
    every_steps: int = Field(default=10, ge=1)
    """Number of steps from one choice of elements to the next."""
    smoothing: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Share of the importance of an element, and of the deviation from it, that stays at each step (beta of both)."""

    @property
    def drop_rate(self) -> float:
        return self.dropout


class IA3Config(TargetedAdapter):
    """IA3 (Liu et al. 2022, arXiv 2205.05638): scales the output features of a matrix, or the input of one that leads
    back to the residual stream (`output`, `down`)."""

    learning_rate: ClassVar[float] = 3e-3  # theirs, section 3.3
    default_targets: ClassVar[tuple[str, ...]] = ("attention.key", "attention.value", "attention.qkv", "ffn.down")

    method: Literal["ia3"]
    """Method: IA3."""


class BottleneckConfig(TargetedAdapter):
    """Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751): a small network with a residual connection behind
    each part of a layer. The norms of the layers are trained, too."""

    merges: ClassVar[bool] = False
    is_peft: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 3e-4  # theirs, section 3.1
    default_targets: ClassVar[tuple[str, ...]] = ("attention", "cross_attention", "ffn")

    method: Literal["bottleneck"]
    """Method: bottleneck adapters."""
    size: int = Field(default=64, ge=1, le=2**16)
    """Number of features inside of an adapter."""


class VirtualTokensConfig(Adapter):
    """The keys of the methods that put trained vectors in front of a row's tokens."""

    merges: ClassVar[bool] = False

    virtual_tokens: int = Field(default=20, ge=1, le=2**12)
    """Number of trained vectors in front of each row. Rows and they together fit `model.max_positions`."""


class PromptConfig(VirtualTokensConfig):
    """Prompt tuning (Lester et al. 2021, arXiv 2104.08691): trains embeddings in front of those of a row's tokens."""

    learning_rate: ClassVar[float] = 1e-2

    method: Literal["prompt"]
    """Method: prompt tuning."""


class PrefixConfig(VirtualTokensConfig):
    """Prefix tuning (Li and Liang 2021, arXiv 2101.00190): trains keys and values that each layer's attention sees in
    front of a row's."""

    # peft 0.21 hands its prefix to an argument that transformers 5.24 has renamed, so its text is another one
    generates: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 5e-3

    method: Literal["prefix"]
    """Method: prefix tuning."""


AnyAdapter = Annotated[
    LoRAConfig | AdaLoRAConfig | IA3Config | BottleneckConfig | PromptConfig | PrefixConfig, Discriminator("method")
]
"""A `model.adapter` section of any method."""
