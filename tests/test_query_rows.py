"""Rotated queries: the bits of `rotate`, in rows that un-absorbed attention takes as they are."""

from __future__ import annotations

import importlib
from typing import Any

import mla
import pytest
import torch
from mla import _mla, expanded, launch, query_rows
from mla.device import by_name
from mla.prefill_inputs import NewTokens
from mla.query_rows import rotated
from mla.rope import Rotary, Yarn, rotate
from prefilling import Case, make_prefill


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "heads"), [(5, 16), (40, 3), (1, 1), (0, 4)])
def test_rotated_and_in_order(
    tokens: int, heads: int, dtype: torch.dtype, interleaved: bool
) -> None:
    q = torch.randn(tokens, heads, 24 + 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.arange(tokens) * 7 % 50
    angles = Rotary(yarn=Yarn(40, 4096)).table(32, 50)[positions]
    before = q.clone()
    rest, rope = rotated(q, angles, interleaved=interleaved)
    assert torch.equal(q, before)
    assert torch.equal(rest, q[..., :24])
    wanted = rotate(q[..., 24:], angles[:, None], interleaved=interleaved)
    assert torch.equal(rope, wanted)
    assert rest.data_ptr() == rope.data_ptr() + (32 * dtype.itemsize if tokens else 0)
    assert rest.stride() == rope.stride()


def test_such_rows_are_not_copied() -> None:
    """Others are, into rows like these, with the same results."""
    case = Case((60, 70), 20)
    problem = make_prefill(case)
    q_nope, q_rope = problem.kwargs["q"]
    rows = torch.cat((q_rope, q_nope), -1)
    r = q_rope.shape[-1]
    pair = rows[..., r:], rows[..., :r]
    given = [problem.kwargs[name] for name in ("kv_cache", "block_table", "seq_lens")]
    results = []
    for q, is_view in ((pair, True), ((q_nope, q_rope), False)):
        new = NewTokens.of(q, *given, None, problem.kwargs["w_kv_b"])
        assert new.q_rope is not None
        assert expanded.is_behind(new.q_nope, new.q_rope) == is_view
        results.append(mla.prefill(**problem.kwargs | {"q": q}, method="expanded").out)
    assert torch.equal(*results)


def test_rows_of_two_tensors_are_not_one() -> None:
    """However they lie."""
    apart = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)
    assert not expanded.is_behind(*apart)
    both = torch.zeros(2, 3, 20)
    assert not expanded.is_behind(both[..., 8:16], both[..., :4])
    assert expanded.is_behind(both[..., 8:16], both[..., :8])


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("tokens", "heads"), [(5, 16), (40, 3)])
def test_the_kernel_is_told_what_append_would_tell_it(
    tokens: int, heads: int, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads as requests with a page each, in which a token's place is its number."""
    launches: list[list[Any]] = []
    for module in (query_rows, importlib.import_module("mla.append")):
        monkeypatch.setattr(module, "facts", lambda device: by_name("H200"))
    monkeypatch.setattr(launch, "stream_of", lambda device: 77)
    monkeypatch.setattr(_mla, "launch_append", lambda *told: launches.append(list(told)))
    q = torch.randn(tokens, heads, 24 + 32).bfloat16()
    angles = torch.randn(tokens, 32)
    rest, rope = rotated(q, angles, interleaved=interleaved)
    order = torch.arange(max(tokens, heads), dtype=torch.int32)
    mla.append(
        q[..., :24].transpose(0, 1),
        q[..., 24:].transpose(0, 1),
        (rest.transpose(0, 1), rope.transpose(0, 1)),
        order[:heads, None],
        order[:tokens].expand(heads, tokens),
        cos_sin=angles,
        interleaved=interleaved,
    )
    mine, wanted = launches
    assert mine[1][4] == mine[1][5]
    mine[1][4:6] = wanted[1][4:6] = [order.data_ptr()] * 2
    assert mine == wanted


@pytest.mark.parametrize(("tokens", "columns"), [(0, 24), (3, 20)])
def test_the_kernel_is_not_asked_for_what_it_lacks(
    tokens: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rows, or such that do not start at multiples of 16 bytes."""
    monkeypatch.setattr(query_rows, "facts", lambda device: by_name("H200"))
    q, angles = torch.randn(tokens, 4, columns + 32).half(), torch.randn(tokens, 32)
    rest, rope = rotated(q, angles, interleaved=True)
    assert torch.equal(rest, q[..., :columns])
    assert torch.equal(rope, rotate(q[..., columns:], angles[:, None], interleaved=True))
