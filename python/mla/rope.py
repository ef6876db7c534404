"""Rotary position embedding of the rope columns, and YaRN's factor of the softmax scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 * mscale * ln(factor) + 1, and 1 up to a factor of 1 (YaRN, arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(head_dim: int, *, yarn_factor: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """`scale` of `decode` and `prefill`: head_dim ** -0.5, with YaRN's factor for query and key.

    head_dim: nope + rope columns of a head before absorption: 192 for DeepSeek-V3, never d_qk.
    yarn_factor, mscale_all_dim: `factor` and `mscale_all_dim` of the model's rope settings;
        DeepSeek-V2 and V3 multiply the scale by yarn_mscale(factor, mscale_all_dim) ** 2 (as their
        released modelling code does). Without mscale_all_dim it is not multiplied.

    0.135234 for DeepSeek-V3: 192 ** -0.5 * (0.1 * ln 40 + 1) ** 2.
    """
    scale: float = head_dim**-0.5
    return scale * yarn_mscale(yarn_factor, mscale_all_dim) ** 2 if mscale_all_dim else scale


@dataclass(frozen=True)
class Yarn:
    """YaRN's numbers, by the names of configurations."""

    factor: float
    original_positions: int  # of the training before the context was extended
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0  # 0: not given
    mscale_all_dim: float = 0.0
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by. 1 where mscale and mscale_all_dim are equal."""
        if self.mscale and self.mscale_all_dim:
            above, below = self.mscale, self.mscale_all_dim
            return yarn_mscale(self.factor, above) / yarn_mscale(self.factor, below)
        return yarn_mscale(self.factor)


@dataclass(frozen=True)
class Rotary:
    """How a model rotates its rope columns.

    interleaved: pairs are neighbours, (0, 1), (2, 3), ..; else the halves, (0, n/2), (1, n/2 + 1),
        ... Rotated columns stay where they were. Scores do not depend on the order of the columns,
        only on query and key having the same.
    stretch: of each pair's wavelength (longrope), of which there are half as many as columns.
    attention_factor: what cos and sin are multiplied by; None: as `yarn` says, 1 without it.
    """

    theta: float = 10000.0
    interleaved: bool = True
    yarn: Yarn | None = None
    stretch: tuple[float, ...] | None = None
    attention_factor: float | None = None

    def frequencies(self, columns: int) -> Tensor:
        """Angle per position of each pair, float64 [columns / 2], on the CPU."""
        pairs = torch.arange(columns // 2, dtype=torch.float64, device="cpu")
        frequencies = self.theta ** (-2 * pairs / columns)
        if self.stretch is not None:
            return frequencies / torch.tensor(self.stretch, dtype=torch.float64, device="cpu")
        return frequencies if self.yarn is None else self._blended(self.yarn, frequencies)

    def _blended(self, yarn: Yarn, frequencies: Tensor) -> Tensor:
        """Pairs that turn more than beta_fast times within the original positions keep their
        frequency, those that turn less than beta_slow times are slowed down by the factor, those
        between are blended."""
        columns = 2 * len(frequencies)

        def pair_that_turns(times: float) -> float:
            wavelength = yarn.original_positions / (2 * math.pi * times)
            return columns * math.log(wavelength) / (2 * math.log(self.theta))

        low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, columns - 1)
        pairs = torch.arange(len(frequencies), dtype=torch.float64, device="cpu")
        slowed = ((pairs - low) / ((high - low) or 1e-3)).clamp(0, 1)
        return frequencies * (1 - slowed) + frequencies / yarn.factor * slowed

    def table(
        self, columns: int, positions: int, device: torch.device | str | None = None
    ) -> Tensor:
        """float32 [positions, columns]: cos of each pair, then sin, of positions 0 and up.

        What `append` and `rotate` read. Angles are float64 until their cos and sin are taken.
        """
        angles = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None]
        angles = angles * self.frequencies(columns)
        factor = self.attention_factor
        if factor is None:
            factor = 1.0 if self.yarn is None else self.yarn.attention_factor
        return (torch.cat((angles.cos(), angles.sin()), dim=-1) * factor).float().to(device)


def rotate(x: Tensor, cos_sin: Tensor, *, interleaved: bool) -> Tensor:
    """RoPE, computed in float32 (float64 for float64), in x's dtype.

    x: [.., n]. cos_sin: [.., n] that broadcasts against it, rows of `Rotary.table`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos_sin.to(wide).chunk(2, dim=-1)
    a, b = _pairs(x.to(wide), interleaved)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1 if interleaved else -2)
    return turned.flatten(-2).to(x.dtype)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    a, b = x.chunk(2, dim=-1)
    return a, b
