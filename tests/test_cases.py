"""The problems of the numerics tests cover what they claim, and poison what they should."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from cases import Case, gaps_hold, make_problem
from covering import AXES, CASES, cover, possible
from device_plan import SHAPES, Shape, host_schedule
from gpu import sanitizer_target as sanitized
from mla.variants import Variant
from running import GPU_ROWS

NAN = float("nan")


def test_every_pair_of_values_occurs() -> None:
    seen: set[object] = set()
    for choice in cover(random.Random(0)):
        values = [(name, AXES[name].index(choice[name])) for name in AXES]
        seen |= set(itertools.combinations(values, 2))
    small = {"h_q": 1, "queries": 1, "batch": 1}
    for (a, xs), (b, ys) in itertools.combinations(AXES.items(), 2):
        for (i, x), (j, y) in itertools.product(enumerate(xs), enumerate(ys)):
            assert ((a, i), (b, j)) in seen or not possible(small | {a: x, b: y}), (
                f"{a}={x} {b}={y}"
            )


def test_cases_are_distinct() -> None:
    assert len({repr(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("number", range(12))
def test_sanitized_cases_of_a_row_cover_every_pair(number: int) -> None:
    seen: set[object] = set()
    for case, workers in sanitized.cases(GPU_ROWS[0], number):
        values = (case.seq_lens, case.page_size, case.causal, case.ragged, case.dtype, workers)
        seen |= set(itertools.combinations(enumerate(values), 2))
    assert len(seen) == math.comb(6, 2) * 4


@pytest.mark.parametrize("row", GPU_ROWS, ids=lambda row: row.name)
def test_sanitized_cases_are_split_where_they_say(row: Variant) -> None:
    for number in range(12):
        for case, workers in sanitized.cases(row, number):
            split = case.seq_lens == sanitized.SPLIT
            assert sanitized.is_split(case, row, workers) == split, f"{case}, {workers} workers"


@pytest.mark.parametrize("shape", SHAPES)
def test_sanitized_requests_overlap_too_far(shape: Shape) -> None:
    with pytest.raises(ValueError, match="too many pieces"):
        host_schedule(sanitized.OVERLAPPING, shape, sanitized.OVERLAPPING_WORKERS)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("page_size", [1, 16, 48])
def test_all_but_the_tokens_is_poison(page_size: int, strided: bool) -> None:
    case = Case((50, 0, 48, 1), q_lens=2, page_size=page_size, strided=strided)
    inputs = make_problem(case, "cpu")
    cache, table = inputs.kv_cache, inputs.block_table
    assert isinstance(cache, torch.Tensor)
    assert isinstance(inputs.q, torch.Tensor)
    assert torch.equal(inputs.q.flatten(0, 1), inputs.rows)
    assert gaps_hold(cache, NAN)
    assert gaps_hold(inputs.q, NAN)
    first = 0
    for pages, length in zip(table, case.seq_lens, strict=True):
        used = -(-length // page_size)
        assert not ((pages[used:] >= 0) & (pages[used:] < len(cache))).any()
        rows = cache[pages[:used].long()].flatten(0, 1)
        assert torch.equal(rows[:length], inputs.tokens[first : first + length])
        assert rows[length:].isnan().all()
        first += length
        cache[pages[:used].long()] = NAN
    assert cache.isnan().all(), "pages that no request has"


def test_other_lengths_of_the_same_problem() -> None:
    inputs = make_problem(Case((30, 20), q_lens=(2, 3)), "cpu")
    shorter = inputs.with_lengths((7, 20), (4, 0))
    assert inputs.seq_lens.tolist() == [7, 20]
    assert shorter.cu_seqlens_q is not None
    assert shorter.cu_seqlens_q.tolist() == [0, 4, 4]
    assert torch.equal(shorter.tokens, torch.cat([inputs.tokens[:7], inputs.tokens[30:]]))
    assert shorter.rows.shape[0] == 4
