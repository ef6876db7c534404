"""The same requests in other batches, and what each of them got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from cases import Inputs, lay_out
from running import assert_same_bits, run
from torch import Tensor


def batch_of(whole: Inputs, order: Sequence[int], *, ragged: bool = True, **changes: Any) -> Inputs:
    """Requests of `whole` in an order, some of them several times, in a cache of its own.

    Ragged, or uniform with the query tokens that they all have. `changes`: of the case.
    """
    requests = list(whole.split())
    q_lens: int | tuple[int, ...] = tuple(whole.case.query_lens[i] for i in order)
    if not ragged:
        (q_lens,) = set(q_lens)
    case = replace(
        whole.case,
        seq_lens=tuple(whole.case.seq_lens[i] for i in order),
        q_lens=q_lens,
        **changes,
    )
    rows = torch.cat([requests[i][0] for i in order])
    tokens = torch.cat([requests[i][1] for i in order])
    return lay_out(case, rows, tokens, seed=len(order) + sum(order))


def by_request(inputs: Inputs, result: tuple[Tensor, Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    out, lse = result
    assert lse is not None
    case = inputs.case
    outs = out.reshape(-1, case.h_q, case.d_v).split(case.query_lens)
    return list(zip(outs, lse.reshape(-1, case.h_q).split(case.query_lens), strict=True))


def run_each(inputs: Inputs, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """What each request gets in the batch-invariant mode."""
    return by_request(inputs, run(inputs, batch_invariant=True, **options))


def assert_same(
    got: Sequence[tuple[Tensor, Tensor]],
    order: Sequence[int],
    want: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Of a batch in this order: bit for bit what each request has in `want`."""
    assert len(got) == len(order)
    for place, i in enumerate(order):
        try:
            assert_same_bits(got[place], want[i])
        except AssertionError as error:
            raise AssertionError(f"request {i} at place {place} of {len(order)}: {error}") from None
