"""`mla fit`: the constants of a GPU from recorded runs of forced variants, by least squares."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from mla import costs, costs_file, tuned
from mla.costs_file import Costs
from mla.device import Device, by_name

from .console import console, make_table
from .regret import print_regret, regrets
from .runs import Sample, predictor, read_runs
from .usage import UsageError

# In squared errors, of a constant that is off by a factor of e. Constants are held to those that
# the fit begins with, lightly: what runs do not tell stays as it was. Bandwidth is held to what is
# read at best, since a pipeline's own chain of steps can pass for it.
HELD, BANDWIDTH_HELD = 0.01, 8.0
READ_SHARE = 0.88  # of the published bandwidth
LESS_US = 1.0  # of runs in a smaller pool than others: where the fit begins
_MOST_STEPS = 60
_STEP = 1e-4  # of a logarithm, where slopes are taken


@dataclass(frozen=True)
class Fit:
    """What became of one class: its constants, and predicted over measured times."""

    costs: Costs
    ratios: list[float]  # empty: nothing was measured, the constants are the prior's
    less_us: dict[int, float]  # of runs in a smaller pool than others, by its elements

    @property
    def rms(self) -> float:
        """Of the logarithms: about the relative error."""
        return math.sqrt(sum(math.log(r) ** 2 for r in self.ratios) / max(len(self.ratios), 1))


def run(args: Namespace) -> int:
    device = by_name(args.gpu)
    if device is None:
        raise UsageError(f"--gpu {args.gpu}: expected a GPU that `mla explain --gpu` knows")
    if args.prefill:
        from . import prefill_fit

        return prefill_fit.run(args, device)
    lists = args.cases or [Path("benchmarks/cases.json")]
    samples = read_runs(lists, args.runs, args.dims)
    fits = fit(samples, device, costs.of(device).classes)
    console.print(fit_table(device, fits))
    print_regret(regrets(samples, device, fitted(fits)))
    told = regrets(samples, device, fitted(fits), told=True)
    print_regret(told, "the choice by max_seq_len")
    if args.out:
        made = {
            "date": date.today().isoformat(),
            "cases": [path.name for path in lists],
            "runs": [path.name for path in args.runs],
        }
        text = costs_file.dump(device.name, device.sm_count, fitted(fits), made | facts_of(fits))
        tuned.save(args.out, text)
        console.print(f"wrote {args.out}")
    return 0


def fitted(fits: Mapping[str, Fit]) -> dict[str, Costs]:
    return {name: found.costs for name, found in fits.items()}


def facts_of(fits: Mapping[str, Fit]) -> dict[str, object]:
    """How many times each class was fitted to, and how well."""
    return {
        "samples": {name: len(found.ratios) for name, found in fits.items()},
        "rms": {name: round(found.rms, 4) for name, found in fits.items()},
    }


def fit(samples: Iterable[Sample], device: Device, priors: Mapping[str, Costs]) -> dict[str, Fit]:
    """Constants of every class of the table.

    Only problems of equal lengths count: of others dispatch does not know the work. Classes without
    samples keep their prior.
    """

    def key(sample: Sample) -> str:
        return costs.class_name(sample.variant)

    usable = sorted((s for s in samples if s.equal_lengths), key=key)
    by_class = {name: list(group) for name, group in groupby(usable, key)}
    return {
        name: fit_class(by_class.get(name, []), device, costs) for name, costs in priors.items()
    }


def fit_class(samples: list[Sample], device: Device, prior: Costs) -> Fit:
    """Least squares of the logarithms of predicted over measured times (Levenberg-Marquardt).

    The unknowns are the logarithms of the constants, and of what calls take less in each pool that
    is smaller than the largest: constants are for that one, as servers have large ones.
    """
    if not samples:
        return Fit(prior, [], {})
    smaller = sorted({s.pool for s in samples})[:-1]
    of_pools = torch.full((len(smaller),), LESS_US, dtype=torch.float64).log()
    origin = torch.cat([_logarithms(prior), of_pools])
    held_to = prior._replace(bandwidth_gbs=READ_SHARE * device.bandwidth)
    anchor = torch.cat([_logarithms(held_to), of_pools])
    weights = torch.full_like(origin, HELD).sqrt()
    weights[anchor != origin] = math.sqrt(BANDWIDTH_HELD)

    def unknowns(x: Tensor) -> tuple[Costs, dict[int, float]]:
        constants = _constants(x[: len(x) - len(smaller)], prior)
        return constants, dict(zip(smaller, x[len(x) - len(smaller) :].exp().tolist(), strict=True))

    def residuals(x: Tensor) -> Tensor:
        constants, less_us = unknowns(x)
        predicted = predictor(device, constants)
        ratios = [
            math.log(predicted(s.variant, s.known) / (s.us + less_us.get(s.pool, 0.0)))
            for s in samples
        ]
        return torch.cat([torch.tensor(ratios, dtype=x.dtype), weights * (x - anchor)])

    best = least_squares(residuals, origin)
    found = residuals(best)[: len(samples)]
    constants, less_us = unknowns(best)
    return Fit(constants, found.exp().tolist(), less_us)


def _scalars(costs: Costs) -> dict[str, float]:
    return {name: value for name, value in costs._asdict().items() if name != "tflops_per_sm"}


def _logarithms(costs: Costs) -> Tensor:
    """Of what is not zero, the rates last."""
    values = [value for value in _scalars(costs).values() if value]
    return torch.tensor([*values, *costs.tflops_per_sm.values()], dtype=torch.float64).log()


def _constants(x: Tensor, prior: Costs) -> Costs:
    values = iter(x.exp().tolist())
    scalars = {name: next(values) for name, value in _scalars(prior).items() if value}
    rates = dict(zip(prior.tflops_per_sm, values, strict=True))
    return prior._replace(**scalars, tflops_per_sm=rates)


def least_squares(residuals: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Where the sum of squares is least, from x downhill."""
    one = torch.eye(len(x), dtype=x.dtype)
    damping, r = 1e-2, residuals(x)
    for _ in range(_MOST_STEPS):
        slopes = [(residuals(x + _STEP * e) - residuals(x - _STEP * e)) / (2 * _STEP) for e in one]
        jacobian = torch.stack(slopes, dim=1)
        step = torch.linalg.solve(jacobian.T @ jacobian + damping * one, -jacobian.T @ r)
        after = residuals(x + step)
        gain = float(r @ r - after @ after)
        if gain > 0:
            x, r, damping = x + step, after, damping / 3
            if gain < 1e-10:
                break
        else:
            damping *= 5
            if damping > 1e8:
                break
    return x


def fit_table(device: Device, fits: Mapping[str, Fit]) -> Table:
    """The constants of each class, and the range of predicted over measured times."""
    table = make_table(f"constants of {device.name}", "", *fits, numbers=len(fits))

    def add(name: str, values: Iterable[float]) -> None:
        table.add_row(name.replace("_", " "), *(f"{v:.4g}" if v else "-" for v in values))

    scalars = [_scalars(found.costs) for found in fits.values()]
    for name in scalars[0]:
        add(name, (each[name] for each in scalars))
    for rows in sorted({rows for found in fits.values() for rows in found.costs.tflops_per_sm}):
        rates = (found.costs.tflops_per_sm.get(rows, 0.0) for found in fits.values())
        add(f"tflops_per_sm of {rows} rows", rates)
    for pool in sorted({pool for found in fits.values() for pool in found.less_us}):
        times = (found.less_us.get(pool, 0.0) for found in fits.values())
        add(f"less in a pool of {pool / 1e9:.1f}e9 elements, us", times)
    add("runs", (len(found.ratios) for found in fits.values()))
    add("root mean square error", (found.rms for found in fits.values()))
    for name, pick in (("least predicted / measured", min), ("most", max)):
        add(name, (pick(found.ratios, default=0.0) for found in fits.values()))
    return table
