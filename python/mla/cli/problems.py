"""The problems of `mla check`: small, unfriendly, with poison wherever nothing may look."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What may stand in a block table past a request's last page.
_ABSURD_PAGES = (-1, 2147480000, -2147483648, 7)


@dataclass(frozen=True)
class CheckProblem:
    """Sizes of one call. Several `tokens` make it ragged: the query tokens of each request."""

    name: str
    seq_lens: tuple[int, ...]
    h_q: int
    tokens: tuple[int, ...] = (1,)  # one entry stands for every request
    page_size: int = 64
    causal: bool = True
    split: bool = False  # q and cache as pairs instead of packed

    @property
    def ragged(self) -> bool:
        return len(self.tokens) > 1

    @property
    def columns(self) -> int:
        """Of the block table: two more than the longest request needs."""
        return -(-max(self.seq_lens) // self.page_size) + 2


QUICK = (
    CheckProblem("one token", (1,), h_q=1),
    CheckProblem("around a tile, page 1", (1, 31, 32, 33, 65, 200), h_q=5, page_size=1),
    CheckProblem("rows that see nothing", (2, 130, 257), h_q=16, tokens=(3,), page_size=16),
    CheckProblem("ragged queries", (7, 50, 300, 0), h_q=12, tokens=(1, 0, 4, 2)),
    CheckProblem("no KV at all", (0, 0, 100), h_q=20, page_size=16),
    CheckProblem("not causal", (64, 129), h_q=40, tokens=(2,), page_size=3, causal=False),
    CheckProblem("128 heads, pairs", (700, 64), h_q=128, page_size=64, split=True),
    CheckProblem("one long request", (6000,), h_q=16),
    CheckProblem("page 1, long and short", (2500, 1, 0, 90), h_q=7, tokens=(2,), page_size=1),
)
FULL = (
    *QUICK,
    CheckProblem("batch of 48", tuple(range(1, 1400, 29))[:48], h_q=16, page_size=16),
    CheckProblem("96 heads, 4 tokens", (1000, 3, 513), h_q=96, tokens=(4,), page_size=32),
    CheckProblem("ragged, pairs", (900, 1, 33), h_q=24, tokens=(5, 1, 8), split=True),
    CheckProblem("300 heads", (77, 1025), h_q=300, page_size=128),
    CheckProblem("very long", (40000, 11), h_q=16),
)


@dataclass(frozen=True)
class CheckInputs:
    """Arguments of `mla.decode`, and q and cache packed, as the reference takes them."""

    q: Tensor | tuple[Tensor, Tensor]
    kv_cache: Tensor | tuple[Tensor, Tensor]
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor | None
    q_packed: Tensor
    kv_packed: Tensor
    scale: float
    causal: bool


def make_inputs(
    problem: CheckProblem,
    d_qk: int,
    d_v: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> CheckInputs:
    """Draws q and KV as randn / 10, with a scale that gives logits of about one.

    Pages lie scattered over a pool of twice the size that is needed. Every cache element that
    belongs to no token is NaN, and page ids past a request's last page are absurd.
    """
    b, page_size = len(problem.seq_lens), problem.page_size

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 10).to(device, dtype)

    pages = [-(-length // page_size) for length in problem.seq_lens]
    pool = 2 * sum(pages) + 1
    kv = torch.full((pool, page_size, d_qk), float("nan"), dtype=dtype, device=device)
    columns = problem.columns
    absurd = torch.tensor(_ABSURD_PAGES, dtype=torch.int32)
    table = absurd.repeat(b * columns)[: b * columns].view(b, columns).clone()
    unused = torch.randperm(pool, generator=generator).to(torch.int32)
    for i, (length, count) in enumerate(zip(problem.seq_lens, pages, strict=True)):
        table[i, :count], unused = unused[:count], unused[count:]
        slots = torch.arange(length)
        kv[table[i, slots // page_size].long(), slots % page_size] = normal(length, d_qk)

    cu_seqlens_q = None
    if problem.ragged:
        q = normal(sum(problem.tokens), problem.h_q, d_qk)
        starts = torch.tensor((0, *problem.tokens)).cumsum(0)
        cu_seqlens_q = starts.to(device, torch.int32)
    else:
        q = normal(b, problem.tokens[0], problem.h_q, d_qk)
    split = problem.split and d_qk > d_v
    return CheckInputs(
        q=(q[..., :d_v].contiguous(), q[..., d_v:].contiguous()) if split else q,
        kv_cache=(kv[..., :d_v].contiguous(), kv[..., d_v:].contiguous()) if split else kv,
        block_table=table.to(device),
        seq_lens=torch.tensor(problem.seq_lens, dtype=torch.int32, device=device),
        cu_seqlens_q=cu_seqlens_q,
        q_packed=q,
        kv_packed=kv,
        scale=100 / d_qk**0.5,
        causal=problem.causal,
    )
