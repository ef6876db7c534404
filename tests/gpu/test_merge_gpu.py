"""merge_states on a GPU: numerics, strides, in place, graphs, large offsets, halves of a decode."""

from __future__ import annotations

import mla
import pytest
import torch
from cases import Case, gaps_hold, make_problem, poisoned
from compare import check, reference
from merging import DTYPES, INF, NAN, States, check_merged, expected, make_states
from mla.variants import Variant
from running import assert_same_bits, one_of_each
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@each_dtype
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(
    ("rows", "d"),
    [
        ((1, 1), 8),
        ((5, 3), 24),
        ((300,), 64),
        ((7, 2, 9), 512),
        ((3, 4, 2, 5), 576),
        ((2, 129), 2056),
        ((3, 5), 4096),
        ((128, 2, 128), 512),
        ((0, 16), 512),
    ],
    ids=str,
)
def test_matches_the_reference(
    rows: tuple[int, ...], d: int, strided: bool, dtype: torch.dtype, device: torch.device
) -> None:
    if strided and len(rows) > 3:
        rows = (rows[0] * rows[1], *rows[2:])  # padded dimensions do not fold
    states = make_states(rows, d, dtype, device, strided=strided)
    out = poisoned((*rows, d), dtype, device, strided=strided, poison=NAN)
    lse = poisoned(rows, torch.float32, device, strided=strided, poison=NAN)
    result = mla.merge_states(*states.all(), out=out, lse=lse)
    check_merged(result, expected(states), dtype)
    assert gaps_hold(out, NAN)
    assert gaps_hold(lse, NAN)
    on_cpu = States(*(t.cpu() for t in states.all()))
    cpu_out, cpu_lse = mla.merge_states(*on_cpu.all())
    assert torch.equal(cpu_lse.isinf(), lse.cpu().isinf())
    torch.testing.assert_close(cpu_out, out.cpu())


@each_dtype
@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_rows_that_are_not_aligned(shift: int, dtype: torch.dtype, device: torch.device) -> None:
    """Rows of 72 elements, `shift` elements apart from where 16-byte pieces would begin."""
    states = make_states((9, 5), 64, dtype, device)

    def move(o: Tensor) -> Tensor:
        memory = torch.full((9 * 5 * (72 + shift) + shift,), NAN, dtype=dtype, device=device)
        step = 72 + shift
        return memory.as_strided(o.shape, (5 * step, step, 1), shift).copy_(o)

    moved = States(move(states.o_a), states.lse_a, move(states.o_b), states.lse_b)
    want = mla.merge_states(*states.all())
    out = move(torch.zeros_like(states.o_a))
    assert_same_bits(mla.merge_states(*moved.all(), out=out), want)
    assert gaps_hold(out, NAN)
    assert_same_bits(mla.merge_states(*moved.all()), want)


@each_dtype
def test_an_empty_state_changes_nothing(dtype: torch.dtype, device: torch.device) -> None:
    states = make_states((70, 16), 512, dtype, device, extremes=False)
    want = (states.o_a, states.lse_a)
    hollow = torch.full_like(states.o_a, NAN)
    for nothing in (INF, -INF):
        empty = torch.full_like(states.lse_a, nothing)
        assert_same_bits(mla.merge_states(*want, hollow, empty), want)
        assert_same_bits(mla.merge_states(hollow, empty, *want), want)
        out, lse = mla.merge_states(hollow, empty, hollow, -empty)
        assert not out.any()
        assert (lse == -INF).all()


def test_nan_is_not_hidden(device: torch.device) -> None:
    o, lse = torch.ones(4, 3, 8, device=device), torch.zeros(4, 3, device=device)
    bad = lse.clone()
    bad[0, 0] = NAN
    for states in ((o, lse, o, bad), (o, bad, o, lse)):
        out, merged = mla.merge_states(*states)
        assert out[0, 0].isnan().all()
        assert merged[0, 0].isnan()
        assert int(out.isnan().sum()) == 8


@each_dtype
@pytest.mark.parametrize("over", ["a", "b"])
@pytest.mark.parametrize("d", [8, 512, 4096])
def test_in_place(d: int, over: str, dtype: torch.dtype, device: torch.device) -> None:
    """Many times, as a race would not show each time."""
    states = make_states((400, 16), d, dtype, device)
    want = mla.merge_states(*states.all())
    for _ in range(20):
        fresh = States(*(t.clone() for t in states.all()))
        o, lse = getattr(fresh, f"o_{over}"), getattr(fresh, f"lse_{over}")
        mla.merge_states(*fresh.all(), out=o, lse=lse)
        assert_same_bits((o, lse), want)


def test_does_not_wait_and_replays(device: torch.device) -> None:
    states = make_states((64, 16), 512, torch.bfloat16, device)
    mla.merge_states(*states.all())
    torch.cuda.set_sync_debug_mode("error")
    try:
        mla.merge_states(*states.all())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = mla.merge_states(*states.all())
    for seed in (1, 2, 3):
        other = make_states((64, 16), 512, torch.bfloat16, device, seed=seed)
        for mine, new in zip(states.all(), other.all(), strict=True):
            mine.copy_(new)
        graph.replay()
        check_merged(result, expected(other), torch.bfloat16)


def test_follows_a_side_stream(device: torch.device) -> None:
    states = make_states((64, 16), 512, torch.bfloat16, device)
    want = mla.merge_states(*states.all())
    late = states.lse_a.clone()
    states.lse_a.fill_(NAN)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        states.lse_a.copy_(late)
        result = mla.merge_states(*states.all())
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(result, want)


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Rows so far apart that their element offsets need 64 bits."""
    rows, d, apart = 5, 64, (1 << 30) + 8
    if torch.cuda.mem_get_info(device)[0] < 2 * rows * apart + (2 << 30):
        pytest.skip("needs 13 GB of free GPU memory")
    states = make_states((rows, 1), d, torch.bfloat16, device)
    memory = torch.zeros(rows * apart, dtype=torch.bfloat16, device=device)
    views = [memory[i * 64 :].as_strided((rows, 1, d), (apart, d, 1)) for i in range(3)]
    views[0].copy_(states.o_a)
    views[1].copy_(states.o_b)
    want = mla.merge_states(*states.all())
    out, lse = mla.merge_states(views[0], states.lse_a, views[1], states.lse_b, out=views[2])
    assert_same_bits((out.clone(), lse), want)
    assert torch.equal(views[0].nan_to_num(0), states.o_a.nan_to_num(0))


@one_of_each
def test_two_halves_of_a_decode(row: Variant, device: torch.device) -> None:
    """Pages 0 to 15 of each request, then the rest; several requests have nothing there."""
    case = Case(
        (3000, 1024, 1025, 40, 0, 2000), q_lens=2, h_q=16, d_qk=row.d_qk, causal=False, given=False
    )
    inputs = make_problem(case, device)
    call, cut = inputs.kwargs(), 1024
    first = call | {"seq_lens": inputs.seq_lens.clamp(max=cut)}
    rest = call | {
        "seq_lens": (inputs.seq_lens - cut).clamp(min=0),
        "block_table": inputs.block_table[:, cut // case.page_size :],
    }
    parts = [mla.decode(**part, return_lse=True, variant=row.name) for part in (first, rest)]
    merged = mla.merge_states(*parts[0], *parts[1], out=parts[0][0], lse=parts[0][1])
    (out, lse), (want, want_lse) = merged, reference(inputs)
    check((torch.zeros_like(out), lse), (torch.zeros_like(want), want_lse), case.scale)
    # Each half is rounded to 16 bits before, so by one rounding more than the whole.
    error = (out.double() - want).abs()
    assert (error <= 8e-4 + 2 * 2.01 / 128 * want.abs()).all()
    whole = mla.decode(**call, variant=row.name)
    torch.testing.assert_close(out, whole, atol=1e-3, rtol=2e-2)
