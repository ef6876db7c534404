"""Recorded runs of forced variants, as `mla bench --json` and `mla tune --json` write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mla import _mla, estimate
from mla.costs_file import Costs
from mla.device import Device
from mla.problem import Problem
from mla.variants import VARIANTS, Variant

from .cases import Case, load_cases, pool_elements, with_overrides
from .usage import UsageError


@dataclass(frozen=True)
class Sample:
    """One measurement: microseconds of a variant on a problem."""

    case_id: str
    problem: Problem
    equal_lengths: bool
    variant: Variant
    us: float
    longest: int | None = None  # KV tokens of a request
    pool: int = 0  # elements of the pool that its pages are scattered over

    @property
    def known(self) -> Problem:
        """The problem with the length that requests have."""
        return self.problem._replace(max_seq_len=self.longest)

    @property
    def told(self) -> Problem:
        """The problem of a caller who says how long requests are."""
        longest = None if self.longest is None else _mla.rounded_length(self.longest)
        return self.problem._replace(max_seq_len=longest)


def sample(case: Case, variant: Variant, us: float, pool: int = 0) -> Sample:
    equal = len(set(case.seq_lens)) == 1
    return Sample(case.id, case.problem(), equal, variant, us, max(case.seq_lens), pool)


def read_runs(
    cases: Iterable[Path], results: Iterable[Path], dims: tuple[int, int] = (576, 512)
) -> list[Sample]:
    """Joins results with their cases by id. UsageError for a file that cannot be used."""
    known: dict[str, tuple[Case, int]] = {}  # with the pool that all of its list were run in
    for path in cases:
        listed = [
            with_overrides(case, dims=dims, dtype=None, page_size=None) for case in load_cases(path)
        ]
        known.update((case.id, (case, pool_elements(listed))) for case in listed)
    variants = {variant.name: variant for variant in VARIANTS}
    return [_sample(path, entry, known, variants) for path in results for entry in _entries(path)]


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(entries, list):
        raise UsageError(f"{path}: got {type(entries).__name__}, expected a list of results")
    return entries


def _sample(
    path: Path,
    entry: dict[str, Any],
    cases: dict[str, tuple[Case, int]],
    variants: dict[str, Variant],
) -> Sample:
    try:
        case, name, us = entry["id"], entry["variant"], float(entry["us"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: an entry is not a result: {error!r}") from None
    if case not in cases:
        raise UsageError(f"{path}: {case} is in none of the files of cases")
    if name not in variants or variants[name].on_host or not us > 0:
        raise UsageError(f"{path}, {case}: got {us} us of {name!r}, expected a variant for GPUs")
    listed, pool = cases[case]
    return sample(listed, variants[name], us, pool)


_cut = lru_cache(maxsize=1 << 14)(_mla.cut)  # a fit asks for the same ones again and again


def predictor(device: Device, found: Costs) -> Callable[[Variant, Problem], float]:
    """Microseconds with these constants."""

    def us(variant: Variant, problem: Problem) -> float:
        sizes = (problem.b, problem.rows, problem.likely_len, variant.block_rows, variant.block_n)
        model = estimate.model_of(variant, problem.kind, found)
        return model.us(_cut(*sizes, device.sm_count))

    return us
