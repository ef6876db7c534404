"""New tokens over a paged cache, on any device, and their un-absorbed float64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from cases import POISON_PAGE_IDS
from mla import Prefill
from mla.reference import attend_expanded, errors
from torch import Tensor

# Relative RMSE of the whole. Rounded to 16 bits: absorbed queries, outputs over latents and of
# heads, or keys, values, probabilities and, once per chunk, outputs.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Dims:
    heads: int = 4
    kv_lora: int = 512
    nope: int = 32
    rope: int = 64
    v: int = 24


@dataclass(frozen=True)
class Case:
    """`new` tokens of each request at the end of its `lens`; a number makes them uniform."""

    lens: tuple[int, ...]
    new: int | tuple[int, ...]
    dims: Dims = Dims()
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    packed: bool = False  # the queries
    split: bool = False  # the cache

    @property
    def counts(self) -> tuple[int, ...]:
        return self.new if isinstance(self.new, tuple) else (self.new,) * len(self.lens)

    def __str__(self) -> str:
        words = [str(self.dtype)[6:], f"b{len(self.lens)}", f"h{self.dims.heads}"]
        words.append("ragged" if isinstance(self.new, tuple) else f"s{self.new}")
        words += [name for name in ("packed", "split") if getattr(self, name)]
        return "-".join([*words, *([] if self.causal else ["full"]), str(self.dims.kv_lora)])


SMALL_ROPE = Dims(heads=5, kv_lora=256, nope=64, rope=32, v=64)
NO_ROPE = Dims(heads=3, kv_lora=512, nope=64, rope=0, v=64)
CASES = [
    Case((40, 97, 16), (40, 33, 1)),
    Case((40, 97, 16), (40, 33, 1), causal=False, packed=True),
    Case((50, 61), 17, split=True, page_size=64),
    Case((300,), 300, packed=True, page_size=1),
    Case((5, 0, 64, 9, 3), (9, 4, 0, 9, 1)),  # more new tokens than KV; none at all
    Case((70, 130), (70, 129), dims=SMALL_ROPE, dtype=torch.float16),
    Case((70, 130), (7, 129), dims=NO_ROPE),
    Case((33, 80), (20, 80), dims=Dims(heads=20, nope=192, v=256)),
]


@dataclass
class Problem:
    case: Case
    kwargs: dict[str, Any]
    want: list[tuple[Tensor, Tensor]]  # out and lse of each request, float64

    def check(self, result: Prefill) -> None:
        case = self.case
        shape = (len(case.lens), case.new) if isinstance(case.new, int) else (sum(case.counts),)
        assert result.out.shape == (*shape, case.dims.heads, case.dims.v)
        assert result.lse.shape == (*shape, case.dims.heads)
        assert result.out.dtype == case.dtype
        out, lse = result.out.reshape(-1, *result.out.shape[-2:]), result.lse.flatten(0, -2)
        want_out = torch.cat([part for part, _ in self.want])
        want_lse = torch.cat([part for _, part in self.want])
        found = errors(out, want_out)
        assert found.relative_rmse < TOLERANCE[case.dtype], str(found)
        empty = want_lse == -torch.inf
        assert torch.equal(lse == -torch.inf, empty)
        assert not out[empty].any()
        # Logits are of size 1, of operands rounded to 16 bits.
        error = (lse.double() - want_lse)[~empty].abs()
        assert (error < 4 * TOLERANCE[case.dtype]).all(), float(error.max())


def make_prefill(case: Case, device: torch.device | str = "cpu", *, seed: int = 0) -> Problem:
    """Logits of size 1. Unused slots are NaN, page ids past a request's end absurd."""
    generator = torch.Generator().manual_seed(seed)
    d, h = case.dims, case.dims.heads

    def draw(*shape: int, size: float) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * size
        return values.to(case.dtype).to(device)

    w_kv_b = draw(h * (d.nope + d.v), d.kv_lora, size=d.kv_lora**-0.5)
    q = draw(sum(case.counts), h, d.nope + d.rope, size=1)
    rows = [draw(n, d.kv_lora + d.rope, size=1) for n in case.lens]

    pages = [-(-n // case.page_size) for n in case.lens]
    order = torch.randperm(sum(pages) + 2, generator=generator)
    shape = (len(order), case.page_size, d.kv_lora + d.rope)
    cache = torch.full(shape, float("nan"), dtype=case.dtype, device=device)
    table = torch.tensor(POISON_PAGE_IDS, dtype=torch.int32).repeat(len(pages), max(pages) + 1)
    for row, own, values in zip(table, order[: sum(pages)].split(pages), rows, strict=True):
        row[: len(own)] = own
        for i, page in enumerate(own.tolist()):
            part = values[i * case.page_size : (i + 1) * case.page_size]
            cache[page, : len(part)] = part

    want = []
    scale = (d.nope + d.rope) ** -0.5
    by_head = w_kv_b.view(h, d.nope + d.v, d.kv_lora)
    for values, own in zip(rows, q.split(case.counts), strict=True):
        want.append(
            attend_expanded(
                own[..., : d.nope],
                own[..., d.nope :],
                values[:, : d.kv_lora],
                values[:, d.kv_lora :],
                by_head[:, : d.nope],
                by_head[:, d.nope :],
                scale=scale,
                causal=case.causal,
            )
        )
    if isinstance(case.new, int):
        q = q.view(len(case.lens), case.new, *q.shape[1:])
    whole = case.packed or not d.rope
    split = case.split and d.rope
    kwargs = {
        "q": q if whole else (q[..., : d.nope].contiguous(), q[..., d.nope :]),
        "kv_cache": (cache[..., : d.kv_lora].contiguous(), cache[..., d.kv_lora :])
        if split
        else cache,
        "block_table": table.to(device),
        "seq_lens": torch.tensor(case.lens, dtype=torch.int32, device=device),
        "w_kv_b": w_kv_b,
        "scale": scale,
        "causal": case.causal,
    }
    if isinstance(case.new, tuple):
        cuts = torch.tensor([0, *accumulate(case.counts)], dtype=torch.int32)
        kwargs["cu_seqlens_q"] = cuts.to(device)
    return Problem(case, kwargs, want)
