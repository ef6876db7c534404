"""What choosing by prediction costs against the fastest of the variants that were measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mla import costs
from mla.costs_file import Costs
from mla.device import Device

from .console import console
from .runs import Sample, predictor

_SHOWN = 5  # of the worst


class Regret(NamedTuple):
    """Of one case: the chosen variant's time over that of the fastest, 1 at best."""

    ratio: float
    case_id: str
    chosen: str
    best: str


def regrets(
    samples: Iterable[Sample],
    device: Device,
    classes: Mapping[str, Costs],
    *,
    told: bool = False,
) -> list[Regret]:
    """One for each case, in order, if dispatch chose among the variants measured.

    told: by callers who say how long the longest request is.
    """
    by_case: dict[str, list[Sample]] = {}
    for sample in samples:
        by_case.setdefault(sample.case_id, []).append(sample)

    def predicted_us(sample: Sample) -> float:
        found = classes[costs.class_name(sample.variant)]
        problem = sample.told if told else sample.problem
        return predictor(device, found)(sample.variant, problem)

    found = []
    for case_id, rivals in by_case.items():
        chosen = min(rivals, key=predicted_us)
        best = min(rivals, key=lambda sample: sample.us)
        found.append(Regret(chosen.us / best.us, case_id, chosen.variant.name, best.variant.name))
    return found


def geometric_mean(found: Iterable[Regret]) -> float:
    """Of the ratios; 1 for none."""
    logarithms = [math.log(regret.ratio) for regret in found]
    return math.exp(sum(logarithms) / max(len(logarithms), 1))


def print_regret(found: list[Regret], by: str = "the choice") -> None:
    """Mean and worst, and the cases that cost most."""
    worst = sorted(found, reverse=True)
    console.print(
        f"{by} costs {geometric_mean(found) - 1:.2%} in the geometric mean of {len(found)} "
        f"cases, {worst[0].ratio - 1 if worst else 0:.2%} at worst",
        style="bold",
    )
    for regret in worst[:_SHOWN]:
        if regret.ratio > 1:
            console.print(
                f"  {regret.ratio - 1:.2%} at {regret.case_id}: {regret.chosen} instead of "
                f"{regret.best}"
            )
