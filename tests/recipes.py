"""Calls of `mla.decode` that are right, in all their kinds, and what they launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import mla
import pytest
import torch
from hypothesis import strategies as st
from mla.device import by_name
from recording import STREAM, Launch, recorded, set_device, set_stream
from torch import Tensor
from wrong_calls import Arguments

D_V = {576: 512, 320: 256, 288: 256, 512: 512}


@dataclass(frozen=True)
class Recipe:
    """A call that is right. Its tensors hold nothing of interest: only where they lie matters."""

    b: int = 2
    s_q: int = 1
    h_q: int = 3
    d_qk: int = 576
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 16
    pages: int = 3
    max_pages: int = 2
    ragged: bool = False
    split_q: bool = False
    split_cache: bool = False
    cache_rank: int = 3
    padded: bool = False  # strides, of everything
    out: bool = True
    lse: bool = True
    return_lse: bool = True
    workspace: bool = False
    causal: bool = True
    scale: float = 0.1
    d_v: bool = False  # is given
    plan: str = ""  # "free" or "bounded" by another number of pages
    variant: str | None = None
    context: str | None = None  # of use_variant
    batch_invariant: bool = False
    max_seq_len: int | None = None

    def tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        if not self.padded:
            return torch.empty(shape, dtype=dtype)
        return torch.empty(*(n + 2 for n in shape[:-1]), shape[-1] + 64, dtype=dtype)[
            tuple(slice(n) for n in shape)
        ]

    def parts(self, *shape: int, split: bool) -> Tensor | tuple[Tensor, Tensor]:
        d_v = D_V[self.d_qk]
        if not split or self.d_qk == d_v:
            return self.tensor(*shape, self.d_qk, dtype=self.dtype)
        return (
            self.tensor(*shape, d_v, dtype=self.dtype),
            self.tensor(*shape, self.d_qk - d_v, dtype=self.dtype),
        )

    def call(self) -> Arguments:
        rows = (self.b * self.s_q, self.h_q) if self.ragged else (self.b, self.s_q, self.h_q)
        page = (self.page_size,) if self.cache_rank == 3 else (self.page_size, 1)
        int32 = torch.int32
        seq_lens = torch.empty(self.b, dtype=int32)
        cuts = torch.empty(self.b + 1, dtype=int32) if self.ragged else None
        plan = None
        if self.plan:
            with mla.use_variant(self.context or self.variant or "sm80"):
                plan = mla.plan(
                    seq_lens,
                    s_q=self.s_q,
                    h_q=self.h_q,
                    d_qk=self.d_qk,
                    dtype=self.dtype,
                    page_size=self.page_size,
                    cu_seqlens_q=cuts,
                    total_q=rows[0] if self.ragged else None,
                    max_pages=None if self.plan == "free" else self.max_pages - 1,
                    batch_invariant=self.batch_invariant,
                    max_seq_len=self.max_seq_len,
                    variant=self.variant,
                )
        return {
            "q": self.parts(*rows, split=self.split_q),
            "kv_cache": self.parts(self.pages, *page, split=self.split_cache),
            "block_table": self.tensor(self.b, self.max_pages, dtype=int32),
            "seq_lens": seq_lens,
            "scale": self.scale,
            "causal": self.causal,
            "cu_seqlens_q": cuts,
            "d_v": D_V[self.d_qk] if self.d_v else None,
            "return_lse": self.return_lse,
            "out": self.tensor(*rows, D_V[self.d_qk], dtype=self.dtype) if self.out else None,
            "lse": self.tensor(*rows, dtype=torch.float32) if self.lse else None,
            "plan": plan,
            "workspace": torch.empty(64 << 20, dtype=torch.uint8) if self.workspace else None,
            "batch_invariant": self.batch_invariant,
            "max_seq_len": self.max_seq_len,
            "variant": self.variant,
        }


CHOICES: dict[str, list[object]] = {
    "b": [1, 2, 5],
    "s_q": [1, 2],
    "h_q": [1, 3, 40],
    "d_qk": list(D_V),
    "dtype": [torch.bfloat16, torch.float16],
    "page_size": [1, 16, 48],
    "pages": [1, 3],
    "max_pages": [2, 4, 200],
    "cache_rank": [3, 4],
    "scale": [0.1, -2.0, 1, 0],
    "plan": ["", "free", "bounded"],
    "variant": [None, "sm80"],
    "context": [None, "sm80"],
    "max_seq_len": [None, 0, 20, 5000],
}
FLAGS = [f.name for f in fields(Recipe) if f.name not in CHOICES]
CHANGES = st.one_of(
    *(st.tuples(st.just(name), st.sampled_from(values)) for name, values in CHOICES.items()),
    *(st.tuples(st.just(name), st.booleans()) for name in FLAGS),
)
RECIPES = (
    st.dictionaries(st.sampled_from([*CHOICES, *FLAGS]), st.none(), max_size=8)
    .flatmap(
        lambda names: st.fixed_dictionaries(
            {name: st.sampled_from(CHOICES.get(name, [False, True])) for name in names}
        )
    )
    .map(lambda options: Recipe(**options))
)


def run(call: Arguments, context: str | None) -> Any:
    if context is None:
        return mla.decode(**call)
    with mla.use_variant(context):
        return mla.decode(**call)


def essence(launches: list[Launch], result: Any) -> list[Launch]:
    """With addresses that differ from run to run as distances: of outputs, schedule, partials."""
    out, lse = result if isinstance(result, tuple) else (result, None)
    *_, decode = launches
    base = decode.params["o_partial"] or decode.params["plan"]  # the former if any are possible
    made = {"out": out.data_ptr(), "lse": lse.data_ptr() if lse is not None else 0}
    planned = len(launches) > 1  # in the workspace
    found = []
    for launch in launches:
        p = dict(launch.params)
        for name in made:
            p[name] -= made[name] if p[name] else 0
        if p["o_partial"]:
            p["lse2_partial"] -= base
            p["o_partial"] -= base
        if planned:
            p["plan"] -= base
        found.append(replace(launch, params=p))
    return found


@contextmanager
def on_a100() -> Iterator[list[Launch]]:
    """Launches to come, which are not done, of CPU tensors that pass for those of an A100."""
    a100 = by_name("A100")
    assert a100 is not None
    with pytest.MonkeyPatch.context() as patch, recorded([]) as launches:
        set_device(patch, a100)
        set_stream(patch, STREAM)
        yield launches


def launched(seen: list[Launch], call: Arguments, context: str | None) -> list[Launch]:
    del seen[:]
    result = run(call, context)
    return essence(seen, result) if seen else []
