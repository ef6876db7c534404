"""Partial results have 16 bits a number, and the range of float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, make_problem
from compare import check, reference
from mla.variants import Variant
from running import run


@pytest.mark.parametrize("exponent", [-90, -30, 30, 90])
def test_values_of_any_size(
    row: Variant, exponent: int, device: torch.device, launches: list[str]
) -> None:
    """Of a cache that is a power of two larger, with a scale that is as much less, the result is
    as much larger."""
    case = Case((7000, 40, 0, 2500), q_lens=3, d_qk=row.d_qk or 576, h_q=20)
    inputs = make_problem(case, device)
    expected = reference(inputs)
    assert isinstance(inputs.kv_cache, torch.Tensor)
    inputs.kv_cache.mul_(2.0**exponent)
    inputs.case = replace(case, scale=case.scale * 2.0**-exponent)
    out, lse = run(inputs, variant=row.name)
    assert set(launches) == {row.name}
    check(((out.double() * 2.0**-exponent).to(out.dtype), lse), expected, case.scale)
