"""The model's section: a class per family of models, with what all of them share in `ModelConfig`.

A run file's `model` section is one of these classes, told apart by its key `family`: a key of another family is an
unknown one. The defaults are those of a published model of the family (GPT-2, BERT, T5 version 1.0), so that a family
and its sizes are a model that Hugging Face's library has, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, Tag, TypeAdapter, model_validator

from engine.config.schema.adapter import AnyAdapter
from engine.config.schema.rotary import AnyRopeScaling, DynamicScaling, Rotary
from engine.config.schema.section import KeyKind, Section

FamilyName = Literal["gpt", "bert", "t5"]
TaskName = Literal["classification", "regression", "token_classification", "question_answering"]
Pooling = Literal["token", "mean"]
Activation = Literal["gelu_tanh", "gelu", "relu", "swiglu", "geglu", "geglu_tanh"]
Norm = Literal["layernorm", "rmsnorm"]

LARGEST_DEPTH = 2**14
LARGEST_WIDTH = 2**30
"""Largest sizes, far beyond any model: larger ones are typing errors, refused before anything is computed of them."""


class TaskHead(Section):
    """The head of a task: it computes some numbers for each sequence or for each of its tokens, and takes the place of
    the head over the vocabulary."""

    task: TaskName
    """Kind of the task: a label of several, or numbers, for each sequence (`classification`, `regression`); a label for
    each token (`token_classification`); the first and the last token of an answer (`question_answering`)."""
    num_labels: int = Field(ge=1, le=2**20)
    """Number of labels, or of predicted numbers; 2 for `question_answering`."""
    pooling: Pooling = "token"
    """State of a sequence that its label or number is read from (`classification`, `regression`): that of one token
    (`token`), an encoder's first or a decoder's last, or in encoders of ModernBERT's form the mean of all (`mean`)."""
    keeps_vocabulary: bool = False
    """True if the model keeps the head over the vocabulary, whose loss is trained on replayed text beside the task."""

    @property
    def sees_tokens(self) -> bool:
        """True if it computes numbers for each token, and not for the sequence."""
        return self.task in ("token_classification", "question_answering")


class ModelConfig(Section):
    """The keys that every family has. Not a model by itself: `make_model` makes one of its family's class.

    What code that serves several families asks of a model beside these keys is a property here, which a family
    overrides.
    """

    kinds: ClassVar[dict[str, KeyKind]] = {"vocab_multiple": "execution"}
    told_apart_by: ClassVar[str] = "family"

    family: FamilyName
    """Architecture family: decoders (`gpt`), encoders that predict masked tokens (`bert`), or an encoder and a decoder
    (`t5`)."""
    vocab_size: int = Field(ge=1, le=LARGEST_WIDTH)
    """Number of real rows of the embedding: the tokenizer's size or more."""
    vocab_multiple: int = Field(default=128, ge=1, le=LARGEST_WIDTH)
    """Number that the rows of the embedding are padded to a multiple of, for speed and for tensor parallelism."""
    num_layers: int = Field(ge=1, le=LARGEST_DEPTH)
    """Number of layers; of an encoder-decoder (`t5`), those of both stacks together."""
    hidden_size: int = Field(ge=1, le=LARGEST_WIDTH)
    """Width of the hidden states."""
    num_heads: int = Field(ge=1, le=LARGEST_WIDTH)
    """Number of attention heads (query heads, under grouped-query attention)."""
    # Factories see the fields above them. `max`, so that more heads than columns break the rule that joins both keys
    # (`check_model`), and not the bound of a head size that nobody wrote.
    head_size: int = Field(
        default_factory=lambda data: max(1, data["hidden_size"] // data["num_heads"]), ge=1, le=LARGEST_WIDTH
    )
    """Width of one attention head; `hidden_size` / `num_heads` where it is left out."""
    num_kv_heads: PositiveInt = Field(default_factory=lambda data: data["num_heads"])
    """Number of key and value heads (grouped-query attention); `num_heads` where it is left out."""
    feed_forward_size: int = Field(default_factory=lambda data: 4 * data["hidden_size"], ge=1, le=4 * LARGEST_WIDTH)
    """Width inside of the feed-forward part; 4 x `hidden_size` where it is left out."""
    max_positions: int = Field(default=1024, ge=1, le=LARGEST_WIDTH)
    """Largest number of tokens in a sequence, and of rows in the position table where positions are learned."""
    norm: Norm = "layernorm"
    """Kind of the norms: layer norms, or RMS norms (no mean and no shift)."""
    norm_epsilon: float = Field(default=1e-5, ge=1e-37)
    """Number added to the variance in norms; a smaller one than 1e-37 is 0 in fp32."""
    norm_bias: bool = True
    """Shifts of layer norms (RMS norms have none)."""
    activation: Activation = "gelu_tanh"
    """Activation of the feed-forward part; `swiglu`, `geglu` and `geglu_tanh` multiply its result by a gate."""
    bias: bool = True
    """Biases of the linear layers."""
    tie_embeddings: bool = True
    """One matrix for the token embedding and the output projection."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the hidden states that training sets to 0: of the embedding's, and of the result of each part of a
    layer. Keyed by (seed, step, sample, layer, site), so it is equal in every layout."""
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the attention probabilities that training sets to 0; above 0 they are computed one by one, which costs
    time and memory."""
    task_head: TaskHead | None = None
    """Head of the task that the model is fine-tuned for. None means the head over the vocabulary that it is pretrained
    with."""
    adapter: AnyAdapter | None = None
    """Adapter that is trained in place of the layers' own weights. None means none."""

    @property
    def has_vocabulary_head(self) -> bool:
        """True if the model has a head over the vocabulary, alone or beside that of its task."""
        return self.task_head is None or self.task_head.keeps_vocabulary

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory; a function of the configuration alone, never of the layout."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def gated(self) -> bool:
        """True if the feed-forward part multiplies its result by a gate."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def position_table(self) -> bool:
        """True if each position has an embedding of its own."""
        return False

    @property
    def post_norm(self) -> bool:
        """True if norms follow the residual sums and do not precede the parts of a layer."""
        return False

    @property
    def transforms_for_tasks(self) -> bool:
        """True if the head of a task reads hidden states through the transformation that precedes the head over the
        vocabulary (ModernBERT), and not through a pooler or as they are (BERT)."""
        return False

    @property
    def parallel(self) -> bool:
        """True if attention and feed-forward part of a layer read the same hidden states."""
        return False

    @property
    def biased_qkv(self) -> bool:
        """True if the projections to queries, keys and values have biases."""
        return self.bias

    @property
    def normed_heads(self) -> bool:
        """True if each head of queries and keys is normalised."""
        return False

    @property
    def score_scale(self) -> float | None:
        """Factor of attention scores; None means head_size ** -0.5."""
        return None

    @property
    def longest_row(self) -> int:
        """Largest number of tokens in a row."""
        return self.max_positions

    @property
    def tells_segments_apart(self) -> bool:
        """True if the two segments of a pair have embeddings of their own."""
        return False

    def reach(self, layer: int) -> int | None:
        """Largest distance of the tokens that a token of a layer sees; None means no limit."""
        del layer
        return None

    def rotary(self, reach: int | None) -> Rotary | None:
        """Rotation in layers with a `reach`; None means no rotary positions."""
        del reach
        return None

    if TYPE_CHECKING:  # pydantic gives it to frozen models, which type checkers do not see

        def __hash__(self) -> int: ...


class GPTConfig(ModelConfig):
    """A decoder in GPT-2 form (the defaults), in Llama form or in that of its relatives (see `configs/models`)."""

    __hash__ = ModelConfig.__hash__

    family: Literal["gpt"] = "gpt"
    """Architecture family: a decoder."""
    position: Literal["learned", "rope"] = "learned"
    """Kind of positions: a table of learned embeddings, or rotations of queries and keys."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: AnyRopeScaling | None = None
    """Scaling of the rotary frequencies to longer rows. None means none."""
    partial_rotary_factor: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of each head's dimensions, the first ones, that rotary positions turn."""
    qkv_bias: bool = Field(default_factory=lambda data: data["bias"])
    """Biases of the projections to queries, keys and values; as `bias` where it is left out."""
    qk_norm: bool = False
    """Norms of each head of queries and keys (Henry et al. 2020, arXiv 2010.04245), with one scale for all heads,
    before rotary positions turn them."""
    parallel_residual: bool = False
    """Attention and feed-forward part read the same hidden states, each through a norm of its own, and their sum is
    added to them (Wang and Komatsuzaki 2021, GPT-J). Otherwise the feed-forward part reads the sum with attention."""
    sliding_window: int | None = Field(default=None, ge=2)
    """Number of tokens that a token sees, itself among them. None means all tokens before it."""
    first_window_layer: NonNegativeInt = 0
    """Number of the first layer with the sliding window; the layers before it see all tokens."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""

    @property
    def position_table(self) -> bool:
        return self.position == "learned"

    @property
    def parallel(self) -> bool:
        return self.parallel_residual

    @property
    def biased_qkv(self) -> bool:
        return self.qkv_bias

    @property
    def normed_heads(self) -> bool:
        return self.qk_norm

    @property
    def longest_row(self) -> int:
        scaling = self.rope_scaling
        return int(self.max_positions * scaling.factor) if isinstance(scaling, DynamicScaling) else self.max_positions

    def reach(self, layer: int) -> int | None:
        if self.sliding_window is None or layer < self.first_window_layer:
            return None
        return self.sliding_window - 1

    def rotary(self, reach: int | None) -> Rotary | None:
        del reach
        if self.position != "rope":
            return None
        width = int(self.head_size * self.partial_rotary_factor)
        return Rotary(self.rope_theta, width, self.max_positions, self.rope_scaling)


class BERTConfig(ModelConfig):
    """An encoder in BERT or RoBERTa form, with `position: rope` in ModernBERT form (see `configs/models`), or with
    `norm_position: pre` and `embedding_norm: false` in that of Megatron-LM's BERT."""

    __hash__ = ModelConfig.__hash__

    family: Literal["bert"]
    """Architecture family: an encoder that predicts masked tokens."""
    position: Literal["learned", "rope"] = "learned"
    """Kind of positions: a table of learned embeddings, or rotations of queries and keys."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies (of global layers, where there are local ones)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    activation: Activation = "gelu"
    """Activation of the feed-forward part; `geglu` where `position` is `rope`. `swiglu`, `geglu` and `geglu_tanh`
    multiply its result by a gate."""
    token_types: NonNegativeInt = 2
    """Number of kinds of segments that have an embedding, 2 for pairs; 0 (where `position` is `rope`) means no such
    embedding."""
    pair_head: bool = False
    """A second head, which predicts how the two segments of a row belong together (`objective.pairs`)."""
    norm_position: Literal["pre", "post"] = "post"
    """Place of the norms. `pre` (the default where `position` is `rope`): each part of a layer reads the normalised
    residual stream and adds to the stream itself; `post`: the sum of a part and its input is normalised."""
    embedding_norm: bool = True
    """Norm of the embeddings; with `norm_position: pre` the first layer then has none of its own before its attention.
    False, which needs `pre`, leaves the embeddings as they are, and the first layer has the norms of every other."""
    local_attention: int | None = Field(default=None, ge=2, multiple_of=2)
    """Width in tokens of the window of local layers: a token sees what stands at most half of it away, on either side.
    None means that every layer is global."""
    global_every: int = Field(default=3, ge=2)
    """Number of layers of which one, the first, is global and the others local; with `local_attention`."""
    local_rope_theta: PositiveFloat | None = None
    """Base of the rotary frequencies of local layers; None means `rope_theta`."""

    @model_validator(mode="before")
    @classmethod
    def _modern_defaults(cls, given: Any) -> Any:
        """Fill in ModernBERT's defaults where positions are rotary."""
        if isinstance(given, dict) and given.get("position") == "rope":
            # Before the given keys, which win.
            return {"activation": "geglu", "token_types": 0, "norm_position": "pre", **given}
        return given

    @property
    def position_table(self) -> bool:
        return self.position == "learned"

    @property
    def post_norm(self) -> bool:
        return self.norm_position == "post"

    @property
    def transforms_for_tasks(self) -> bool:
        return not self.post_norm and self.embedding_norm

    @property
    def tells_segments_apart(self) -> bool:
        return self.token_types > 1

    def reach(self, layer: int) -> int | None:
        if self.local_attention is None or layer % self.global_every == 0:
            return None
        return self.local_attention // 2

    def rotary(self, reach: int | None) -> Rotary | None:
        if self.position != "rope":
            return None
        theta = self.rope_theta if reach is None else self.local_rope_theta or self.rope_theta
        return Rotary(theta, self.head_size, self.max_positions)


class T5Config(ModelConfig):
    """An encoder and a decoder in T5 form, version 1.0 (the defaults) or 1.1 (see `configs/models`).

    Positions are relative: a number per head and bucket of distances is added to scores, which are not scaled.
    Initial weights have standard deviations of their own (`engine.models.initial`).
    """

    __hash__ = ModelConfig.__hash__

    family: Literal["t5"]
    """Architecture family: an encoder and a decoder."""
    norm: Norm = "rmsnorm"
    """Kind of the norms: layer norms, or RMS norms (no mean and no shift)."""
    activation: Activation = "relu"
    """Activation of the feed-forward part; `swiglu`, `geglu` and `geglu_tanh` multiply its result by a gate."""
    bias: bool = False
    """Biases of the linear layers."""
    num_decoder_layers: PositiveInt = Field(default_factory=lambda data: max(1, data["num_layers"] // 2))
    """Number of the layers that are the decoder's; half of them where it is left out."""
    relative_buckets: int = Field(default=32, ge=4, multiple_of=4)
    """Number of buckets of distances; in the encoder half of them for each direction."""
    relative_distance: PositiveInt = 128
    """Distance in tokens from which on all distances share a bucket."""

    @property
    def score_scale(self) -> float | None:
        return 1.0

    @property
    def num_encoder_layers(self) -> int:
        """Layers before those of the decoder."""
        return self.num_layers - self.num_decoder_layers


def _family(given: Any) -> str:
    """The family that a `model` section names; GPT's where it names none."""
    return str(given.get("family", "gpt")) if isinstance(given, dict) else getattr(given, "family", "gpt")


# A function as discriminator and not the field's name, because a section may leave `family` out.
AnyModelConfig = Annotated[
    Annotated[GPTConfig, Tag("gpt")] | Annotated[BERTConfig, Tag("bert")] | Annotated[T5Config, Tag("t5")],
    Discriminator(_family),
]
"""A `model` section of any family."""

_ANY: TypeAdapter[GPTConfig | BERTConfig | T5Config] = TypeAdapter(AnyModelConfig)


AnyModel = TypeVar("AnyModel", bound=ModelConfig)


def without_vocabulary(model: AnyModel) -> AnyModel:
    """Return the model as it serves its task: without a head over the vocabulary that was trained beside it."""
    if model.task_head is None or not model.task_head.keeps_vocabulary:
        return model
    return model.model_copy(update={"task_head": model.task_head.model_copy(update={"keeps_vocabulary": False})})


def make_model(**keys: Any) -> GPTConfig | BERTConfig | T5Config:
    """Return the section of the family that these keys name (GPT's where they name none)."""
    return _ANY.validate_python(keys)
