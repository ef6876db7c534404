"""The cases of `mla bench`: their file, their sizes, their tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla.problem import Problem

from .usage import UsageError

_TINY_TOKENS, _MID_TOKENS = 8192, 65536


@dataclass(frozen=True)
class Case:
    """One line of a case file, with the dims that the run adds to it."""

    id: str
    b: int
    s_q: int
    h_q: int
    causal: bool
    page_size: int
    dtype: torch.dtype
    seq_lens: tuple[int, ...]
    bound: str  # "memory" or "compute": what the recorded floor is made of
    recorded_floor_us: float | None  # None once dims other than the file's are asked for
    peer_us: Mapping[str, float]  # recorded times of others by name
    d_qk: int = 576
    d_v: int = 512

    @property
    def tokens(self) -> int:
        """KV tokens in the batch."""
        return sum(self.seq_lens)

    @property
    def num_pages(self) -> int:
        return sum(-(-length // self.page_size) for length in self.seq_lens)

    @property
    def io_bytes(self) -> int:
        """KV, q and out, each moved once."""
        rows = self.b * self.s_q * self.h_q
        return (self.tokens * self.d_qk + rows * (self.d_qk + self.d_v)) * self.dtype.itemsize

    @property
    def flop(self) -> int:
        """Of both matrix products, every query row against every KV token of its request."""
        return 2 * self.s_q * self.h_q * self.tokens * (self.d_qk + self.d_v)

    @property
    def size(self) -> str:
        """The class that its result is averaged in."""
        if self.tokens <= _TINY_TOKENS:
            return f"tiny-{self.bound}"
        return f"{'mid' if self.tokens <= _MID_TOKENS else 'large'}-{self.bound}"

    def problem(self, batch_invariant: bool = False) -> Problem:
        """As dispatch sees it, with a block table as wide as the longest request."""
        return Problem.from_sizes(
            b=self.b,
            s_q=self.s_q,
            h_q=self.h_q,
            d_qk=self.d_qk,
            dtype=self.dtype,
            page_size=self.page_size,
            max_pages=max(-(-length // self.page_size) for length in self.seq_lens),
            batch_invariant=batch_invariant,
        )


def load_cases(path: Path) -> list[Case]:
    """Reads a list of cases; benchmarks/README.md describes the file."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"no such file: {path} (the repository has benchmarks/cases.json)"
        ) from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    try:
        return parse_cases(entries)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: an entry is not a case: {error!r}") from None


def parse_cases(entries: Iterable[dict[str, Any]]) -> list[Case]:
    """KeyError, TypeError or AttributeError for an entry that is no case."""
    return [_case(entry) for entry in entries]


def _case(entry: dict[str, Any]) -> Case:
    lengths = entry["seq_lens"]
    if not isinstance(lengths, list) or len(lengths) != entry["b"]:
        raise TypeError(f"{entry['id']}: seq_lens must be a list of b = {entry['b']} lengths")
    floor_us = entry.get("floor_us")
    return Case(
        id=str(entry["id"]),
        b=len(lengths),
        s_q=int(entry["s_q"]),
        h_q=int(entry["h_q"]),
        causal=bool(entry["causal"]),
        page_size=int(entry["page_size"]),
        dtype=getattr(torch, str(entry["dtype"])),
        seq_lens=tuple(lengths),
        bound=str(entry.get("bound", "memory")),
        recorded_floor_us=float(floor_us) if floor_us is not None else None,
        peer_us={name: float(us) for name, us in entry.get("peer_us", {}).items()},
    )


def with_overrides(
    case: Case, *, dims: tuple[int, int], dtype: str | None, page_size: int | None
) -> Case:
    """The same lengths with other dims, dtype or pages."""
    same_dims = dims == (case.d_qk, case.d_v)
    return replace(
        case,
        d_qk=dims[0],
        d_v=dims[1],
        recorded_floor_us=case.recorded_floor_us if same_dims else None,
        peer_us=case.peer_us if same_dims else {},
        dtype=getattr(torch, dtype) if dtype else case.dtype,
        page_size=page_size or case.page_size,
    )


@dataclass(frozen=True)
class CaseInputs:
    """Arguments of `mla.decode`."""

    q: Tensor
    kv_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor


def pool_elements(cases: Iterable[Case]) -> int:
    """Of the pool that all of them share."""
    return max((case.num_pages * case.page_size * case.d_qk for case in cases), default=0)


class CasePool:
    """One pool of random KV that serves every case: only tables and queries are made anew."""

    def __init__(self, cases: list[Case], device: torch.device):
        self._device = device
        self._elements = pool_elements(cases)
        self._generator = torch.Generator(device).manual_seed(0)
        self._data: dict[torch.dtype, Tensor] = {}

    def _normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device, dtype=dtype)

    def inputs(self, case: Case) -> CaseInputs:
        """The tensors of a case; a request's pages are scattered at random over the pool."""
        if case.dtype not in self._data:
            self._data.clear()  # there may not be room for both
            self._data = {case.dtype: self._normal(self._elements, dtype=case.dtype)}
        page_elements = case.page_size * case.d_qk
        pool_pages = self._elements // page_elements
        kv = self._data[case.dtype][: pool_pages * page_elements]
        pages = [-(-length // case.page_size) for length in case.seq_lens]
        scattered = torch.randperm(pool_pages, generator=self._generator, device=self._device)
        table = torch.zeros(case.b, max(pages), dtype=torch.int32, device=self._device)
        owned = torch.arange(max(pages), device=self._device) < torch.tensor(
            pages, device=self._device
        ).unsqueeze(1)
        table[owned] = scattered[: sum(pages)].to(torch.int32)
        return CaseInputs(
            q=self._normal(case.b, case.s_q, case.h_q, case.d_qk, dtype=case.dtype),
            kv_cache=kv.view(pool_pages, case.page_size, case.d_qk),
            block_table=table,
            seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32, device=self._device),
        )
