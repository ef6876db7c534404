"""With batch_invariant=True a request's bits depend on nothing but the request."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import assert_same, batch_of, by_request, run_each
from cases import Case, Inputs, make_problem
from compare import check, reference
from device_plan import OVERLAPPING, Batch, host_schedule
from mla.device import resolve
from mla.variants import Variant
from running import assert_same_bits, clone, one_of_each, plan_for, run

# Around tiles, pairs of tiles and parts; empty; of one part and of many.
LENGTHS = (4000, 1, 0, 1024, 1025, 130, 9000, 64, 65, 2500, 700, 12345)
GUARD_BYTES, GUARD_BYTE = 1 << 16, 0xA5


def problem(row: Variant, device: torch.device, **changes: Any) -> Inputs:
    options: dict[str, Any] = {"seq_lens": LENGTHS, "q_lens": (1,) * len(LENGTHS)}
    return make_problem(Case(**(options | {"d_qk": row.d_qk} | changes)), device)


def alone(whole: Inputs, row: Variant) -> list[Any]:
    """What each request gets by itself."""
    found = []
    for i in range(len(whole.case.seq_lens)):
        (result,) = run_each(batch_of(whole, [i]), variant=row.name)
        found.append(clone(result))
    return found


def orders(b: int) -> list[list[int]]:
    """Batches of some of b requests: all, backward, a few, and many times over in any order."""
    rng = random.Random(0)
    return [
        list(range(b)),
        list(reversed(range(b))),
        [b - 1, 0],
        [0] * 40 + [b - 1],
        [rng.randrange(b) for _ in range(100)],
        [i for i in rng.choices(range(b), k=300) if i != b - 1],
    ]


@pytest.mark.parametrize(("h_q", "dtype"), [(16, "bfloat16"), (16, "float16"), (128, "bfloat16")])
def test_any_batch_and_any_place(
    row: Variant, h_q: int, dtype: str, device: torch.device, launches: list[str]
) -> None:
    whole = problem(row, device, h_q=h_q, dtype=dtype)
    want = alone(whole, row)
    for order in orders(len(LENGTHS)):
        got = run_each(batch_of(whole, order), variant=row.name)
        assert_same(got, order, want)
    assert set(launches) == {row.name}


def test_uniform_and_ragged_queries(row: Variant, device: torch.device) -> None:
    for q_len in (1, 3):
        whole = problem(row, device, q_lens=(q_len,) * len(LENGTHS), h_q=40)
        want = alone(whole, row)
        order = list(range(len(LENGTHS)))
        assert_same(run_each(batch_of(whole, order, ragged=False), variant=row.name), order, want)
        assert_same(run_each(batch_of(whole, [3], ragged=False), variant=row.name), [3], want)


def test_ragged_neighbours(row: Variant, device: torch.device) -> None:
    """Requests of few and of many query tokens, and of none, so that groups have other sizes."""
    q_lens = (8, 1, 2, 1, 20, 0, 3, 8, 1, 8, 5, 8)
    whole = problem(row, device, q_lens=q_lens)
    want = alone(whole, row)
    sizes = set()
    for order in (
        list(range(len(q_lens))),
        [0, 9, 11, 0, 9, 11],
        [0, 9, 11, *[1, 3, 8] * 40],
        [3, 8] * 70 + [11],
    ):
        inputs = batch_of(whole, order)
        assert_same(run_each(inputs, variant=row.name), order, want)
        batch = Batch(inputs.case.seq_lens, inputs.case.query_lens, inputs.case.h_q)
        shape = (row.block_rows, row.block_n, row.merges_pairs)
        sizes.add(host_schedule(batch, shape, resolve(device).sm_count, True)["group_size"])
    assert len(sizes) > 1, "workers were grouped alike in all batches"


@pytest.mark.parametrize("page_size", [256, 32, 16, 8, 1])
def test_page_sizes(row: Variant, page_size: int, device: torch.device) -> None:
    """Other pages elsewhere, and block tables of another width."""
    whole = problem(row, device)
    order = list(range(len(LENGTHS)))
    want = [clone(result) for result in run_each(whole, variant=row.name)]
    for some in (order, [0, 5, 6]):
        got = run_each(batch_of(whole, some, page_size=page_size), variant=row.name)
        assert_same(got, some, want)


def test_reruns_plans_and_workspaces(row: Variant, device: torch.device) -> None:
    """And not a byte outside the workspace that decode asks for."""
    whole = problem(row, device, h_q=128)
    want = clone(run(whole, variant=row.name, batch_invariant=True))
    plans = [
        plan_for(whole, variant=row.name, batch_invariant=True, max_pages=pages)
        for pages in (None, whole.block_table.shape[1])
    ]
    for plan in (None, *plans):
        options: dict[str, Any] = {"variant": row.name, "batch_invariant": True, "plan": plan}
        with pytest.raises(ValueError, match=r"workspace: got 0 bytes, expected at least") as error:
            run(whole, workspace=torch.empty(0, dtype=torch.uint8, device=device), **options)
        size = int(str(error.value).split()[-1])
        memory = torch.full((size + 2 * GUARD_BYTES,), GUARD_BYTE, dtype=torch.uint8, device=device)
        for _ in range(3):
            workspace = memory[GUARD_BYTES : GUARD_BYTES + size]
            assert_same_bits(run(whole, workspace=workspace, **options), want)
        assert (memory[:GUARD_BYTES] == GUARD_BYTE).all()
        assert (memory[GUARD_BYTES + size :] == GUARD_BYTE).all()


@pytest.mark.parametrize("planned", [False, True], ids=["no plan", "plan"])
def test_graph_replay(row: Variant, planned: bool, device: torch.device) -> None:
    """Captured among some lengths, replayed among others: what a request has alone."""
    most = (5000, 3000, 9000, 1200, 64, 2000)
    whole = make_problem(Case(most, d_qk=row.d_qk, h_q=32, given=False), device)
    inputs = whole.with_lengths((1, 3000, 0, 7, 64, 0))
    plan = plan_for(inputs, variant=row.name, batch_invariant=True) if planned else None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if plan is not None:
            plan.update(inputs.seq_lens)
        result = run(inputs, variant=row.name, batch_invariant=True, plan=plan)
    for lengths in (
        (5000, 3000, 9000, 1200, 64, 2000),
        (0, 3000, 0, 0, 64, 0),
        (4999, 3000, 1, 1025, 64, 1999),
        (100, 3000, 100, 100, 64, 100),
    ):
        step = whole.with_lengths(lengths)
        for tensor in result:
            assert tensor is not None
            tensor.fill_(float("nan"))
        graph.replay()
        check(result, reference(step))
        ragged = replace(step, case=replace(step.case, q_lens=(1,) * len(most)))
        got = by_request(step, clone(result))
        assert_same(got, range(len(most)), alone(ragged, row))


@pytest.mark.parametrize("h_q", [5, 128])
@pytest.mark.parametrize("q_lens", [1, 4, (3, 0, 1, 7, 2)], ids=["one", "four", "ragged"])
def test_numerics(
    row: Variant, h_q: int, q_lens: int | tuple[int, ...], device: torch.device
) -> None:
    for dtype in row.dtypes:
        case = Case((6000, 33, 1100, 0, 3), q_lens, h_q, row.d_qk, dtype, page_size=16)
        inputs = make_problem(case, device)
        check(run(inputs, variant=row.name, batch_invariant=True), reference(inputs), case.scale)


def test_a_long_request_and_many_short_ones(row: Variant, device: torch.device) -> None:
    whole = problem(row, device, seq_lens=(200_000, 3), q_lens=(1, 1))
    want = alone(whole, row)
    order = [1] * 100 + [0] + [1] * 99
    inputs = batch_of(whole, order)
    result = run(inputs, variant=row.name, batch_invariant=True)
    assert_same(by_request(inputs, result), order, want)
    check(result, reference(inputs))


@pytest.mark.parametrize("h_q", [16, 64, 128])
def test_the_choice_does_not_follow_the_batch(
    h_q: int, device: torch.device, launches: list[str]
) -> None:
    """Without a forced variant: neither the sizes of the batch nor its pages decide."""
    whole = make_problem(Case(LENGTHS, q_lens=(1,) * len(LENGTHS), h_q=h_q), device)
    want = [clone(result) for result in run_each(whole)]
    for order in orders(len(LENGTHS)):
        for page_size in (64, 1):
            inputs = batch_of(whole, order, page_size=page_size)
            assert_same(run_each(inputs), order, want)
    assert len(set(launches)) == 1


@one_of_each
@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping_requests_are_harmless(row: Variant, name: str, device: torch.device) -> None:
    """Their results are undefined; nothing outside the workspace and the outputs is written."""
    batch = OVERLAPPING[name]
    assert not isinstance(batch.q_lens, int)
    case = Case(tuple(n + 3000 for n in batch.seq_lens), tuple(batch.q_lens), batch.h_q, row.d_qk)
    inputs = make_problem(replace(case, strided=True), device)
    cuts = torch.tensor(batch.cu_seqlens_q, dtype=torch.int32, device=device)
    wrong = replace(inputs, cu_seqlens_q=cuts)
    options: dict[str, Any] = {"variant": row.name, "batch_invariant": True}
    with pytest.raises(ValueError, match="workspace") as error:
        run(wrong, workspace=torch.empty(0, dtype=torch.uint8, device=device), **options)
    size = int(str(error.value).split()[-1])
    memory = torch.full((size + 2 * GUARD_BYTES,), GUARD_BYTE, dtype=torch.uint8, device=device)
    run(wrong, workspace=memory[GUARD_BYTES : GUARD_BYTES + size], **options)
    torch.cuda.synchronize()
    assert (memory[:GUARD_BYTES] == GUARD_BYTE).all()
    assert (memory[GUARD_BYTES + size :] == GUARD_BYTE).all()
    check(run(inputs, **options), reference(inputs))  # the device is as it was
