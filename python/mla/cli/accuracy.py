"""How close the result of a decode is to its float64 reference, and how close it has to be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mla.reference import Errors, errors

COSINE = 5e-6
RELATIVE_RMSE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
# An element is right when one of its two errors is small enough.
OUT_ABSOLUTE, OUT_RELATIVE = 8e-4, 2.01 / 128
LSE_ABSOLUTE, LSE_RELATIVE = 1e-6, 8.01 / 65536  # the first for a scale of at most 1


class Accuracy(NamedTuple):
    """Errors of one result; `faults` says in words which of them are too large."""

    out: Errors
    lse: float  # largest absolute error
    faults: list[str]


def compare(out: Tensor, lse: Tensor, want_out: Tensor, want_lse: Tensor, scale: float) -> Accuracy:
    """Holds out [.., d_v] and lse [..] against float64. A row without KV must be 0 and -inf.

    `scale` multiplies the rounding errors of the logits, and so those of an lse near 0.
    """
    out_errors = errors(out, want_out)
    blind = want_lse == -torch.inf
    if not torch.equal(lse == -torch.inf, blind):
        return Accuracy(out_errors, float("nan"), ["lse is -inf for other rows than it should be"])
    lse_error = (lse.double() - want_lse)[~blind].abs()
    lse_limit = (want_lse[~blind].abs() * LSE_RELATIVE).clamp(min=LSE_ABSOLUTE * max(1.0, scale))
    out_error = (out.double() - want_out).abs()
    out_limit = (want_out.abs() * OUT_RELATIVE).clamp(min=OUT_ABSOLUTE)
    rmse_limit = RELATIVE_RMSE[out.dtype]
    # Written so that a nan, of an element never written or read from poison, fails.
    checks = {
        f"cosine distance {out_errors.cosine_distance:.1e} > {COSINE:.0e}": (
            out_errors.cosine_distance <= COSINE
        ),
        f"relative RMSE {out_errors.relative_rmse:.1e} > {rmse_limit:.0e}": (
            out_errors.relative_rmse <= rmse_limit
        ),
        f"{_count(out_error, out_limit)} elements of out are wrong": (out_error <= out_limit).all(),
        f"{_count(lse_error, lse_limit)} lse are wrong": (lse_error <= lse_limit).all(),
        "rows that see no KV are not 0": not out[blind].any(),
    }
    largest = float(lse_error.max()) if lse_error.numel() else 0.0
    return Accuracy(out_errors, largest, [fault for fault, right in checks.items() if not right])


def _count(error: Tensor, limit: Tensor) -> int:
    return int((~(error <= limit)).sum())
