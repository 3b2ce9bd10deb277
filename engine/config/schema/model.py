"""The model's section: its family, its sizes and the form of its parts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from engine.config.schema.section import Kind, Section

_DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("bert", "learned"): {"token_types": 2, "norm_position": "post", "activation": "gelu"},
    ("bert", "rope"): {"activation": "geglu"},
    ("t5", "relative"): {"norm": "rmsnorm", "activation": "relu", "bias": False},
}
"""Defaults by family and position where they are not those of GPT-2, so that a family alone is a form that Hugging
Face's library has, too: BERT, ModernBERT, T5 v1.0."""
LARGEST_DEPTH = 2**14
LARGEST_WIDTH = 2**30
"""No model is anywhere near; sizes beyond are slips of a key, and are refused before anything is computed of them."""


class ModelConfig(Section):
    """A decoder in GPT-2 or Llama form, an encoder in BERT, RoBERTa or ModernBERT form, or T5 (see `configs/models`).

    The defaults shown are GPT-2's; `_DEFAULTS` has what other families have instead.
    """

    kinds: ClassVar[dict[str, Kind]] = {"vocab_multiple": "execution"}

    family: Literal["gpt", "bert", "t5"] = "gpt"
    """Architecture family: decoders (`gpt`), encoders that predict masked tokens (`bert`), both in one (`t5`)."""
    vocab_size: int = Field(ge=1, le=LARGEST_WIDTH)
    """Real rows of the embedding: the tokenizer's size or more."""
    vocab_multiple: int = Field(default=128, ge=1, le=LARGEST_WIDTH)
    """The embedding is padded to a multiple of this, for speed and so that tensor parallelism divides it."""
    num_layers: int = Field(ge=1, le=LARGEST_DEPTH)
    """Of an encoder-decoder (`t5`): of both stacks together."""
    num_decoder_layers: PositiveInt | None = None
    """`t5`: how many of them are the decoder's; None means half."""
    hidden_size: int = Field(ge=1, le=LARGEST_WIDTH)
    num_heads: int = Field(ge=1, le=LARGEST_WIDTH)
    head_width: int | None = Field(default=None, ge=1, le=LARGEST_WIDTH)
    """Width of a head; None means `hidden_size` / `num_heads`."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention); None means `num_heads`."""
    ffn_size: int | None = Field(default=None, ge=1, le=LARGEST_WIDTH)
    """Inner width of the feed-forward part; None means 4 x `hidden_size`."""
    max_positions: int = Field(default=1024, ge=1, le=LARGEST_WIDTH)
    """Longest sequence; rows of the position table when `position` is `learned`."""
    token_types: NonNegativeInt = 0
    """`bert`: kinds of segments that have an embedding, 2 for pairs; 0 means no such embedding."""
    pair_head: bool = False
    """`bert`: a second head says how the two segments of a row belong together (`objective.pairs`)."""
    position: Literal["learned", "rope", "relative"] = "learned"
    """`relative` (`t5`, and its default): a number per head and bucket of distances is added to scores, which are not
    scaled."""
    rope_theta: PositiveFloat = 10000.0
    local_attention: int | None = Field(default=None, ge=2, multiple_of=2)
    """`bert`: width of a window: in local layers a token sees what stands at most half of it away, on either side.
    None: every layer is global."""
    global_every: int = Field(default=3, ge=2)
    """With `local_attention`: one in so many layers, the first one to begin with, is global; the others are local."""
    local_rope_theta: PositiveFloat | None = None
    """`rope_theta` of local layers; None means the same."""
    relative_buckets: int = Field(default=32, ge=4, multiple_of=4)
    """Buckets of distances, in the encoder half of them for each direction."""
    relative_distance: PositiveInt = 128
    """Distances from here on share a bucket."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: float = Field(default=1e-5, ge=1e-37)
    """Added to the variance in norms; a smaller one is 0 in fp32."""
    norm_bias: bool = True
    """Shifts of layer norms (RMS norms have none)."""
    norm_position: Literal["pre", "post"] = "pre"
    """`pre`: each part of a layer adds to the residual stream what it makes of its norm; `post` (`bert`): the sum of a
    part and its input is normalised."""
    activation: Literal["gelu_tanh", "gelu", "relu", "swiglu", "geglu", "geglu_tanh"] = "gelu_tanh"
    """Of the feed-forward part; the last three multiply what they make by a gate."""
    bias: bool = True
    """Biases in linear layers."""
    tie_embeddings: bool = True
    """The output projection is the token embedding."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of hidden states that training sets to 0: of the embedding, and of what each part of a layer makes. Keyed
    by (seed, step, sample, layer, site), so equal in every layout."""
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The same of attention's probabilities; above 0 they are computed one by one, which costs time and memory."""
    init_std: PositiveFloat = 0.02

    @model_validator(mode="before")
    @classmethod
    def _family_defaults(cls, given: Any) -> Any:
        """Fill in the keys that were not given and whose default depends on the family."""
        if not isinstance(given, dict):
            return given
        family = given.get("family")
        position = given.get("position", "relative" if family == "t5" else "learned")
        known = isinstance(family, str) and isinstance(position, str)  # what is neither is refused by its field
        defaults = _DEFAULTS.get((str(family), str(position)), {}) if known else {}
        return {"position": position, **defaults, **given}

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory; a function of the configuration alone, never of the layout."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_width or self.hidden_size // self.num_heads

    @property
    def score_scale(self) -> float | None:
        """Factor of attention scores; None means head_size ** -0.5."""
        return 1.0 if self.position == "relative" else None

    def reach(self, layer: int) -> int | None:
        """How far away, at most, a token of a layer sees another one; None means no such limit."""
        if self.local_attention is None or layer % self.global_every == 0:
            return None
        return self.local_attention // 2

    @property
    def num_encoder_layers(self) -> int:
        """Layers before those of the decoder, of an encoder-decoder."""
        return self.num_layers - (self.num_decoder_layers or self.num_layers // 2)

    @property
    def inner_size(self) -> int:
        return self.ffn_size or 4 * self.hidden_size

    @property
    def gated(self) -> bool:
        """Whether the feed-forward part multiplies what it makes by a gate."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    if TYPE_CHECKING:

        def __hash__(self) -> int:
            """Of all values: pydantic gives it to frozen models, which type checkers do not see."""
            ...
