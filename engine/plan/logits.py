"""Memory of the output projection and its loss, which training takes a few rows at a time. Pure arithmetic; training
asks here for the number of rows, as the plan does.
"""

from __future__ import annotations

from engine.config.schema.model import ModelConfig
from engine.config.schema.parallel import ParallelConfig

CHUNK_ELEMENTS = 2**25
"""Logits at a time: 128 MiB in fp32, and more than enough work for one device kernel."""
ROW_MULTIPLE = 64
"""Rows at a time are a multiple of this, the tile of a matrix product."""
WIDE_BYTES = 4
"""Losses are computed, and the gradient of the head's weight added up, in fp32."""


def rows_at_a_time(num_columns: int) -> int:
    """Rows whose logits are at most `CHUNK_ELEMENTS`, or the smallest multiple."""
    return max(CHUNK_ELEMENTS // num_columns // ROW_MULTIPLE, 1) * ROW_MULTIPLE


def head_bytes(model: ModelConfig, parallel: ParallelConfig, rows: int, dtype_bytes: int, alive: int) -> int:
    """Bytes that the loss of `rows` predicted tokens needs on one tensor rank, with `alive` micro-batches at once.

    Each micro-batch keeps both gradients from its forward pass on: of the head's input, and of its weight in fp32. At
    work are some rows' logits and their softmax, and what lies between: a copy in fp32 of narrower logits (which a
    GPU's fused kernel needs not), over several tensor ranks the exponentials. Later, a narrower product waits to be
    added to the weight's gradient.
    """
    if rows == 0:
        return 0
    columns = model.padded_vocab_size // parallel.tensor
    weight = columns * model.hidden_size
    logits, narrow = min(rows, rows_at_a_time(columns)) * columns, dtype_bytes < WIDE_BYTES
    # The logits, their softmax in fp32, and one more fp32 buffer: the widened logits, or the exponentials that tensor
    # ranks sum over the vocabulary.
    softmax = logits * (dtype_bytes + WIDE_BYTES * (2 if narrow or parallel.tensor > 1 else 1))
    # The softmax, its narrow copy that multiplies, and the product; in fp32 it is added in place by the kernel.
    product = logits * (WIDE_BYTES + dtype_bytes) + weight * dtype_bytes if narrow else 0
    kept = rows * model.hidden_size * dtype_bytes + weight * WIDE_BYTES
    return alive * kept + max(softmax, product)
