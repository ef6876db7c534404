"""Problems for the numerics tests, on any device.

A `Case` is a recipe; `make_problem` turns it into tensors in which everything that must not matter
is poison: cache slots past a request's length, unused pages, gaps between padded strides, page ids
past a request's last page.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

# Not mla's own tables: what is promised is written down here a second time.
DIMS = {576: 512, 320: 256, 288: 256, 512: 512}  # d_qk -> d_v
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
POISON_PAGE_IDS = (-1, 2147480000, -(2**31))
DEFAULT_SCALE = 192**-0.5


def single_tiles_beside_long_pieces(workers: int) -> tuple[int, ...]:
    """Lengths of requests: with 16 heads, some of the workers of `sm90_swap` have the last tile of
    a request and most of the next one (test_schedule.py)."""
    return (1280,) * (5 * workers // 6)


@dataclass(frozen=True)
class Case:
    """One call of `decode`. Lengths in tokens; one entry of `seq_lens` per request."""

    seq_lens: tuple[int, ...]
    q_lens: int | tuple[int, ...] = 1  # a tuple makes the query ragged
    h_q: int = 16
    d_qk: int = 576
    dtype: str = "bfloat16"
    page_size: int = 64
    causal: bool = True
    scale: float = DEFAULT_SCALE
    split_q: bool = False
    split_cache: bool = False
    strided: bool = False  # padded strides in queries, cache, block table and outputs
    return_lse: bool = True
    given: bool = True  # the caller passes out= and lse=
    poison: float = float("nan")
    values: str = "normal"  # "normal": randn / 10; "ternary": -1, 0 or 1, so that logits are exact
    cache_rank: int = 3  # 4: [pages, page_size, 1, d]
    label: str = ""

    @property
    def d_v(self) -> int:
        return DIMS[self.d_qk]

    @property
    def query_lens(self) -> tuple[int, ...]:
        """Query tokens of each request."""
        if isinstance(self.q_lens, int):
            return (self.q_lens,) * len(self.seq_lens)
        return self.q_lens

    @property
    def ragged(self) -> bool:
        return not isinstance(self.q_lens, int)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Leading dimensions of q, out and lse, the heads included."""
        if isinstance(self.q_lens, int):
            return (len(self.seq_lens), self.q_lens, self.h_q)
        return (sum(self.q_lens), self.h_q)

    def __str__(self) -> str:
        """A test id: the label, then what differs from a plain case."""
        default = {f.name: f.default for f in fields(self)}
        words = [self.label] if self.label else []
        words += [
            "bf16" if self.dtype == "bfloat16" else "fp16",
            f"h{self.h_q}",
            f"p{self.page_size}",
            f"b{len(self.seq_lens)}",
        ]
        words.append("ragged" if self.ragged else f"q{self.q_lens}")
        words += [] if self.causal else ["full"]
        words += [name for name in ("split_q", "split_cache", "strided") if getattr(self, name)]
        if self.scale != default["scale"]:
            words.append(f"scale{self.scale:g}")
        return "-".join(words)


@dataclass
class Inputs:
    """The tensors of a case, and what they were made from."""

    case: Case
    q: Tensor | tuple[Tensor, Tensor]
    kv_cache: Tensor | tuple[Tensor, Tensor]
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor | None
    rows: Tensor  # [total_q, h_q, d_qk]: the queries, requests one after the other
    tokens: Tensor  # [sum of seq_lens, d_qk]: the cache rows in order

    def kwargs(self) -> dict[str, Any]:
        """Arguments of `mla.decode`, without outputs."""
        return {
            "q": self.q,
            "kv_cache": self.kv_cache,
            "block_table": self.block_table,
            "seq_lens": self.seq_lens,
            "cu_seqlens_q": self.cu_seqlens_q,
            "scale": self.case.scale,
            "causal": self.case.causal,
        }

    def to(self, device: torch.device | str) -> Inputs:
        """A copy elsewhere with the same strides and gaps. No kernel runs: storages are copied."""

        def move(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(_to_device(part, device) for part in value)
            return _to_device(value, device) if isinstance(value, Tensor) else value

        return replace(
            self, **{f.name: move(getattr(self, f.name)) for f in fields(self) if f.name != "case"}
        )

    def with_lengths(self, seq_lens: Sequence[int], q_lens: Sequence[int] | None = None) -> Inputs:
        """The same tensors with other lengths, at most the ones they were made for.

        The new lengths are written into the tensors `seq_lens` and `cu_seqlens_q`, as between two
        replays of a graph.
        """
        case = replace(self.case, seq_lens=tuple(seq_lens))
        first = [sum(self.case.seq_lens[:i]) for i in range(len(seq_lens))]
        tokens = [self.tokens[at : at + n] for at, n in zip(first, seq_lens, strict=True)]
        self.seq_lens.copy_(torch.tensor(case.seq_lens, dtype=torch.int32))
        rows = self.rows
        if q_lens is not None:
            assert self.cu_seqlens_q is not None
            case = replace(case, q_lens=tuple(q_lens))
            self.cu_seqlens_q.copy_(
                torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32)
            )
            rows = rows[: sum(q_lens)]
        return replace(self, case=case, tokens=torch.cat(tokens), rows=rows)

    def split(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per request: its query rows [s_q, h_q, d_qk] and its cache rows [len, d_qk]."""
        rows = self.rows.split(self.case.query_lens)
        return zip(rows, self.tokens.split(self.case.seq_lens), strict=True)


def poisoned(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    strided: bool,
    poison: float,
) -> Tensor:
    """A tensor full of `poison`. With `strided` a view into a larger one, padded by a multiple of
    16 bytes on every dimension but the last, which stays dense."""
    if not strided:
        return torch.full(tuple(shape), poison, dtype=dtype, device=device)
    pad = 16 // dtype.itemsize
    strides = [1]
    for i, size in enumerate(reversed(shape)):
        row = strides[0] * max(size, 1)
        strides.insert(0, (row + pad - 1) // pad * pad + (i + 1) * pad)
    flat = torch.full((pad + strides[0],), poison, dtype=dtype, device=device)
    return flat.as_strided(tuple(shape), tuple(strides[1:]), storage_offset=pad)


def gaps_hold(view: Tensor, poison: float) -> bool:
    """Whether everything around `view` in its storage is still as `poisoned` left it."""
    flat = view.new_empty(0).set_(view.untyped_storage())
    used = torch.zeros(flat.numel(), dtype=torch.bool, device=view.device)
    used.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    rest = flat[~used]
    return bool(rest.isnan().all() if poison != poison else (rest == poison).all())


def make_problem(case: Case, device: torch.device | str, *, seed: int = 0) -> Inputs:
    """Random tensors for `case`. A request's pages are scattered over a pool with unused pages."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def values(*shape: int) -> Tensor:
        if case.values == "ternary":
            return torch.randint(-1, 2, shape, generator=generator, device=device).to(dtype)
        return (torch.randn(shape, generator=generator, device=device) / 10).to(dtype)

    total_q, total_kv = sum(case.query_lens), sum(case.seq_lens)
    rows, tokens = values(total_q, case.h_q, case.d_qk), values(total_kv, case.d_qk)
    return lay_out(case, rows, tokens, seed=seed)


def lay_out(case: Case, rows: Tensor, tokens: Tensor, *, seed: int = 0) -> Inputs:
    """The tensors of `case` with these query rows and cache rows, on their device."""
    device, dtype, b = rows.device, rows.dtype, len(case.seq_lens)

    def place(source: Tensor, shape: Sequence[int], split: bool) -> Tensor | tuple[Tensor, Tensor]:
        """`source` in a poisoned tensor. Split: two views of it when strided, else two tensors."""
        packed = poisoned(
            (*shape, case.d_qk), dtype, device, strided=case.strided, poison=case.poison
        )
        packed.copy_(source.reshape(packed.shape))
        if not split or case.d_qk == case.d_v:
            return packed
        first, second = packed[..., : case.d_v], packed[..., case.d_v :]
        return (first, second) if case.strided else (first.contiguous(), second.contiguous())

    table, slots, num_pages = _scatter_pages(case, seed)
    width = table.shape[1] + (4 if case.strided else 0)
    block_table = torch.full((b, width), 2147480000, dtype=torch.int32)[:, : table.shape[1]]
    block_table.copy_(table)
    block_table = _to_device(block_table, device)

    pool = torch.full(
        (num_pages * case.page_size, case.d_qk), case.poison, dtype=dtype, device=device
    )
    pool[slots.to(device)] = tokens
    heads = (1,) if case.cache_rank == 4 else ()
    kv_cache = place(pool, (num_pages, case.page_size, *heads), case.split_cache)
    cu_seqlens_q = None
    if case.ragged:
        cu_seqlens_q = torch.tensor(
            [0, *itertools.accumulate(case.query_lens)], dtype=torch.int32, device=device
        )
    return Inputs(
        case=case,
        q=place(rows, case.row_shape, case.split_q),
        kv_cache=kv_cache,
        block_table=block_table,
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32, device=device),
        cu_seqlens_q=cu_seqlens_q,
        rows=rows,
        tokens=tokens,
    )


def _to_device(view: Tensor, device: torch.device | str) -> Tensor:
    """A copy of `view` with the same strides; the whole storage travels in one copy."""
    flat = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage()).to(device)
    moved: Tensor = flat.as_strided(view.shape, view.stride(), view.storage_offset())
    return moved


def _scatter_pages(case: Case, seed: int) -> tuple[Tensor, Tensor, int]:
    """The block table [b, pages] with poison past each request's end, the pool slot of every token,
    and how many pages the pool has."""
    counts = [-(-n // case.page_size) for n in case.seq_lens]
    num_pages = sum(counts) + 2 + sum(counts) // 4
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))
    width = max(counts, default=0) + 3
    poison = torch.tensor(POISON_PAGE_IDS, dtype=torch.int32).repeat(width)[:width]
    table = poison.repeat(len(counts), 1)
    slots, first = [torch.empty(0, dtype=torch.int64)], 0
    for i, (count, length) in enumerate(zip(counts, case.seq_lens, strict=True)):
        pages = order[first : first + count]
        first += count
        table[i, :count] = pages.int()
        slots.append(
            (pages[:, None] * case.page_size + torch.arange(case.page_size)).flatten()[:length]
        )
    return table, torch.cat(slots), num_pages
