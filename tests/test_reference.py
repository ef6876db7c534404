"""The float64 reference: absorbed and un-absorbed attention are the same function."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, make_problem
from covering import CASES
from mla.reference import attend, attend_expanded, decode, errors
from torch import Tensor


def layer(s_q: int, length: int, heads: int = 3) -> dict[str, Tensor]:
    """Queries, cache rows and weights of a small model: 5 + 4 columns a head, 16 latent ones."""
    generator = torch.Generator().manual_seed(s_q * 1000 + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    return {
        "q_nope": normal(s_q, heads, 5),
        "q_rope": normal(s_q, heads, 4),
        "latent": normal(length, 16),
        "rope": normal(length, 4),
        "w_uk": normal(heads, 5, 16),
        "w_uv": normal(heads, 6, 16),
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("s_q", "length"), [(1, 1), (1, 50), (4, 50), (5, 3), (2, 0), (0, 9)])
def test_absorbed_and_expanded_agree(s_q: int, length: int, causal: bool) -> None:
    x = layer(s_q, length)
    expanded, expanded_lse = attend_expanded(**x, scale=0.3, causal=causal)
    absorbed = torch.einsum("thd,hdc->thc", x["q_nope"], x["w_uk"])
    rows = torch.cat((x["latent"], x["rope"]), -1)
    q = torch.cat((absorbed, x["q_rope"]), -1)
    o, lse = attend(q, rows, 16, scale=0.3, causal=causal)
    out = torch.einsum("thc,hvc->thv", o, x["w_uv"])
    assert out.shape == expanded.shape == (s_q, 3, 6)
    torch.testing.assert_close(out, expanded, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expanded_lse, rtol=1e-12, atol=1e-12)


def test_by_hand() -> None:
    """One head, two KV tokens whose logits are 0 and ln 3, so that they weigh 1/4 and 3/4."""
    kv = torch.tensor([[1.0, 0.0, 0.0], [5.0, 8.0, 1.0]])
    q = torch.tensor([[[0.0, 0.0, math.log(3) / 2]]])
    out, lse = attend(q, kv, 2, scale=2.0)
    torch.testing.assert_close(out, torch.tensor([[[4.0, 6.0]]], dtype=torch.float64))
    torch.testing.assert_close(lse, torch.tensor([[math.log(4)]], dtype=torch.float64))


def test_causal_is_aligned_to_the_end() -> None:
    """Of three query tokens over two KV tokens, the first sees none, the last both."""
    kv = torch.eye(2, 2)
    out, lse = attend(torch.zeros(3, 1, 2), kv, 2, scale=1.0)
    assert out[:, 0].tolist() == [[0, 0], [1, 0], [0.5, 0.5]]
    assert lse[:, 0].tolist() == [-math.inf, 0, pytest.approx(math.log(2))]


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if len(c.seq_lens) < 10 and sum(c.seq_lens) * max(c.query_lens) < 5000],
    ids=str,
)
def test_the_paged_call_finds_every_token(case: Case) -> None:
    inputs = make_problem(case, "cpu")
    out, lse = decode(**inputs.kwargs())  # type: ignore[arg-type]
    assert out.shape == (*case.row_shape, case.d_v)
    got = zip(
        out.flatten(0, -3).split(case.query_lens),
        lse.flatten(0, -2).split(case.query_lens),
        inputs.split(),
        strict=True,
    )
    for request_out, request_lse, (q, kv) in got:
        want, want_lse = attend(q, kv, case.d_v, scale=case.scale, causal=case.causal)
        torch.testing.assert_close(request_out, want)
        torch.testing.assert_close(request_lse, want_lse)


class TestErrors:
    def test_equal(self) -> None:
        x = torch.randn(7, 3)
        assert errors(x, x.double()) == (0, 0, 0, 0, 0)
        assert errors(torch.zeros(3), torch.zeros(3)) == (0, 0, 0, 0, 0)
        assert errors(torch.empty(0), torch.empty(0)) == (0, 0, 0, 0, 0)

    def test_by_hand(self) -> None:
        got = errors(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
        assert got.cosine_distance == pytest.approx(1 - 9 / 15)
        assert got.relative_rmse == pytest.approx(4 / 5)
        assert got.wmape == pytest.approx(4 / 7)
        assert got.mse == 8
        assert got.max_abs == 4

    def test_cosine_is_blind_to_scale_and_the_others_are_not(self) -> None:
        x = torch.randn(100, generator=torch.Generator().manual_seed(0))
        got = errors(2 * x, x)
        assert got.cosine_distance == pytest.approx(0, abs=1e-12)
        assert got.relative_rmse == pytest.approx(1)
        assert got.wmape == pytest.approx(1)

    def test_nan_is_never_small(self) -> None:
        got = errors(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]))
        assert all(math.isnan(error) for error in got)
