"""Rotary positions: frequencies, their scaling to longer rows, and the rotation of queries and keys.

Scores depend on the distance of two tokens alone, whatever the frequencies, so positions count through a row of packed
documents. Tables are made at each pass: a buffer would not survive construction on the meta device.

Legend: B batch, T time, H heads, K head size, R rotated dimensions of a head.
"""

from __future__ import annotations

import math

import torch

from engine.config.schema.rotary import DynamicScaling, LinearScaling, Llama3Scaling, Rotary, YarnScaling


def rotary_tables(
    rotary: Rotary, num_positions: int, device: torch.device, first_position: int = 0, row_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos_TR and sin_TR (fp32) of rotary positions (Su et al. 2021, RoFormer, section 3.4.2).

    The angles of the R / 2 pairs are there twice, side by side: dimension i is paired with i + R / 2 (as in the Llama
    checkpoints of Hugging Face) and not with its neighbour (as in the paper), so weights convert as they are.
    `row_length` is the number of tokens of the whole row; None means `num_positions`.
    """
    frequencies, factor = scaled_frequencies(rotary, row_length or num_positions, device)
    positions_T = torch.arange(num_positions, dtype=torch.float32, device=device) + first_position
    angles = positions_T[:, None] * frequencies  # (T, R / 2)
    angles_TR = torch.cat((angles, angles), dim=-1)
    cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
    return (cos_TR, sin_TR) if factor == 1.0 else (cos_TR * factor, sin_TR * factor)


def scaled_frequencies(rotary: Rotary, row_length: int, device: torch.device) -> tuple[torch.Tensor, float]:
    """Return the angles between neighbouring positions, (R / 2,) fp32, and the factor of rotated queries and keys."""
    scaling, theta = rotary.scaling, rotary.theta
    if isinstance(scaling, LinearScaling):
        return _frequencies(rotary, theta, device) / scaling.factor, 1.0
    if isinstance(scaling, DynamicScaling):
        # Rows within `max_positions` keep the base: factor x 1 - (factor - 1) = 1.
        grown = scaling.factor * max(row_length, rotary.max_positions) / rotary.max_positions - (scaling.factor - 1)
        return _frequencies(rotary, theta * grown ** (rotary.width / (rotary.width - 2)), device), 1.0
    if isinstance(scaling, Llama3Scaling):
        return _by_wavelength(_frequencies(rotary, theta, device), scaling), 1.0
    if isinstance(scaling, YarnScaling):
        factor = scaling.attention_factor
        if factor is None:  # Peng et al. 2023, equation 22
            factor = 0.1 * math.log(scaling.factor) + 1.0
        return _yarn(rotary, scaling, device), factor
    return _frequencies(rotary, theta, device), 1.0


def _frequencies(rotary: Rotary, theta: float, device: torch.device) -> torch.Tensor:
    exponents = torch.arange(0, rotary.width, 2, dtype=torch.float32, device=device) / rotary.width
    return 1.0 / theta**exponents


def _by_wavelength(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Divide frequencies that turn seldom within the first training's length, keep those that turn often."""
    turns = scaling.original_max_positions / (2 * math.pi / frequencies)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (turns - low) / (high - low)  # share of the frequency that is kept: 0 at `low` turns, 1 at `high`
    between = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    return torch.where(turns < low, frequencies / scaling.factor, torch.where(turns > high, frequencies, between))


def _yarn(rotary: Rotary, scaling: YarnScaling, device: torch.device) -> torch.Tensor:
    """Interpolate between kept and divided frequencies (Peng et al. 2023, equations 17 to 23)."""

    def pair_of(turns: float) -> float:
        """Return the pair that turns so often within the first training's length; a fraction."""
        length = scaling.original_max_positions / (turns * 2 * math.pi)
        return rotary.width * math.log(length) / (2 * math.log(rotary.theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The upper bound is that of dimensions and not of pairs in every published implementation.
    first, last = max(first, 0), min(last, rotary.width - 1)
    if first == last:
        last += 0.001  # a step
    pairs = torch.arange(rotary.width // 2, dtype=torch.float32, device=device)
    divided = ((pairs - first) / (last - first)).clamp(0, 1)  # share of the divided frequency
    exponents = torch.arange(0, rotary.width, 2, dtype=torch.float32, device=device) / rotary.width
    wavelengths = rotary.theta**exponents
    return 1.0 / (scaling.factor * wavelengths) * divided + 1.0 / wavelengths * (1 - divided)


def rotate(x_BTHK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate the first R dimensions of each head by its position; computed in fp32, returned in the dtype of `x_BTHK`.

    The other dimensions stay as they are.
    """
    width = cos_TR.size(-1)
    x = x_BTHK[..., :width].float()
    # (low, high) -> (low cos - high sin, high cos + low sin), for all pairs (i, i + R / 2) at once.
    low, high = x.chunk(2, dim=-1)
    turned = (x * cos_TR[:, None] + torch.cat((-high, low), dim=-1) * sin_TR[:, None]).to(x_BTHK.dtype)
    return turned if width == x_BTHK.size(-1) else torch.cat((turned, x_BTHK[..., width:]), dim=-1)
