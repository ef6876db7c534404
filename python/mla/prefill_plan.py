"""What a prefill does, decided on the host: which requests are absorbed, and the others' chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import expanded
from .checks import D_V, DTYPES
from .expanded import Steps
from .layer_config import Dims
from .prefill_inputs import NewTokens

Method = Literal["absorbed", "expanded"]
METHODS: tuple[Method, ...] = ("absorbed", "expanded")
WORKSPACE_BYTES = 512 << 20


class Sizes(NamedTuple):
    """What a plan is for, beside lengths."""

    dims: Dims
    dtype: torch.dtype
    device: torch.device
    b: int
    tokens: int  # query tokens of all requests
    max_pages: int
    num_pages: int
    page_size: int
    causal: bool
    workspace_bytes: int

    @classmethod
    def of(cls, new: NewTokens, causal: bool, workspace_bytes: int) -> Sizes:
        q, table, pages = new.q_nope, new.block_table, new.cache.shape
        return cls(
            new.dims, q.dtype, q.device, table.shape[0], q.shape[0], table.shape[1], *pages[:2],
            causal, workspace_bytes,
        )  # fmt: skip

    @property
    def reach(self) -> int:
        """KV tokens of the longest request that there can be."""
        return self.max_pages * self.page_size if self.num_pages else 0

    @property
    def decodes(self) -> bool:
        """Whether `decode` has kernels for them."""
        return self.dtype in DTYPES and D_V.get(self.dims.d_qk) == self.dims.kv_lora


class Absorbed(NamedTuple):
    """The absorbed requests among others: their query tokens, and what `decode` is told."""

    rows: slice | Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor


@dataclass(frozen=True)
class PrefillPlan:
    """Of `plan_prefill`. methods: of each request."""

    sizes: Sizes
    methods: tuple[Method, ...]
    absorbed: Absorbed | None  # None: all requests are, or none is
    steps: Steps | None

    @property
    def method(self) -> Literal["absorbed", "expanded", "both"]:
        kinds = set(self.methods)
        if len(kinds) > 1:
            return "both"
        return "absorbed" if kinds == {"absorbed"} else "expanded"


def make_plan(
    sizes: Sizes,
    block_table: Tensor,
    seq_lens: Tensor,
    lens: Sequence[int],
    cuts: Sequence[int],
    method: Method | None,
) -> PrefillPlan:
    """lens, cuts: the values of seq_lens and cu_seqlens_q; clamped here."""
    lens = [min(max(n, 0), sizes.reach) for n in lens]
    cuts = [min(max(n, 0), sizes.tokens) for n in cuts]
    new = [max(end - begin, 0) for begin, end in zip(cuts, cuts[1:], strict=False)]
    methods = tuple(method or cheaper_of(sizes, s, n) for s, n in zip(new, lens, strict=True))
    which = [i for i, found in enumerate(methods) if found == "expanded"]
    steps, absorbed = None, None
    if which:
        steps = expanded.prepare(
            sizes.dims, sizes.dtype, block_table, (sizes.num_pages, sizes.page_size), lens, cuts,
            which, causal=sizes.causal, workspace_bytes=sizes.workspace_bytes,
        )  # fmt: skip
        others = [i for i, found in enumerate(methods) if found == "absorbed" and new[i]]
        if others:
            absorbed = _absorbed(others, new, cuts, block_table, seq_lens)
    return PrefillPlan(sizes, methods, absorbed, steps)


def _absorbed(
    which: Sequence[int],
    new: Sequence[int],
    cuts: Sequence[int],
    block_table: Tensor,
    seq_lens: Tensor,
) -> Absorbed:
    device = block_table.device
    first, last = which[0], which[-1]
    starts = [0]
    for i in which:
        starts.append(starts[-1] + new[i])
    rows: slice | Tensor = slice(cuts[first], cuts[last] + new[last])
    if sum(new[first : last + 1]) == starts[-1] == rows.stop - rows.start:
        own: slice | Tensor = slice(first, last + 1)
        starts = [cut - cuts[first] for cut in (*cuts[first : last + 1], rows.stop)]
    else:
        own = torch.tensor(which, device=device)
        rows = torch.tensor(
            [token for i in which for token in range(cuts[i], cuts[i] + new[i])], device=device
        )
    return Absorbed(
        rows,
        block_table[own],
        seq_lens[own],
        torch.tensor(starts, dtype=torch.int32, device=device),
    )


def cheaper_of(sizes: Sizes, new: int, length: int) -> Method:
    d = sizes.dims
    if not sizes.decodes:
        return "expanded"
    saved = (2 * d.kv_lora + d.rope) - (d.nope + d.rope + d.v)
    made = 2 * d.kv_lora * (d.nope + d.v)
    return "expanded" if saved > 0 and new * saved >= made else "absorbed"
