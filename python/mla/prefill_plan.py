"""What a prefill does, decided on the host: which requests are absorbed, and the others' chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import expanded_steps
from .checks import check_index, check_lengths, check_size, check_tensor, wrong
from .expanded_steps import Steps
from .layer_config import Dims
from .prefill_choice import WORKSPACE_BYTES, Sizes, cheaper_of, check_method
from .prefill_inputs import check_layer
from .prefill_times import Method


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
        if self.steps is None:
            return "absorbed"
        return "expanded" if self.absorbed is None else "both"

    def check_fits(self, sizes: Sizes) -> None:
        """ValueError if it is not for the call."""
        for name, planned, called in zip(Sizes._fields, self.sizes, sizes, strict=True):
            if planned != called:
                raise wrong("plan", f"a plan for {name} = {planned}", f"{name} = {called}")


def plan_prefill(
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    dims: Dims,
    dtype: torch.dtype,
    num_pages: int,
    page_size: int,
    s: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    tokens: int | None = None,
    causal: bool = True,
    method: Method | None = None,
    captured: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> PrefillPlan:
    """What `prefill` does for a step, decided once: one plan for all layers.

    block_table, seq_lens: of the step; pages and lengths are read now, which waits for the device.
    dims: heads and columns of the layers: `mla.models` and `config.dims` have them.
    dtype, num_pages, page_size: of the cache.
    s: new tokens of each request. A ragged query has `cu_seqlens_q` and `tokens`, q.shape[0],
        instead.
    causal, method, workspace_bytes: as for `prefill`, whose calls with this plan have the same.
    captured: the calls will be captured in a CUDA graph, so only the time of the GPU decides; else
        that of the host does where it is longer. Plans of both kinds can be captured.

    Raises TypeError and ValueError for arguments that do not fit.
    """
    check_tensor("seq_lens", seq_lens)
    check_layer(dims, dtype)
    device = seq_lens.device
    check_lengths(seq_lens, cu_seqlens_q, None, device)
    check_index("block_table", block_table, (len(seq_lens), None), device, "[{}, max_pages]")
    check_method(method)
    b = len(seq_lens)
    if cu_seqlens_q is not None and tokens is not None and s is None:
        cuts, tokens = cu_seqlens_q.tolist(), check_size("tokens", tokens, 0)
    elif s is not None and cu_seqlens_q is None and tokens is None:
        step = check_size("s", s, 0)
        cuts, tokens = [i * step for i in range(b + 1)], b * step
    else:
        names = {"s": s, "cu_seqlens_q": cu_seqlens_q, "tokens": tokens}
        got = ", ".join(name for name, value in names.items() if value is not None) or "none"
        raise wrong("s, cu_seqlens_q, tokens", got, "s, or else cu_seqlens_q and tokens")
    sizes = Sizes(
        dims.dims, dtype, device, b, tokens,
        block_table.shape[1], check_size("num_pages", num_pages, 0),
        check_size("page_size", page_size, 1), causal,
        check_size("workspace_bytes", workspace_bytes, 1),
    )  # fmt: skip
    return make_plan(sizes, block_table, seq_lens, seq_lens.tolist(), cuts, method, captured)


def make_plan(
    sizes: Sizes,
    block_table: Tensor,
    seq_lens: Tensor,
    lens: Sequence[int],
    cuts: Sequence[int],
    method: Method | None,
    captured: bool = False,
) -> PrefillPlan:
    """lens, cuts: the values of seq_lens and cu_seqlens_q; clamped here."""
    lens = [min(max(n, 0), sizes.reach) for n in lens]
    cuts = [min(max(n, 0), sizes.tokens) for n in cuts]
    new = [max(end - begin, 0) for begin, end in pairwise(cuts)]
    methods = tuple(
        method or cheaper_of(sizes, s, n, captured) for s, n in zip(new, lens, strict=True)
    )
    which = [i for i, found in enumerate(methods) if found == "expanded"]
    steps, absorbed = None, None
    if which:
        steps = expanded_steps.prepare(
            sizes.dims, sizes.dtype, block_table, (sizes.num_pages, sizes.page_size), lens, cuts,
            which, tokens=sizes.tokens, causal=sizes.causal, workspace_bytes=sizes.workspace_bytes,
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
    begin, end = cuts[first], cuts[last] + new[last]
    rows: slice | Tensor = slice(begin, end)
    if sum(new[first : last + 1]) == starts[-1] == end - begin:
        own: slice | Tensor = slice(first, last + 1)
        starts = [cut - begin for cut in (*cuts[first : last + 1], end)]
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
