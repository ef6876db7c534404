"""Attention states to merge, on any device, and what `merge_states` must make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cases import poisoned
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAN, INF = float("nan"), float("inf")
# Of log-sum-exps: none of them may make a NaN, in any pair.
EXTREMES = (-INF, INF, -3e38, -1e4, -100.0, -0.0, 1e-30, 7.5, 88.0, 1e4, 3e38)
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}  # relative
TINY = {torch.bfloat16: 1e-38, torch.float16: 2**-24, torch.float32: 1e-38}  # below normal numbers


@dataclass
class States:
    o_a: Tensor
    lse_a: Tensor
    o_b: Tensor
    lse_b: Tensor

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.o_a, self.lse_a, self.o_b, self.lse_b


def make_states(
    rows: Sequence[int],
    d: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    strided: bool = False,
    extremes: bool = True,
    seed: int = 0,
) -> States:
    """o is randn, and NaN where its state is empty. `extremes`: every third lse is one of these."""
    generator = torch.Generator().manual_seed(seed)

    def place(source: Tensor) -> Tensor:
        view = poisoned(source.shape, source.dtype, device, strided=strided, poison=NAN)
        return view.copy_(source)

    made = []
    for _ in range(2):
        lse = torch.randn(*rows, generator=generator) * 3
        if extremes:
            some = torch.randint(len(EXTREMES), tuple(rows), generator=generator)
            third = torch.randint(3, tuple(rows), generator=generator) == 0
            lse = torch.where(third, torch.tensor(EXTREMES)[some], lse)
        o = torch.randn(*rows, d, generator=generator).to(dtype)
        o[lse.isinf()] = NAN
        made += [place(o), place(lse)]
    return States(*made)


def expected(states: States) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse in float64, and for each element of out how large what was added is."""
    lses = [x.double().masked_fill(x.isinf(), -INF) for x in (states.lse_a, states.lse_b)]
    largest = torch.maximum(*lses)
    base = largest.masked_fill(largest == -INF, 0)
    weights = [torch.exp(lse - base) for lse in lses]
    total = weights[0] + weights[1]
    terms = []
    for o, weight in zip((states.o_a, states.o_b), weights, strict=True):
        part = (weight / total.masked_fill(total == 0, 1))[..., None]
        terms.append(part * o.double().masked_fill(part == 0, 0))
    out, size = terms[0] + terms[1], terms[0].abs() + terms[1].abs()
    return out, largest + total.log(), size


def check_merged(
    result: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    (out, lse), (out_ref, lse_ref, size) = result, wanted
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert (out.shape, lse.shape) == (out_ref.shape, lse_ref.shape)
    assert not out.isnan().any()
    assert not lse.isnan().any()
    # exp and the additions are float32; its argument may be off by a rounding of lse.
    allowed = ROUNDING[dtype] * out_ref.abs() + 2e-6 * size + TINY[dtype]
    assert ((out.double() - out_ref).abs() <= allowed).all()
    empty = lse_ref == -INF
    assert torch.equal(lse == -INF, empty)
    assert not out[empty].any()
    error = (lse.double() - lse_ref)[~empty].abs()
    assert (error <= 1e-6 + 2**-23 * lse_ref[~empty].abs()).all()
