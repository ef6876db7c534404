"""merge_states on a CPU against float64, its arguments, and what its launch asks of the driver."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import Any

import mla
import pytest
import torch
from cases import Case, gaps_hold, make_problem, poisoned
from compare import check, reference
from fake_driver import MERGED, MergeParams
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from merging import DTYPES, INF, NAN, check_merged, expected, make_states
from mla import _mla, merge
from mla.device import by_name
from running import assert_same_bits


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    d=st.integers(1, 9).map(lambda n: 8 * n),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    given_outputs=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_matches_the_reference(
    rows: list[int], d: int, dtype: torch.dtype, strided: bool, given_outputs: bool, seed: int
) -> None:
    states = make_states(rows, d, dtype, strided=strided, seed=seed)
    outputs: dict[str, Any] = {}
    if given_outputs:
        outputs["out"] = poisoned((*rows, d), dtype, "cpu", strided=strided, poison=NAN)
        outputs["lse"] = poisoned(rows, torch.float32, "cpu", strided=strided, poison=NAN)
    result = mla.merge_states(*states.all(), **outputs)
    check_merged(result, expected(states), dtype)
    if given_outputs:
        for got, view in zip(result, outputs.values(), strict=True):
            assert got is view
            assert gaps_hold(view, NAN)


def test_an_empty_state_changes_nothing() -> None:
    """Of either sign, on either side, whatever its o holds: the same bits."""
    states = make_states((7, 5), 64, torch.bfloat16, extremes=False)
    for nothing in (INF, -INF):
        empty = torch.full_like(states.lse_a, nothing)
        hollow = torch.full_like(states.o_a, NAN)
        want = (states.o_a, states.lse_a)
        assert_same_bits(mla.merge_states(*want, hollow, empty), want)
        assert_same_bits(mla.merge_states(hollow, empty, *want), want)
        out, lse = mla.merge_states(hollow, empty, hollow, -empty)
        assert not out.any()
        assert (lse == -INF).all()


def test_order_does_not_matter() -> None:
    o_a, lse_a, o_b, lse_b = make_states((9, 4), 32, torch.float32).all()
    assert_same_bits(
        mla.merge_states(o_a, lse_a, o_b, lse_b), mla.merge_states(o_b, lse_b, o_a, lse_a)
    )


def test_nan_is_not_hidden() -> None:
    o, lse = torch.ones(2, 3, 8), torch.zeros(2, 3)
    bad = lse.clone()
    bad[0, 0] = NAN
    out, merged = mla.merge_states(o, lse, o, bad)
    assert out[0, 0].isnan().all()
    assert merged[0, 0].isnan()
    assert int(out.isnan().sum()) == 8


def test_two_halves_of_a_decode() -> None:
    """Pages 0 and 1 of each request, then the rest."""
    case = Case((300, 40, 128, 129, 0), q_lens=2, h_q=6, causal=False)
    inputs = make_problem(case, "cpu")
    call = inputs.kwargs()
    lens = inputs.seq_lens
    first = call | {"seq_lens": lens.clamp(max=128)}
    rest = call | {
        "seq_lens": (lens - 128).clamp(min=0),
        "block_table": inputs.block_table[:, 2:],
    }
    parts = [mla.decode(**part, return_lse=True) for part in (first, rest)]
    check(mla.merge_states(*parts[0], *parts[1]), reference(inputs), case.scale)


class TestInPlace:
    """Results over inputs, as engines do that gather parts one by one."""

    @pytest.mark.parametrize("over", ["a", "b"])
    @pytest.mark.parametrize("strided", [False, True])
    def test_exactly(self, over: str, strided: bool) -> None:
        states = make_states((5, 6), 40, torch.float16, strided=strided)
        want = expected(states)
        o, lse = getattr(states, f"o_{over}"), getattr(states, f"lse_{over}")
        result = mla.merge_states(*states.all(), out=o.view(o.shape), lse=lse[:])
        check_merged((o, lse), want, o.dtype)
        assert result[0].data_ptr() == o.data_ptr()

    def test_size_one_makes_any_stride_the_same(self) -> None:
        states = make_states((1, 6), 8, torch.float32)
        out = states.o_a.as_strided((1, 6, 8), (7, 8, 1))
        want = expected(states)
        check_merged(mla.merge_states(*states.all(), out=out), want, torch.float32)

    def test_inputs_may_overlap(self) -> None:
        o, lse = torch.randn(1, 4, 8).expand(3, 4, 8), torch.zeros(1, 4).expand(3, 4)
        out, merged = mla.merge_states(o, lse, o, lse)
        torch.testing.assert_close(out, o.contiguous())
        torch.testing.assert_close(merged, torch.full((3, 4), math.log(2)))

    def test_partly_is_refused(self) -> None:
        o, lse = torch.zeros(9, 4, 8), torch.zeros(9, 4)
        states = (o[:4], lse[:4], torch.zeros(4, 4, 8), torch.zeros(4, 4))
        with pytest.raises(ValueError, match=r"^out: overlaps o_a in memory"):
            mla.merge_states(*states, out=o[1:5])
        with pytest.raises(ValueError, match=r"^lse: overlaps lse_a in memory"):
            mla.merge_states(*states, lse=lse[3:7])
        with pytest.raises(ValueError, match=r"^out: overlaps o_a in memory"):
            mla.merge_states(*states, out=o[:4].transpose(0, 1))
        with pytest.raises(ValueError, match=r"^out: overlaps o_b in memory"):
            mla.merge_states(o[:4], lse[:4], o[2:6], states[3], out=o[:4])

    def test_outputs_over_other_things(self) -> None:
        o, lse = torch.zeros(4, 2, 8), torch.zeros(4, 2)
        memory = torch.zeros(4, 2, 8)
        inside = memory.view(-1)[:8].view(4, 2)
        with pytest.raises(
            ValueError, match=r"^out: overlaps lse_b in memory.*or o_a or o_b itself"
        ):
            mla.merge_states(o, lse, o, inside, out=memory)
        with pytest.raises(
            ValueError, match=r"^lse: overlaps o_b in memory.*lse_a or lse_b itself"
        ):
            mla.merge_states(o, lse, memory, lse, lse=inside)
        with pytest.raises(ValueError, match=r"^out: overlaps lse in memory"):
            mla.merge_states(o, lse, o, lse, out=memory, lse=inside)
        with pytest.raises(ValueError, match=r"^out: got strides .*elements that do not overlap"):
            mla.merge_states(o, lse, o, lse, out=torch.zeros(1, 2, 8).expand(4, 2, 8))


def good() -> dict[str, Any]:
    states = make_states((4, 3), 16, torch.bfloat16)
    return dict(zip(("o_a", "lse_a", "o_b", "lse_b"), states.all(), strict=True))


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"o_a": None}, TypeError, "o_a: got NoneType, expected a torch.Tensor"),
        ({"lse_b": 1.0}, TypeError, "lse_b: got float"),
        ({"o_a": torch.zeros(4, 3, 16).double()}, TypeError, "o_a: got torch.float64, expected"),
        ({"o_b": torch.zeros(4, 3, 16)}, TypeError, "o_b: got torch.float32, expected torch.bf"),
        ({"lse_a": torch.zeros(4, 3).half()}, TypeError, "lse_a: got torch.float16, expected"),
        ({"o_a": torch.zeros(16, dtype=BF16)}, ValueError, r"o_a: got shape \[16\], expected \["),
        ({"o_a": torch.zeros(4, 3, 12, dtype=BF16)}, ValueError, "o_a: got d = 12, expected a pos"),
        ({"o_a": torch.zeros(4, 3, 0, dtype=BF16)}, ValueError, "o_a: got d = 0, expected"),
        ({"o_b": torch.zeros(4, 3, 24, dtype=BF16)}, ValueError, r"o_b: .*expected \[4, 3, 16\]"),
        ({"lse_a": torch.zeros(3, 4)}, ValueError, r"lse_a: got shape \[3, 4\], expected \[4, 3\]"),
        ({"lse_b": torch.zeros(4, 3, 1)}, ValueError, "lse_b: got shape"),
        ({"lse_b": torch.zeros(4, 3, device="meta")}, ValueError, "lse_b: got device meta"),
        (
            {"o_b": torch.zeros(4, 16, 3, dtype=BF16).transpose(1, 2)},
            ValueError,
            "o_b: got stride 3 in its last dimension, expected 1",
        ),
        (
            {"o_b": torch.zeros(4, 3, 16, dtype=BF16).requires_grad_()},
            ValueError,
            "o_b: requires grad, but mla has no backward",
        ),
        ({"out": torch.zeros(4, 3, 16)}, TypeError, "out: got torch.float32, expected torch.bf"),
        ({"out": torch.zeros(4, 3, 8, dtype=BF16)}, ValueError, "out: got shape"),
        ({"lse": torch.zeros(4, 3, dtype=BF16)}, TypeError, "lse: got torch.bfloat16, expected"),
        ({"lse": torch.zeros(4)}, ValueError, "lse: got shape"),
        ({"lse": 3}, TypeError, "lse: got int"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        mla.merge_states(**good() | changes)


def test_other_devices_are_unsupported() -> None:
    call = {name: tensor.to("meta") for name, tensor in good().items()}
    with pytest.raises(mla.UnsupportedError, match=r"^merge_states: got tensors on meta"):
        mla.merge_states(**call)


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
    strided=st.booleans(),
)
def test_folded_rows_are_where_they_were(
    rows: list[int], data: st.DataObject, strided: bool
) -> None:
    """Three dimensions lead to the same rows in the same order, in each of the tensors."""
    tensors = []
    for _ in range(3):
        order = data.draw(st.permutations(range(len(rows))))
        shape = [rows[i] for i in order]
        values = torch.arange(math.prod(rows) * 8.0).view(*shape, 8)
        placed = poisoned((*shape, 8), torch.float32, "cpu", strided=strided, poison=NAN)
        back = [order.index(i) for i in range(len(rows))]
        tensors.append(placed.copy_(values).permute(*back, len(rows)))
    strides = [t.stride()[: len(rows)] for t in tensors]
    try:
        sizes, folded = merge._fold(rows, strides)
    except ValueError:
        assume(len([n for n in rows if n > 1]) < 4)
        raise
    assert len(sizes) == 3
    for tensor, steps in zip(tensors, folded, strict=True):
        again = tensor.as_strided((*sizes, 8), (*steps, 1), tensor.storage_offset())
        assert torch.equal(again.reshape(tensor.shape), tensor)


@pytest.mark.parametrize(
    ("rows", "strides", "folded"),
    [
        ((2, 3, 4, 5), [(60, 20, 5, 1)], [1, 1, 120]),
        ((2, 3, 4, 5), [(60, 20, 5, 1), (80, 20, 5, 1)], [1, 2, 60]),
        ((2, 3, 4, 5), [(60, 20, 5, 1), (0, 0, 5, 1)], [1, 6, 20]),
        ((2, 1, 4, 5), [(60, 7, 5, 1), (20, 9, 5, 1)], [1, 2, 20]),
        ((1, 1), [(3, 3)], [1, 1, 1]),
        ((4, 3, 2), [(6, 2, 1), (6, 1, 3)], [4, 3, 2]),
    ],
)
def test_dense_dimensions_fold(
    rows: tuple[int, ...], strides: list[tuple[int, ...]], folded: list[int]
) -> None:
    assert merge._fold(rows, strides)[0] == folded


class TestLaunch:
    """CPU tensors that pass for those of a GPU; what the extension is asked is recorded."""

    @pytest.fixture
    def launches(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        recorded: list[tuple[Any, ...]] = []
        monkeypatch.setattr(merge, "facts", lambda device: by_name("A100"))
        monkeypatch.setattr(merge.launch, "stream_of", lambda device: 77)
        monkeypatch.setattr(_mla, "launch_merge", lambda *arguments: recorded.append(arguments))
        return recorded

    @pytest.mark.parametrize(("dtype", "name"), list(merge.DTYPES.items()))
    def test_is_one(self, launches: list[tuple[Any, ...]], dtype: torch.dtype, name: str) -> None:
        states = make_states((4, 2, 3), 16, dtype)
        lse = torch.empty(4, 3, 2).transpose(1, 2)
        out, merged = mla.merge_states(*states.all(), lse=lse)
        assert merged is lse
        tensors = (states.o_a, states.o_b, out, states.lse_a, states.lse_b, lse)
        rows = [[96, 48, 16], [96, 48, 16], [96, 48, 16], [6, 3, 1], [6, 3, 1], [6, 1, 2]]
        addresses = [t.data_ptr() for t in tensors]
        assert launches == [(name, addresses, rows, [4, 2, 3], 16, None, 77)]

    def test_of_no_rows_is_none(self, launches: list[tuple[Any, ...]]) -> None:
        states = make_states((4, 0, 3), 16, torch.float32)
        out, lse = mla.merge_states(*states.all())
        assert (out.shape, lse.shape) == ((4, 0, 3, 16), (4, 0, 3))
        assert launches == []

    def test_needs_three_dimensions(self, launches: list[tuple[Any, ...]]) -> None:
        states = make_states((2, 2, 2, 2), 8, torch.float32)
        mixed = replace(states, lse_b=states.lse_b.permute(3, 1, 0, 2))
        with pytest.raises(ValueError, match=r"o_a: got rows \[2, 2, 2, 2\] .* into 4 dimensions"):
            mla.merge_states(*mixed.all())
        assert launches == []

    def test_old_gpus_are_unsupported(
        self, launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        turing = replace(by_name("A100"), name="T4", sm=75)  # type: ignore[type-var]
        monkeypatch.setattr(merge, "facts", lambda device: turing)
        with pytest.raises(mla.UnsupportedError, match=r"T4 .* compute capability 8.0 or later"):
            mla.merge_states(**good())


# Addresses in the order of MERGED, rows [2, 3, 5].
CALL = """
addresses = [0x1000 * (i + 1) for i in range(6)]
strides = [[1000 * (i + 1), 400, 8 * (i + 1)] for i in range(6)]
sizes, d, dtype = [2, 3, 5], 64, "bfloat16"
{change}
_mla.launch_merge(dtype, addresses, strides, sizes, d, 1, 0xabc)
"""


@pytest.mark.parametrize("capturing", [False, True])
def test_it_is_a_graph_unless_captured(run: Any, capturing: bool) -> None:
    knobs = {"FAKE_CUDA_CAPTURING": str(int(capturing))}
    (launch,) = run(CALL.format(change=""), **knobs).named("launch")
    assert (launch["graph"] > 0) != capturing


@pytest.mark.parametrize(
    ("dtype", "entry"), [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32")]
)
def test_what_the_driver_is_asked(run: Any, dtype: str, entry: str) -> None:
    done = run(CALL.format(change=f"dtype = {dtype!r}"))
    (launch,) = done.named("launch")
    assert launch["kernel"] == f"mla_merge_{entry}"
    assert (launch["block"], launch["smem"], launch["stream"], launch["device"]) == (
        256,
        0,
        0xABC,
        1,
    )
    (parameters,) = launch["parameters"]
    got = MergeParams.from_buffer_copy(bytes.fromhex(parameters))
    assert ctypes.sizeof(got) == len(parameters) // 2
    for i, name in enumerate(MERGED):
        assert getattr(got, name) == 0x1000 * (i + 1)
        steps = [getattr(got, f"{name}_{dim}") for dim in ("batch", "token", "head")]
        assert steps == [1000 * (i + 1), 400, 8 * (i + 1)]
    assert (got.num_rows, got.tokens, got.heads) == (30, 3, 5)
    assert (got.row_chunks, got.row_threads, got.rows_per_cta) == (8, 8, 32)
    for n in range(30):
        assert got.by_heads.divide(n) == n // 5
        assert got.by_tokens.divide(n) == n // 3
        assert got.by_row_threads.divide(n) == n // 8


@pytest.mark.parametrize(
    ("change", "aligned"),
    [
        ("", True),
        ("addresses[1] += 8", False),
        ("addresses[2] += 2", False),
        ("addresses[3] += 4", True),  # a log-sum-exp is one number
        ("strides[0][1] = 404", False),
        ("strides[4][1] = 404", True),
        ("sizes[2] = 1; strides[0][2] = 3", True),  # never stepped over
        ("dtype = 'float32'; strides[0][1] = 404", True),
        ("dtype = 'float32'; strides[0][1] = 402", False),
    ],
)
def test_16_bytes_at_a_time_where_rows_allow_it(run: Any, change: str, aligned: bool) -> None:
    (launch,) = run(CALL.format(change=change)).named("launch")
    assert launch["kernel"].endswith("_unaligned") != aligned


@pytest.mark.parametrize(
    ("rows", "d", "threads", "rows_per_cta", "grid"),
    [
        (1, 8, 1, 256, 1),
        (256, 8, 1, 256, 1),
        (257, 8, 1, 256, 2),
        (128 * 128, 512, 64, 4, 4096),
        (129, 512, 64, 4, 33),
        (30, 576, 72, 3, 10),
        (7, 2048, 256, 1, 7),
        (7, 4096, 256, 1, 7),
        (2**31 - 1, 2048, 256, 1, 2**31 - 1),
    ],
)
def test_the_grid_fits_the_work(
    run: Any, rows: int, d: int, threads: int, rows_per_cta: int, grid: int
) -> None:
    (launch,) = run(CALL.format(change=f"sizes, d = [1, 1, {rows}], {d}")).named("launch")
    got = MergeParams.from_buffer_copy(bytes.fromhex(launch["parameters"][0]))
    assert (got.row_threads, got.rows_per_cta) == (threads, rows_per_cta)
    assert got.row_chunks == d // 8
    assert launch["grid"] == grid


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("d = 12", "d must be a multiple of 8"),
        ("d = 0", "d must be a multiple of 8"),
        ("sizes[1] = 0", "rows must be 1 to 2^31 - 1"),
        ("sizes[1] = 2**31", "rows must be 1 to 2^31 - 1"),
        ("sizes = [2**20, 2**20, 2**30]", "rows must be 1 to 2^31 - 1"),
        ("dtype = 'float64'", "no kernel merges float64"),
    ],
)
def test_what_the_extension_refuses(run: Any, change: str, message: str) -> None:
    call = CALL.format(change=change).replace("_mla.launch_merge(", "    _mla.launch_merge(")
    call = call.replace(f"{change}\n", f"{change}\ntry:\n")
    done = run(f"{call}except (ValueError, IndexError) as error:\n    print(error)\n")
    assert done.printed == f"{message}\n"
    assert not done.named("launch")
