"""New tokens for a paged cache, on any device, and what `append` must leave there."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from cases import gaps_hold, poisoned
from mla.rope import Rotary, Yarn, rotate
from torch import Tensor

POISON = 768.0  # exact in 16 bits; what must not be written is full of it


@dataclass(frozen=True)
class Append:
    """One call. `starts`: the position of each request's first new token; negative: padding."""

    starts: tuple[int, ...]
    counts: int | tuple[int, ...] = 1  # new tokens of each request; a tuple makes them ragged
    c: int = 512
    r: int = 64
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    rotated: bool = True
    interleaved: bool = True
    split: bool = False
    strided: bool = False
    cache_rank: int = 3

    def __str__(self) -> str:
        words = [str(self.dtype)[6:], f"{self.c}+{self.r}", f"p{self.page_size}"]
        words.append("ragged" if isinstance(self.counts, tuple) else f"s{self.counts}")
        words += [] if self.rotated else ["as-it-is"]
        words += [] if self.interleaved else ["halves"]
        words += [name for name in ("split", "strided") if getattr(self, name)]
        return "-".join(words)


CASES = [
    Append((5, 70, 0, 127)),
    Append((5, 70, 0, 127), dtype=torch.float16, interleaved=False),
    Append((5, 70, 0), counts=3, page_size=16, split=True),
    Append((5, 70, 0), counts=3, page_size=1, interleaved=False, strided=True),
    Append((63, 0, 200, 9), counts=(2, 0, 70, 1), page_size=64, strided=True),
    Append((63, 0, 200, 9), counts=(2, 0, 70, 1), page_size=7, interleaved=False, split=True),
    Append((3,) * 70, counts=tuple(i % 3 for i in range(70)), page_size=32),
    Append((1,) * 1100, counts=tuple(i % 2 for i in range(1100)), page_size=4, c=16, r=16),
    Append((9, 8), c=256, r=32, page_size=480, cache_rank=4),
    Append((9, 8), c=256, r=64, page_size=128, rotated=False, split=True, strided=True),
    Append((9, 8), c=512, r=0, rotated=False),
    Append((9, 8), counts=(4, 2), c=512, r=0, rotated=False, dtype=torch.float16),
    Append((9, 8), c=8, r=8, page_size=2),
    Append((2,) * 300, c=512, r=64),
]


@dataclass
class Call:
    kwargs: dict[str, Any]
    want: list[Tensor]  # the caches as they must be afterwards
    caches: list[Tensor]

    def check(self) -> None:
        for cache, want in zip(self.caches, self.want, strict=True):
            differ = (cache != want).nonzero()
            assert len(differ) == 0, f"{len(differ)} elements, the first at {differ[0].tolist()}"
            assert gaps_hold(cache, POISON), "written between the rows of the cache"


def make_append(case: Append, device: torch.device | str = "cpu", *, seed: int = 0) -> Call:
    """Pages are scattered over a pool; all that is not to be written holds POISON."""
    generator = torch.Generator().manual_seed(seed)
    b = len(case.starts)
    counts = case.counts if isinstance(case.counts, tuple) else (case.counts,) * b
    pages = [
        -(-max(start + count, 1) // case.page_size)
        for start, count in zip(case.starts, counts, strict=True)
    ]
    num_pages = sum(pages) + 3
    order = torch.randperm(num_pages, generator=generator)
    table = torch.full((b, max(pages) + 2), 2147480000, dtype=torch.int32)
    for row, own in zip(table, order[: sum(pages)].split(pages), strict=True):
        row[: len(own)] = own

    total = sum(counts)
    values = torch.randn(total, case.c + case.r, generator=generator).to(case.dtype)
    positions = torch.cat(
        [torch.arange(n) + start for start, n in zip(case.starts, counts, strict=True)]
        + [torch.empty(0, dtype=torch.long)]
    )
    requests = torch.repeat_interleave(torch.arange(b), torch.tensor(counts))
    cos_sin = Rotary(yarn=Yarn(40, 4096)).table(case.r, 700) if case.rotated else None
    rows = values.clone()
    if cos_sin is not None:
        rows[:, case.c :] = rotate(
            rows[:, case.c :], cos_sin[positions], interleaved=case.interleaved
        )
    packed = torch.full((num_pages, case.page_size, case.c + case.r), POISON, dtype=case.dtype)
    packed[table[requests, positions // case.page_size].long(), positions % case.page_size] = rows

    def place(source: Tensor) -> Tensor:
        view = poisoned(source.shape, source.dtype, device, strided=case.strided, poison=POISON)
        return view.copy_(source)

    widths = [(0, case.c), (case.c, case.c + case.r)] if case.split else [(0, case.c + case.r)]
    head = (1,) if case.cache_rank == 4 else ()
    want = [packed[..., a:e].reshape(num_pages, case.page_size, *head, e - a) for a, e in widths]
    caches = [place(torch.full_like(part, POISON)) for part in want]
    tokens = (total,) if isinstance(case.counts, tuple) else (b, case.counts)
    new = place(values.view(*tokens, case.c + case.r))  # latent and rope are slices of it
    kwargs = {
        "latent": new[..., : case.c],
        "rope": new[..., case.c :] if case.r else None,
        "kv_cache": tuple(caches) if case.split else caches[0],
        "block_table": table.to(device),
        "positions": positions.int().view(tokens).to(device),
        "interleaved": case.interleaved,
    }
    if isinstance(case.counts, tuple):
        cuts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        kwargs["cu_seqlens_q"] = cuts.to(device)
    if cos_sin is not None:
        kwargs["cos_sin"] = cos_sin.to(device)
    return Call(kwargs, [part.to(device) for part in want], caches)


@dataclass(frozen=True)
class Mistake:
    """A value that leads outside, and the tokens that are then left out."""

    tensor: str
    index: tuple[int, ...]
    value: int
    lost: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.tensor}{list(self.index)}={self.value}"


# For MISTAKEN: tokens 0 to 5, requests of 2, 1 and 3 of them.
MISTAKEN = Append((60, 3, 126), counts=(2, 1, 3), page_size=64)
MISTAKES = [
    Mistake("positions", (0,), -1, (0,)),
    Mistake("positions", (1,), -(2**31), (1,)),
    Mistake("positions", (2,), 2**31 - 1, (2,)),
    Mistake("positions", (3,), 64 * 5, (3,)),  # beyond the block table
    Mistake("positions", (2,), 64, (2,)),  # where the table has no page of the cache
    Mistake("block_table", (1, 0), -1, (2,)),
    Mistake("block_table", (1, 0), 2**31 - 1, (2,)),
    Mistake("block_table", (1, 0), -(2**31), (2,)),
    Mistake("block_table", (2, 2), 9, (5,)),  # one more than the last page
    Mistake("cu_seqlens_q", (3,), 5, (5,)),
    Mistake("cu_seqlens_q", (0,), 1, (0,)),
    Mistake("cu_seqlens_q", (3,), -5, (3, 4, 5)),
]


def make_beyond_the_table(device: torch.device | str = "cpu") -> Call:
    """The call of MISTAKEN with a block table that ends right before the last token."""
    call = make_append(MISTAKEN, device)
    call.want[0][call.kwargs["block_table"][2, 2], 0] = POISON
    call.kwargs["block_table"] = call.kwargs["block_table"][:, :2]
    return call


def make_mistake(mistake: Mistake, device: torch.device | str = "cpu") -> Call:
    """The call of MISTAKEN with one wrong value."""
    call = make_append(MISTAKEN, device)
    for token in mistake.lost:
        start = (60, 61, 3, 126, 127, 128)[token]
        request = (0, 0, 1, 2, 2, 2)[token]
        page = call.kwargs["block_table"][request, start // 64]
        call.want[0][page, start % 64] = POISON
    call.kwargs[mistake.tensor][mistake.index] = mistake.value
    return call
