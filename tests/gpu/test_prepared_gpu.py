"""The second call of a kind is prepared, and reads and writes its own tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, make_problem
from compare import check, reference
from mla import _mla
from mla.variants import Variant
from running import one_of_each, plan_for, run

CASES = [
    Case((300, 70, 0), q_lens=2),
    Case((300, 70, 0), q_lens=2, given=False),
    Case((300, 70, 0), q_lens=(2, 0, 3), split_q=True),
    Case((5000, 70), split_cache=True, strided=True, given=False),
]


@pytest.mark.parametrize("planned", [False, True], ids=["", "plan"])
@pytest.mark.parametrize("case", CASES, ids=str)
@one_of_each
def test_calls_of_one_kind(
    row: Variant, case: Case, planned: bool, device: torch.device, launches: list[str]
) -> None:
    case = replace(case, d_qk=row.d_qk)
    _mla.forget()
    for seed in range(3):
        inputs = make_problem(case, device, seed=seed)
        plan = plan_for(inputs, variant=row.name) if planned else None
        check(run(inputs, variant=row.name, plan=plan), reference(inputs))
        assert launches == [row.name] * (seed + 1)
        assert _mla.num_prepared() == 1


@one_of_each
def test_without_redirection(row: Variant, device: torch.device) -> None:
    """As `launches` is not there: the extension launches by itself."""
    case = Case((300, 70), d_qk=row.d_qk)
    for seed in range(3):
        inputs = make_problem(case, device, seed=seed)
        check(run(inputs, variant=row.name), reference(inputs))


def test_tensors_are_described_in_c() -> None:
    """Otherwise calls take twice as long."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip(f"needs a torch with DLPack's exchange API, this is {torch.__version__}")
    assert _mla.has_exchange_api()


SIZES = [(300, 70, 0), (5000,), (40,) * 9, (0, 1, 2000, 64), (300, 70, 0, 9)]


@pytest.mark.parametrize("planned", [False, True], ids=["", "plan"])
@pytest.mark.parametrize("case", CASES, ids=str)
@one_of_each
def test_other_sizes_of_a_kind(
    row: Variant,
    case: Case,
    planned: bool,
    device: torch.device,
    launches: list[str],
    firsts: list[str],
) -> None:
    """Prepared by the extension, which asks Python for the variant alone."""
    _mla.forget()
    for i, seq_lens in enumerate(SIZES):
        q_lens = tuple(1 + k % 3 for k in range(len(seq_lens))) if case.ragged else case.q_lens
        sized = replace(case, d_qk=row.d_qk, seq_lens=seq_lens, q_lens=q_lens)
        inputs = make_problem(sized, device, seed=i)
        plan = plan_for(inputs, variant=row.name) if planned else None
        check(run(inputs, variant=row.name, plan=plan), reference(inputs))
        assert launches == [row.name] * (i + 1)
        assert _mla.num_prepared() == i + 1
        assert firsts == ["first"]
