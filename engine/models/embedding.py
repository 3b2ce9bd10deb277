"""A table of embeddings that is built on the meta device without drawing values for it."""

from __future__ import annotations

from torch import nn


class Embedding(nn.Embedding):
    """`nn.Embedding`, (...) -> (..., D), whose first values are left out on the meta device.

    There they would mean nothing, and for drawing them torch imports its compiler: 3 CPU seconds and 70 MiB.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
