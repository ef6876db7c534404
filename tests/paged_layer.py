"""A paged cache for a layer's tests, and steps of a layer through it."""

from __future__ import annotations

from typing import Any

import torch
from mla import reference
from mla.nn import MultiHeadLatentAttention
from torch import Tensor


class Pages:
    """Scattered pages full of NaN for `b` requests of up to `capacity` tokens."""

    def __init__(
        self, layer: MultiHeadLatentAttention, b: int, capacity: int, page_size: int = 16
    ) -> None:
        weight, per_request = layer.o_proj.weight, -(-capacity // page_size)
        shape = (b * per_request + 1, page_size, layer.config.d_qk)
        self.kv = torch.full(shape, torch.nan, dtype=weight.dtype, device=weight.device)
        order = torch.randperm(b * per_request, generator=torch.Generator().manual_seed(0))
        self.table = order.int().view(b, per_request).to(weight.device)
        self.lens = torch.zeros(b, dtype=torch.int32, device=weight.device)

    def step(self, layer: MultiHeadLatentAttention, hidden: Tensor, **options: Any) -> Tensor:
        """The next tokens [b, s, hidden] of each request."""
        positions = self.lens[:, None] + torch.arange(
            hidden.shape[1], dtype=torch.int32, device=hidden.device
        )
        self.lens += hidden.shape[1]
        return layer(hidden, positions, self.kv, self.table, self.lens, **options)


def exact_decode(
    q: Any, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, scale: float, **_: Any
) -> Tensor:
    """In the place of `decode`, for dtypes that it does not have."""
    finite = kv_cache.nan_to_num(0)
    out, _lse = reference.decode(q, finite, block_table, seq_lens, scale=scale)
    return out.to(kv_cache.dtype)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Projections that keep the size of their inputs; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        values = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if name.endswith("bias"):
            values *= 0.1
        elif weight.dim() == 2:
            values *= weight.shape[1] ** -0.5
        else:
            values = 1 + values / 10
        weight.data.copy_(values)
