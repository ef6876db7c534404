"""`mla fit --prefill`: the constants that the choice of prefill's way predicts by, from a sweep."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import date
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from mla import fused, prefill_costs, tuned
from mla.device import Device
from mla.prefill_choice import METHODS, WORKSPACE_BYTES
from mla.prefill_costs import PrefillCosts
from mla.prefill_estimate import Method, Request, absorbed_work, expanded_work

from .console import console, make_table
from .fit import HELD, least_squares
from .prefill_sweep import DTYPE, PAGE_SIZE, Point, read

# Where one way takes long, by this factor more than the other, its prediction decides nothing:
# there an error counts half as much.
FAR = 2.0
_SHOWN = 5
_FITTED = [name for name in PrefillCosts._fields if name != "planning_us"]


class Sample(NamedTuple):
    """A point of a sweep, and what predicts it."""

    point: Point
    predict: dict[Method, Callable[[PrefillCosts], float]]

    def chosen(self, costs: PrefillCosts) -> Method:
        return min(METHODS, key=lambda method: self.predict[method](costs))

    def regret(self, costs: PrefillCosts) -> float:
        """Time of the way chosen over that of the better one: 1 at best."""
        return self.point.us[self.chosen(costs)] / min(self.point.us.values())


def run(args: Namespace, device: Device) -> int:
    points = [point for path in args.runs for point in read(path)]
    samples = [sample(point, device) for point in points]
    costs = fit(samples, device)
    _print(device, costs, samples)
    if args.out:
        made = {
            "date": date.today().isoformat(),
            "runs": [path.name for path in args.runs],
            "points": len(samples),
            "rms": {m: round(_rms([_log(s, m, costs) for s in samples]), 4) for m in METHODS},
        }
        text = prefill_costs.dump(device.name, device.sm_count, costs, made)
        tuned.save(args.out, text)
        console.print(f"wrote {args.out}")
    return 0


def sample(point: Point, device: Device) -> Sample:
    request = Request(
        point.dims, DTYPE, 1, point.new, point.new + point.cached, PAGE_SIZE, True, WORKSPACE_BYTES
    )
    absorbed = absorbed_work(request, device)
    assert absorbed is not None
    expanded = expanded_work(request, device.sm_count, fused.CUDNN in point.attention)
    return Sample(point, {"absorbed": absorbed.us, "expanded": expanded.us})


def guessed(device: Device) -> PrefillCosts:
    """Launches as long as anywhere, and shares of the published figures. What a sweep does not tell
    apart is held to them."""
    return PrefillCosts(
        absorbed_us=25,
        decode_factor=1,
        expanded_us=5,
        chunk_us=10,
        attention_us=15,
        product_tflops=0.65 * device.tflops,
        memory_gbs=0.7 * device.bandwidth,
        cudnn_tflops=0.6 * device.tflops,
        flash_tflops=0.25 * device.tflops,
        planning_us=400,
    )


def fit(samples: Sequence[Sample], device: Device) -> PrefillCosts:
    """Least squares of the logarithms of predicted over measured times, from a guess that it is
    held to lightly. planning_us is the median of what was measured."""
    prior = guessed(device)
    origin = torch.tensor([getattr(prior, name) for name in _FITTED], dtype=torch.float64).log()

    def constants(x: Tensor) -> PrefillCosts:
        return prior._replace(**dict(zip(_FITTED, x.exp().tolist(), strict=True)))

    def residuals(x: Tensor) -> Tensor:
        costs = constants(x)
        errors = [_weight(s, m) * _log(s, m, costs) for s in samples for m in METHODS]
        return torch.cat([torch.tensor(errors, dtype=x.dtype), math.sqrt(HELD) * (x - origin)])

    planning_us = median(s.point.plan_us["expanded"] for s in samples)
    return constants(least_squares(residuals, origin))._replace(planning_us=planning_us)


def _log(sample: Sample, method: Method, costs: PrefillCosts) -> float:
    return math.log(sample.predict[method](costs) / sample.point.us[method])


def _weight(sample: Sample, method: Method) -> float:
    us = sample.point.us
    return 0.5 if us[method] > FAR * min(us.values()) else 1.0


def _rms(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error**2 for error in errors) / max(len(errors), 1))


def _print(device: Device, costs: PrefillCosts, samples: Sequence[Sample]) -> None:
    table = make_table(f"constants of prefill, {device.name}", "", "", numbers=1)
    for name, value in costs._asdict().items():
        table.add_row(name.replace("_", " "), f"{value:.4g}")
    for method in METHODS:
        errors = [_log(s, method, costs) for s in samples]
        table.add_row(f"root mean square error, {method}", f"{_rms(errors):.4f}")
    console.print(table)
    worst = sorted(samples, key=lambda s: s.regret(costs), reverse=True)
    mean = math.exp(sum(math.log(s.regret(costs)) for s in samples) / len(samples))
    console.print(
        f"the choice costs {mean - 1:.2%} in the geometric mean of {len(samples)} points, "
        f"{worst[0].regret(costs) - 1:.2%} at worst",
        style="bold",
    )
    for s in worst[:_SHOWN]:
        p = s.point
        if s.regret(costs) > 1:
            console.print(
                f"  {s.regret(costs) - 1:.2%} at {p.heads} heads, {p.new} new, {p.cached} cached: "
                f"{s.chosen(costs)}"
            )
