"""Calls in FlashMLA's two forms, on any device, and what they must return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from compare import check
from mla import reference
from mla.compat import flash_mla
from torch import Tensor

FORMS = ("old", "new")


@dataclass(frozen=True)
class Call:
    """Lengths in tokens, one per request."""

    seq_lens: tuple[int, ...]
    s_q: int = 1
    h_q: int = 16
    h_kv: int = 1
    page_size: int = 64
    d_qk: int = 576
    d_v: int = 512
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    scale: float | None = None

    def __str__(self) -> str:
        lens = "_".join(map(str, self.seq_lens[:4]))
        return (
            f"{lens}-q{self.s_q}-h{self.h_q}_{self.h_kv}-p{self.page_size}-d{self.d_qk}"
            f"{'-causal' if self.causal else ''}"
        )


@dataclass
class Tensors:
    call: Call
    q: Tensor
    k_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor

    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.k_cache, self.block_table, self.cache_seqlens, self.call.d_v

    def options(self) -> dict[str, Any]:
        """What differs from FlashMLA's defaults."""
        scale = {} if self.call.scale is None else {"softmax_scale": self.call.scale}
        return scale | ({"causal": True} if self.call.causal else {})


def make(call: Call, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
    """Pages in random order; NaN and absurd page ids in all that no length reaches."""
    generator = torch.Generator().manual_seed(seed)
    b, pages_each = len(call.seq_lens), -(-max(call.seq_lens, default=0) // call.page_size) + 1
    table = torch.randperm(b * pages_each + 3, generator=generator)[: b * pages_each]
    table = table.view(b, pages_each).int()
    shape = (b * pages_each + 3, call.page_size, call.h_kv, call.d_qk)
    cache = torch.randn(shape, generator=generator) / 10
    used = torch.zeros(shape[:2], dtype=torch.bool)
    for i, length in enumerate(call.seq_lens):
        at = torch.arange(length)
        used[table[i, at // call.page_size].long(), at % call.page_size] = True
        table[i, -(-length // call.page_size) :] = 2147480000
    cache[~used] = torch.nan
    q = torch.randn(b, call.s_q, call.h_q, call.d_qk, generator=generator) / 10
    lens = torch.tensor(call.seq_lens, dtype=torch.int32)
    return Tensors(
        call,
        *(t.to(call.dtype).to(device) for t in (q, cache)),
        *(t.to(device) for t in (table, lens)),
    )


def metadata(tensors: Tensors, form: str) -> tuple[Any, Any]:
    if form == "new":
        return flash_mla.get_mla_metadata()
    call = tensors.call
    rows = call.s_q * call.h_q // call.h_kv
    return flash_mla.get_mla_metadata(tensors.cache_seqlens, rows, call.h_kv)


def run(tensors: Tensors, form: str) -> tuple[Tensor, Tensor]:
    return flash_mla.flash_mla_with_kvcache(
        *tensors.arguments(), *metadata(tensors, form), **tensors.options()
    )


def check_call(tensors: Tensors, result: tuple[Tensor, Tensor]) -> None:
    """Holds (out, lse) to float64, one KV head at a time."""
    call = tensors.call
    out, lse = result
    assert out.shape == (*tensors.q.shape[:3], call.d_v)
    assert lse.shape == (len(call.seq_lens), call.h_q, call.s_q)
    assert out.dtype == call.dtype
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert not torch.isneginf(lse).any(), "rows that see nothing have +inf"
    scale = call.d_qk**-0.5 if call.scale is None else call.scale
    heads = call.h_q // call.h_kv
    for i in range(call.h_kv):
        mine = slice(i * heads, (i + 1) * heads)
        expected = reference.decode(
            tensors.q[:, :, mine],
            tensors.k_cache[:, :, i],
            tensors.block_table,
            tensors.cache_seqlens,
            scale=scale,
            causal=call.causal,
        )
        got_lse = lse[:, mine].transpose(1, 2)
        got_lse = got_lse.masked_fill(got_lse == torch.inf, -torch.inf)
        check((out[:, :, mine], got_lse), expected, scale)
