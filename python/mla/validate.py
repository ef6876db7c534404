"""MLA_VALIDATE=1: looks at the values of lengths, page ids and query offsets, and so waits."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _mla
from .inputs import Inputs
from .problem import Problem


def wanted() -> bool:
    return _mla.validates()


def check_values(inputs: Inputs, problem: Problem) -> None:
    """ValueError that names the first value out of range."""
    lens = inputs.seq_lens
    num_pages = inputs.kv.shape[0]
    reach = problem.max_len
    i = _first((lens < 0) | (lens.long() > reach))
    if i is not None:
        raise ValueError(
            f"seq_lens[{i}]: got {int(lens[i])}, expected 0 to {reach}: "
            f"block_table has {problem.max_pages} pages of {problem.page_size} for a request"
        )

    table = inputs.block_table
    used = (lens.long() + problem.page_size - 1) // problem.page_size
    column = torch.arange(problem.max_pages, device=table.device)
    i = _first((column < used[:, None]) & ((table < 0) | (table >= num_pages)))
    if i is not None:
        request, page = divmod(i, problem.max_pages)
        raise ValueError(
            f"block_table[{request}, {page}]: got {int(table[request, page])}, expected 0 to "
            f"{num_pages - 1}: the cache has {num_pages} pages, and the request's "
            f"{int(lens[request])} tokens use {int(used[request])}"
        )

    if inputs.cu_seqlens_q is not None:
        _check_query_offsets(inputs.cu_seqlens_q, problem.total_q)


def _check_query_offsets(cuts: Tensor, total_q: int) -> None:
    if int(cuts[0]) != 0:
        raise ValueError(f"cu_seqlens_q[0]: got {int(cuts[0])}, expected 0")
    i = _first(cuts[1:] < cuts[:-1])
    if i is not None:
        raise ValueError(
            f"cu_seqlens_q[{i + 1}]: got {int(cuts[i + 1])}, expected at least {int(cuts[i])}, "
            "the one before it"
        )
    if int(cuts[-1]) != total_q:
        raise ValueError(
            f"cu_seqlens_q[{len(cuts) - 1}]: got {int(cuts[-1])}, expected {total_q}, "
            "the number of query tokens"
        )


def _first(bad: Tensor) -> int | None:
    """The flat index of the first true element."""
    found = bad.flatten().nonzero()
    return int(found[0]) if len(found) else None
