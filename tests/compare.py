"""The fp64 reference of a case, and how close a result must be to it."""

from __future__ import annotations

import torch
from cases import DEFAULT_SCALE, Inputs
from mla.reference import attend, errors
from torch import Tensor

MAX_ABS, MAX_REL = 8e-4, 2.01 / 128  # an element may miss one of the two
MAX_COSINE_DISTANCE = 5e-6
MAX_RELATIVE_RMSE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
MAX_LSE_ABS, MAX_LSE_REL = 1e-6, 8.01 / 65536


def reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Every request's out and lse in float64, in the shapes that `decode` returns."""
    case = inputs.case
    device = inputs.rows.device
    outs = [torch.empty(0, case.h_q, case.d_v, dtype=torch.float64, device=device)]
    lses = [torch.empty(0, case.h_q, dtype=torch.float64, device=device)]
    for q, kv in inputs.split():
        out, lse = attend(q, kv, case.d_v, scale=case.scale, causal=case.causal)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs).view(*case.row_shape, case.d_v), torch.cat(lses).view(case.row_shape)


def check(
    result: tuple[Tensor, Tensor | None],
    expected: tuple[Tensor, Tensor],
    scale: float = DEFAULT_SCALE,
) -> None:
    """Holds (out, lse) to the tolerances above, once nan and infinities are in the same places.

    A logit is a float32 sum of products near 1 / 100, times `scale`: a large scale multiplies the
    error of an lse near 0.
    """
    (out, lse), (out_ref, lse_ref) = result, expected
    finite = _same_special("out", out, out_ref)
    got, want = out.double()[finite], out_ref[finite]
    error = (got - want).abs()
    bad = (error > MAX_ABS) & (error > MAX_REL * want.abs())
    if bad.any():
        worst = int(torch.where(bad, error, -1.0).argmax())
        where = finite.nonzero()[worst].tolist()
        raise AssertionError(
            f"out{where} is {got[worst]:g}, not {want[worst]:g}; "
            f"{int(bad.sum())} like it of {bad.numel()}"
        )
    if want.any():
        found = errors(got, want)
        assert found.relative_rmse < MAX_RELATIVE_RMSE[out.dtype], str(found)
        assert found.cosine_distance < MAX_COSINE_DISTANCE, str(found)
    assert not out[lse_ref == -torch.inf].any(), "rows that see no token must be exactly 0"
    if lse is not None:
        assert lse.dtype == torch.float32
        finite = _same_special("lse", lse, lse_ref)
        got, want = lse.double()[finite], lse_ref[finite]
        error = (got - want).abs()
        bad = (error > MAX_LSE_ABS * max(1.0, abs(scale))) & (error > MAX_LSE_REL * want.abs())
        assert not bad.any(), (
            f"lse: {int(bad.sum())} of {bad.numel()} are off, by up to {float(error.max()):.2e}"
        )


def _same_special(name: str, got: Tensor, want: Tensor) -> Tensor:
    """Where both are finite; an error if nan, inf and -inf are not in the same places."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    for kind, test in (("nan", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (test(got) != test(want)).nonzero()
        if len(wrong):
            where = wrong[0].tolist()
            raise AssertionError(
                f"{name}{where} is {got[tuple(where)].item()}, not {want[tuple(where)].item()}: "
                f"{kind} in the wrong place, {len(wrong)} times"
            )
    finite: Tensor = want.isfinite()
    return finite
