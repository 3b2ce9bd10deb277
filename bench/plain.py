"""The anchors of the CPU comparison: a GPT-2 of a few lines of plain torch, and our modules without an engine.

The first shares no code with the engine's models: SDPA, tied head, fused AdamW, clipping, in the loop that a
tutorial would write. The second is what our modules cost alone, so that the rest of our step is the engine's.
Both train in fp32, or under bf16 autocast with fp32 weights.

Legend: B batch, T time, D width, H heads, K head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import nn
from torch.nn import functional as F

from bench.contest import Turns
from bench.ours import DISTINCT_STEPS, OPTIMIZER, Precision, Shape, micro_batches, tokens_of_step
from engine.config.schema.model import ModelConfig
from engine.models.gpt import specs
from engine.models.initial import initial_value
from engine.models.materialize import whole_model
from engine.optim.groups import weight_decay

Loss = Callable[[torch.Tensor], torch.Tensor]
"""tokens_BT -> the mean loss over all tokens but the first of each row."""


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.ModuleDict({"qkv_proj": nn.Linear(width, 3 * width), "out_proj": nn.Linear(width, width)})
        self.ffn = nn.ModuleDict({"up_proj": nn.Linear(width, 4 * width), "down_proj": nn.Linear(4 * width, width)})

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        qkv = self.attention["qkv_proj"](self.attention_norm(x_BTD)).chunk(3, dim=-1)
        q_BHTK, k_BHTK, v_BHTK = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in qkv)
        out_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        x_BTD = x_BTD + self.attention["out_proj"](out_BHTK.transpose(1, 2).flatten(2))
        inner_BTF = F.gelu(self.ffn["up_proj"](self.ffn_norm(x_BTD)), approximate="tanh")
        return x_BTD + self.ffn["down_proj"](inner_BTF)


class PlainGPT(nn.Module):
    """GPT-2 with a tied head, as a tutorial writes it. Its names are ours, so that weights copy over by name."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Mean loss of every token but the first of each row."""
        positions_T = torch.arange(tokens_BT.size(1), device=tokens_BT.device)
        x_BTD = self.embed_tokens(tokens_BT) + self.embed_positions(positions_T)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        logits_BTV = F.linear(self.final_norm(x_BTD), self.embed_tokens.weight)
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


def initial_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights (fp32, real rows, by logical name) that a run of ours with this seed starts from."""
    return {spec.name: initial_value(spec, config, seed)[: spec.real_rows] for spec in specs(config)}


def plain_contestant(turns: Turns, shape: Shape, precision: Precision, threads: int) -> None:
    """The tutorial's model in the tutorial's loop."""
    torch.set_num_threads(threads)
    model = PlainGPT(shape.model)
    model.load_state_dict(initial_weights(shape.model))
    _loop(turns, shape, precision, model, model)


def modules_contestant(turns: Turns, shape: Shape, precision: Precision, threads: int) -> None:
    """Our modules in the tutorial's loop."""
    torch.set_num_threads(threads)
    model = whole_model(shape.model, initial_weights(shape.model))

    def loss(tokens_BT: torch.Tensor) -> torch.Tensor:
        (inputs,) = micro_batches(tokens_BT, len(tokens_BT))
        return model(**inputs)["losses_L"].sum() / shape.num_targets

    _loop(turns, shape, precision, model, loss)


def _loop(turns: Turns, shape: Shape, precision: Precision, model: nn.Module, loss_of: Loss) -> None:
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter], "weight_decay": weight_decay(name, OPTIMIZER)}
            for name, parameter in model.named_parameters()
        ],
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
        fused=True,
    )
    batches = [tokens_of_step(shape, 0, step) for step in range(DISTINCT_STEPS)]
    for step in count():
        turns.begin_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(batches[step % DISTINCT_STEPS])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        turns.loss(loss.item())
